"""What goes into a decoder and what comes out of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from cllm.errors import InputError

Refill = Literal["block", "sliding"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn and what ends a response. The default, temperature 0, is greedy decoding.

    `seed` with the token's position determines the noise (see `cllm.decoding.sampling`), so a request gives the same
    tokens alone, in any batch, and at any block size.

    Attributes:
        temperature: divides the logits; 0 is argmax.
        top_k: draw among the likeliest k tokens; 0 is no limit.
        top_p: draw among the fewest tokens whose mass reaches this share, in (0, 1].
        min_p: draw among tokens at least this times as likely as the likeliest, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and response; 1 is off.
        presence_penalty: taken off the logits of tokens of the response, in [-2, 2].
        frequency_penalty: taken off as often as the token stands in the response, in [-2, 2].
        seed: any integer; the noise uses its low 64 bits.
        logprobs: report the log-probability of each token and of this many likeliest ones, 0 to 20; None is off.
        min_tokens: tokens of the response before one that ends it is allowed.
        stop: texts that end the response.
        stop_token_ids: tokens that end the response, besides the model's own.
        ignore_eos: the model's end-of-sequence tokens do not end the response.

    Raises:
        InputError: a field outside its range or of a wrong type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._require("temperature", "a finite number >= 0", _is_number(self.temperature) and self.temperature >= 0)
        self._require("top_k", "an integer >= 0 of 31 bits", _is_count(self.top_k))
        self._require("top_p", "a number in (0, 1]", _is_number(self.top_p) and 0 < self.top_p <= 1)
        self._require("min_p", "a number in [0, 1]", _is_number(self.min_p) and 0 <= self.min_p <= 1)
        repetition = self.repetition_penalty
        self._require("repetition_penalty", "a finite number > 0", _is_number(repetition) and repetition > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._require(name, "a number in [-2, 2]", _is_number(value) and -2 <= value <= 2)
        self._require("seed", "an integer", _is_integer(self.seed))
        asked = self.logprobs
        self._require("logprobs", "None or an integer in [0, 20]", asked is None or (_is_count(asked) and asked <= 20))
        self._require("min_tokens", "an integer >= 0 of 31 bits", _is_count(self.min_tokens))
        self._require("stop", "a tuple of strings, none empty", _is_tuple_of(self.stop, _is_text))
        self._require("stop_token_ids", "a tuple of integers >= 0", _is_tuple_of(self.stop_token_ids, _is_count))
        self._require("ignore_eos", "true or false", isinstance(self.ignore_eos, bool))

    def _require(self, name: str, rule: str, holds: bool) -> None:
        if not holds:
            raise InputError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def signed_seed(self) -> int:
        """The low 64 bits of the seed as a signed integer; every one of them counts."""
        return (self.seed + 2**63) % 2**64 - 2**63

    @property
    def penalises(self) -> bool:
        """Whether the draw depends on which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def end_ids(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """Tokens that end the response of a model whose end-of-sequence tokens are `eos_ids`."""
        return frozenset(self.stop_token_ids) | frozenset(() if self.ignore_eos else eos_ids)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_integer(value) and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    """A number that float32 can hold: neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**128


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_tuple_of(value: object, is_item: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and all(map(is_item, value))


def _first_stranger(prompt_ids: object) -> object:
    """What makes it no tuple of integers."""
    if not isinstance(prompt_ids, tuple):
        return prompt_ids
    return next(token for token in prompt_ids if type(token) is not int)


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One prompt to continue by at most `max_new_tokens` tokens.

    The last `num_given` tokens of the prompt are of a response that goes on: penalties and `min_tokens` count them.

    Raises:
        InputError: a field of a wrong type, an empty prompt, no tokens to add, or fewer than `sampling.min_tokens`.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    num_given: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt_ids, tuple) or not {int}.issuperset(map(type, self.prompt_ids)):
            raise InputError(f"prompt_ids must be a tuple of integers, got {_first_stranger(self.prompt_ids)!r}")
        if not self.prompt_ids:
            raise InputError("prompt_ids must hold at least one token")
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be an integer >= 1, got {self.max_new_tokens!r}")
        if not isinstance(self.sampling, SamplingParams):
            raise InputError(f"sampling must be SamplingParams, got {self.sampling!r}")
        if not _is_count(self.num_given) or self.num_given >= len(self.prompt_ids):
            raise InputError(f"num_given must be an integer in [0, {len(self.prompt_ids)}), got {self.num_given!r}")
        if self.sampling.min_tokens > self.num_given + self.max_new_tokens:
            raise InputError(f"min_tokens must be <= max_new_tokens, got {self.sampling.min_tokens}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a committed token under the model's own logits, and of the likeliest tokens there.

    `top` holds (token id, log-probability), likeliest first, as many as the request asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens committed to one row by one forward pass; `finish_reason` is set on the row's last commit.

    `logprobs` has one entry a token, if the request asked for them. `guesses` are the pass's predictions for the tokens
    behind the committed ones. With sliding refill and no n-grams the next pass starts from them; in other modes it may
    start from some of them only. Empty for AR, and where a decoder does not tell them.
    """

    row: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    guesses: tuple[int, ...] = ()


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
