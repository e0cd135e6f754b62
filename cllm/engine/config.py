"""Settings of an engine."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cllm.config import Config
from cllm.decoding.branches import Branches
from cllm.decoding.config import GuessKind
from cllm.decoding.records import Refill

_WIDEST = 256  # tokens that a step feeds for a row


class LookaheadConfig(Config):
    """Lookahead decoding (Fu et al. 2024): W columns, N-grams, and up to G candidates verified in a step.

    A step feeds (W + G)(N - 1) tokens for each row and commits up to N. With few rows they are nearly free: the authors
    take W = G = 15 and N = 5 on an A100 for a 7B model, and smaller ones for larger models.
    """

    window: int = Field(5, ge=1)
    ngram: int = Field(5, ge=2)
    candidates: int = Field(5, ge=1)
    pool_text: bool = True  # n-grams of prompt and response are candidates as well, not those of the columns alone

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.branches.num_inputs > _WIDEST:
            raise ValueError(
                f"window, ngram and candidates: a step feeds (window + candidates) * (ngram - 1) tokens, "
                f"at most {_WIDEST}, got {self.branches.num_inputs}"
            )
        return self

    @property
    def branches(self) -> Branches:
        return Branches(self.window, self.ngram, self.candidates)


class EngineConfig(Config):
    """How an engine decodes, and what it may use.

    The window is n: a step feeds every row's last committed token and n - 1 guesses. `adaptive` chooses n for each step
    from a measured table of step times and the rows' recent acceptance, up to `window`; `fixed` always takes `window`,
    and 1 is AR decoding. With `lookahead` the window is not used, and the other settings of Jacobi decoding must keep
    their defaults.
    """

    window: int = Field(16, ge=1, le=_WIDEST)
    policy: Literal["fixed", "adaptive"] = "fixed"
    refill: Refill = "sliding"  # block: the window stays on its block of n tokens until the block has converged
    record: bool = False  # keep the Jacobi trajectories (needs refill block and policy fixed)
    guess: GuessKind = "prompt"
    ngram: Literal[0, 2, 3, 4, 5, 6, 7, 8] = 0  # order of the n-gram pool that proposes guesses; 0: none
    lookahead: LookaheadConfig | None = None  # instead of Jacobi decoding
    max_rows: int = Field(64, ge=1)  # requests decoded together
    max_tokens: int = Field(2048, ge=2)  # prompt and response of one request
    cache_blocks: int | None = Field(None, ge=2)  # None: enough for max_rows full rows, or what the GPU has left
    block_tokens: int = Field(16, ge=1)
    reuse_prefixes: bool = True
    prefill_tokens: int = Field(2048, ge=1)  # prompt tokens read in one step, so that decoding rows are not held up
    memory_fraction: float = Field(0.9, gt=0, le=1)  # of the GPU's memory, for weights, cache and graphs together
    cuda_graphs: bool = True  # on a GPU
    tune: bool = False  # on one GPU: let the kernels find their fastest launches first, which takes under a minute
    capture: bool = True  # all graphs when the engine is built; else a request waits for each that is new
    overlap: bool | None = None  # read a step's result while the next one runs; None: on GPUs, lookahead never

    @model_validator(mode="after")
    def _blocks_are_whole(self) -> Self:
        if self.lookahead is not None:
            return self
        if self.record and (self.refill != "block" or self.policy != "fixed" or self.ngram):
            raise ValueError("record: trajectories need refill 'block', policy 'fixed' and ngram 0")
        if self.refill == "block" and self.policy == "adaptive":
            raise ValueError("refill: 'block' needs policy 'fixed': the end of a block would count as a wrong guess")
        return self

    @model_validator(mode="after")
    def _lookahead_stands_alone(self) -> Self:
        if self.lookahead is None:
            return self
        for key, allowed in (
            ("record", self.record is False),
            ("refill", self.refill == "sliding"),
            ("policy", self.policy == "fixed"),
            ("ngram", self.ngram == 0),
            ("overlap", self.overlap is not True),
        ):
            if not allowed:
                raise ValueError(f"{key}={getattr(self, key)} does not go together with lookahead")
        return self

    @property
    def width(self) -> int:
        """Most tokens that a step feeds for a row."""
        return self.window if self.lookahead is None else self.lookahead.branches.num_inputs

    @property
    def depth(self) -> int:
        """Most tokens that a step commits to a row."""
        return self.window if self.lookahead is None else self.lookahead.ngram

    @property
    def overhang(self) -> int:
        """Tokens that a step may store behind a row's longest length, and read again."""
        return 0 if self.lookahead is None else self.width - 1

    @property
    def row_blocks(self) -> int:
        """Cache blocks of the longest row."""
        return -(-(self.max_tokens + self.overhang) // self.block_tokens)
