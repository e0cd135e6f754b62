"""What goes into a decoder and what comes out of it."""

from dataclasses import dataclass
from typing import Literal

Refill = Literal["block", "sliding"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. The default, temperature 0, is greedy decoding.

    `seed` with the token's position determines the noise (see `cllm.decoding.sampling`), so a request gives the same
    tokens alone, in any batch, and at any block size.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One prompt to continue by at most `max_new_tokens` tokens."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a prompt needs at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens committed to one row by one forward pass; `finish_reason` is set on the row's last commit."""

    row: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class BlockTrajectory:
    """The Jacobi trajectory of one block (paper section 3.1).

    `states[0]` is the initial guess, `states[-1]` the fixed point, every state has block-size tokens. Tokens behind an
    end-of-sequence token in the fixed point carry no meaning. One forward pass lies between two neighbouring states.
    """

    states: tuple[tuple[int, ...], ...]

    @property
    def fixed_point(self) -> tuple[int, ...]:
        return self.states[-1]


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """A finished row.

    Attributes:
        token_ids: the new tokens, the end-of-sequence token included if one was produced.
        accepted: tokens committed by each forward pass, in order. The prompt's own forward yields the first tokens, so
            it counts; `num_forwards` of AR decoding therefore equals its number of tokens.
        trajectory: the blocks' trajectories, if the decoder recorded them (block refill only).
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    accepted: tuple[int, ...]
    trajectory: tuple[BlockTrajectory, ...] = ()

    @property
    def num_forwards(self) -> int:
        return len(self.accepted)

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / len(self.accepted)
