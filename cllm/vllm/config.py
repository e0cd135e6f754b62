"""Settings of vLLM as a peer."""

from typing import Literal

from pydantic import Field

from cllm.config import Config

Method = Literal["ar", "ngram", "draft_model", "medusa", "eagle3", "suffix", "jacobi"]
JacobiGuess = Literal["prompt", "pad", "ngram"]
WITH_DRAFT: frozenset[str] = frozenset({"draft_model", "medusa", "eagle3"})


class JacobiOptions(Config):
    """How Jacobi decoding inside vLLM guesses, and when it narrows its window.

    They travel in vLLM's `additional_config` under the key "jacobi"; the window itself follows from its
    `diffusion_config`: canvas_length is the number of guesses, one less than the window.
    """

    guess: JacobiGuess = "prompt"  # of tokens that no prediction is left over for; ngram falls back to prompt
    pad_id: int = Field(0, ge=0)
    policy: Literal["adaptive", "fixed"] = "adaptive"  # by step times measured at start-up, or always the full window


class PeerOptions(Config):
    """How a vLLM engine decodes, and what it may use. What is None is left to vLLM."""

    method: Method
    draft: str | None = None  # the draft model, Medusa heads or EAGLE-3 head
    guesses: int = Field(5, ge=1, le=127)  # a step's guesses for a row; jacobi: the window less one
    ngram_max: int = Field(5, ge=1)  # longest and shortest suffix that method ngram looks up
    ngram_min: int = Field(2, ge=1)
    jacobi: JacobiOptions = JacobiOptions()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_tokens: int | None = Field(None, ge=2)  # prompt and response of one request
    max_rows: int = Field(128, ge=1)
    reuse_prefixes: bool = False
    memory_fraction: float = Field(0.9, gt=0, le=1)
    cache_bytes: int | None = Field(None, ge=1)
    cuda_graphs: bool = True
    async_scheduling: bool | None = None
    seed: int = 0


class PeerConfig(PeerOptions):
    """One vLLM engine: a model and its options."""

    model: str
    gpus: int = Field(1, ge=1)  # tensor parallelism
    tokenizer: bool = True  # False: none is loaded; requests with `stop` texts are refused
    eos_ids: tuple[int, ...] = ()  # tokens that end a response, besides those of the checkpoint's generation config
