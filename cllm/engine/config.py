"""Settings of an engine."""

from typing import Literal

from pydantic import Field

from cllm.config import Config
from cllm.decoding.config import GuessKind
from cllm.decoding.records import Refill


class EngineConfig(Config):
    """How an engine decodes, and what it may use.

    The window is n: a step feeds every row's last committed token and n - 1 guesses. `adaptive` chooses n for each step
    from a measured table of step times and the rows' recent acceptance, up to `window`; `fixed` always takes `window`,
    and 1 is AR decoding.
    """

    window: int = Field(16, ge=1, le=256)
    policy: Literal["fixed", "adaptive"] = "fixed"
    refill: Refill = "sliding"  # block: the window stays on its block of n tokens until the block has converged
    record: bool = False  # keep the Jacobi trajectories (needs refill block and policy fixed)
    guess: GuessKind = "prompt"
    ngram: Literal[0, 2, 3, 4, 5, 6, 7, 8] = 0  # order of the n-gram pool that proposes guesses; 0: none
    max_rows: int = Field(64, ge=1)  # requests decoded together
    max_tokens: int = Field(2048, ge=2)  # prompt and response of one request
    cache_blocks: int | None = Field(None, ge=2)  # None: enough for max_rows full rows, or what the GPU has left
    block_tokens: int = Field(16, ge=1)
    reuse_prefixes: bool = True
    prefill_tokens: int = Field(2048, ge=1)  # prompt tokens read in one step, so that decoding rows are not held up
    memory_fraction: float = Field(0.9, gt=0, le=1)  # of the GPU's memory, for weights, cache and graphs together
    cuda_graphs: bool = True  # on a GPU
    overlap: bool | None = None  # read a step's result while the next one runs; None: on GPUs
