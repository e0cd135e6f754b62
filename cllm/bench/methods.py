"""Decoding methods of the benchmark matrix: their settings, and what serves requests by them.

Our engine is AR, Jacobi and Jacobi with recycled n-grams; lookahead decoding and transformers' `generate` (the papers'
baseline) run on the same weights in transformers; vLLM is a peer that loads the checkpoint itself.

Shapes: L tokens of prompt and response.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from cllm.bench.closed_loop import Decoder
from cllm.config import Config
from cllm.decoding.config import GuessKind
from cllm.decoding.lookahead import LookaheadDecoder
from cllm.decoding.records import Commit, DecodeRequest, Refill
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.load import build_engine
from cllm.errors import InputError
from cllm.evaluation.subject import Subject
from cllm.vllm.config import WITH_DRAFT, JacobiOptions, PeerConfig
from cllm.vllm.config import Method as VllmMethodName
from cllm.vllm.llm import VllmBackend, check_config
from cllm.vllm.versions import check_installed

EngineName = Literal["cllm", "transformers", "vllm"]


class ArMethod(Config):
    """Our engine with a window of 1."""

    kind: Literal["ar"] = "ar"

    @property
    def label(self) -> str:
        return "ar"


class JacobiMethod(Config):
    """Our engine with a window of n; `ngram` is the order of the n-grams recycled as guesses, 0 for none."""

    kind: Literal["jacobi"] = "jacobi"
    window: int = Field(16, ge=2, le=256)
    refill: Refill = "sliding"
    policy: Literal["fixed", "adaptive"] = "fixed"
    guess: GuessKind = "pad"
    ngram: int = Field(0, ge=0, le=8)

    @model_validator(mode="after")
    def _blocks_have_one_width(self) -> "JacobiMethod":
        if self.refill == "block" and self.policy == "adaptive":
            raise ValueError("refill block needs policy fixed")
        return self

    @property
    def label(self) -> str:
        kind = "adaptive" if self.policy == "adaptive" else self.refill
        ngram = f" + {self.ngram}-grams" if self.ngram else ""
        return f"jacobi-{kind}{ngram} n={self.window}"

    @property
    def is_paper(self) -> bool:
        """Whether this is the paper's Jacobi decoding, block by block."""
        return self.refill == "block" and self.ngram == 0


class LookaheadMethod(Config):
    """Lookahead decoding with W columns, N-grams and at most G candidates a forward."""

    kind: Literal["lookahead"] = "lookahead"
    window: int = Field(5, ge=1)
    ngram: int = Field(5, ge=2)
    candidates: int = Field(5, ge=1)
    guess: GuessKind = "prompt"

    @property
    def label(self) -> str:
        return f"lookahead W={self.window} N={self.ngram} G={self.candidates}"


class TransformersMethod(Config):
    """`generate` of transformers, one prompt at a time: what the papers call AR."""

    kind: Literal["transformers"] = "transformers"

    @property
    def label(self) -> str:
        return "transformers generate"


class VllmMethod(Config):
    """vLLM's AR decoding, one of its speculative methods, or Jacobi decoding inside it."""

    kind: Literal["vllm"] = "vllm"
    method: VllmMethodName = "ar"
    guesses: int = Field(5, ge=1, le=127)
    draft: str | None = None  # a checkpoint; "run": the draft model or heads that the cell's own run has trained
    memory_fraction: float = Field(0.85, gt=0, le=1)  # of the GPU's memory
    cache_bytes: int | None = Field(None, ge=1)  # for keys and values; None: what the memory has left
    cuda_graphs: bool = True
    jacobi: JacobiOptions = JacobiOptions()  # of method jacobi; `pad_id` is the run's

    @property
    def label(self) -> str:
        return "vllm ar" if self.method == "ar" else f"vllm {self.method} k={self.guesses}"


MethodConfig = Annotated[
    ArMethod | JacobiMethod | LookaheadMethod | TransformersMethod | VllmMethod, Field(discriminator="kind")
]
_ENGINES: dict[str, EngineName] = {"transformers": "transformers", "vllm": "vllm"}
_ONE_AT_A_TIME = ("lookahead", "transformers")


def engine_of(method: MethodConfig) -> EngineName:
    """Whose AR decoding a method is compared with; lookahead decoding is our code."""
    return _ENGINES.get(method.kind, "cllm")


def obstacle(method: MethodConfig, *, concurrency: int, temperature: float) -> str | None:
    """Why a method cannot run so, as far as its settings tell; None if it can."""
    if concurrency > 1 and method.kind in _ONE_AT_A_TIME:
        return "decodes one request at a time"
    if temperature > 0 and engine_of(method) != "cllm":
        return f"{engine_of(method)} draws with another noise, so its outputs cannot be compared; use temperature=0"
    return None


def missing_part(method: MethodConfig, checkpoint: str) -> str | None:
    """What this machine or the checkpoint's draft lacks for a method; None if nothing."""
    if not isinstance(method, VllmMethod):
        return None
    try:
        check_installed()
        check_config(_peer(method, checkpoint, max_rows=1, max_tokens=2, eos_ids=()))
    except InputError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method asks for besides the model's weights (the columns of the paper's Table 7)."""

    draft: str | None  # another checkpoint, beside the model in memory
    mask: bool  # an attention mask other than the causal one


def needs(method: MethodConfig) -> Needs:
    draft = method.method if isinstance(method, VllmMethod) and method.method in WITH_DRAFT else None
    return Needs(draft, mask=method.kind == "lookahead")


class OneByOne:
    """Serves the requests of a decoder that takes one at a time.

    Args:
        stream: decodes one request, yielding what was committed; rows do not matter.
    """

    def __init__(self, stream: Callable[[DecodeRequest], Iterator[list[Commit]]]) -> None:
        self._stream = stream
        self._waiting: deque[tuple[int, DecodeRequest]] = deque()
        self._current: tuple[int, Iterator[list[Commit]]] | None = None
        self._next_key = 0

    def add(self, request: DecodeRequest) -> int:
        key = self._next_key
        self._next_key += 1
        self._waiting.append((key, request))
        return key

    def step(self) -> Sequence[Commit]:
        if self._current is None:
            key, request = self._waiting.popleft()
            self._current = key, self._stream(request)
        key, stream = self._current
        commits = [Commit(key, commit.token_ids, commit.finish_reason) for commit in next(stream)]
        if commits[-1].finish_reason is not None:
            self._current = None
        return commits


@dataclass(frozen=True, slots=True)
class Room:
    """What a decoder must hold: requests in flight, and tokens of the longest one."""

    rows: int
    tokens: int


def open_decoder(method: MethodConfig, subject: Subject, room: Room) -> Decoder:
    """A decoder of a model in memory.

    Raises:
        InputError: the model cannot keep the settings, or there is too little memory.
    """
    if isinstance(method, LookaheadMethod):
        return OneByOne(_lookahead(method, subject))
    if isinstance(method, TransformersMethod):
        return OneByOne(_generate(subject))
    assert isinstance(method, ArMethod | JacobiMethod)
    engine = open_engine(method, subject, room)
    engine.capture()
    return engine


def open_engine(method: ArMethod | JacobiMethod, subject: Subject, room: Room, *, record: bool = False) -> Engine:
    """Our engine; `record` keeps the trajectories (refill block)."""
    settings = method.model_dump(exclude={"kind"}) if isinstance(method, JacobiMethod) else {"window": 1}
    config = EngineConfig(**settings, max_rows=room.rows, max_tokens=room.tokens, reuse_prefixes=False, record=record)
    return build_engine(subject.decoder, config, eos_ids=subject.eos_ids, pad_id=subject.pad_id)


def open_vllm(
    method: VllmMethod, checkpoint: str, room: Room, *, eos_ids: Sequence[int], pad_id: int, dtype: torch.dtype
) -> VllmBackend:
    """vLLM over a checkpoint folder or Hugging Face id.

    Raises:
        InputError: vLLM is not installed, or the settings contradict the checkpoints.
    """
    config = _peer(method, checkpoint, max_rows=room.rows, max_tokens=room.tokens, eos_ids=tuple(eos_ids))
    name: Literal["bfloat16", "float32"] = "bfloat16" if dtype == torch.bfloat16 else "float32"
    jacobi = method.jacobi.model_copy(update={"pad_id": pad_id})
    return VllmBackend(config.model_copy(update={"dtype": name, "jacobi": jacobi}))


def _peer(
    method: VllmMethod, checkpoint: str, *, max_rows: int, max_tokens: int, eos_ids: tuple[int, ...]
) -> PeerConfig:
    return PeerConfig(
        method=method.method,
        model=checkpoint,
        draft=method.draft,
        guesses=method.guesses,
        max_rows=max_rows,
        max_tokens=max_tokens,
        memory_fraction=method.memory_fraction,
        cache_bytes=method.cache_bytes,
        cuda_graphs=method.cuda_graphs,
        tokenizer=False,
        eos_ids=eos_ids,
    )


def _lookahead(method: LookaheadMethod, subject: Subject) -> Callable[[DecodeRequest], Iterator[list[Commit]]]:
    settings = method.model_dump(exclude={"kind"})
    decoder = LookaheadDecoder(subject.model, **settings, eos_ids=subject.eos_ids, pad_id=subject.pad_id)
    return lambda request: decoder.stream([request])


def _generate(subject: Subject) -> Callable[[DecodeRequest], Iterator[list[Commit]]]:
    """One commit a token, all of them when the response is finished: `generate` shows nothing before."""
    model: Any = subject.model  # its `generate` has no types

    def stream(request: DecodeRequest) -> Iterator[list[Commit]]:
        prompt_1L = torch.tensor([request.prompt_ids], device=model.device)
        output_1L = model.generate(
            prompt_1L,
            attention_mask=torch.ones_like(prompt_1L),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(subject.eos_ids),
            pad_token_id=subject.pad_id,
        )
        *tokens, last = output_1L[0, prompt_1L.shape[1] :].tolist()
        reason: Literal["stop", "length"] = "stop" if last in subject.eos_ids else "length"
        yield [*(Commit(0, (token,)) for token in tokens), Commit(0, (last,), reason)]

    return stream
