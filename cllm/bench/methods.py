"""Decoding methods of the benchmark matrix: their settings, and what serves requests by them.

Our engine is AR, Jacobi, Jacobi with recycled n-grams and lookahead decoding; transformers' `generate` (the papers'
baseline) runs on the same weights; vLLM is a peer that loads the checkpoint itself.

Shapes: L tokens of prompt and response.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import GenerationConfig

from cllm.bench.one_by_one import OneByOne
from cllm.config import Config
from cllm.decoding.backend import Backend
from cllm.decoding.config import GuessKind
from cllm.decoding.records import Commit, DecodeRequest, Refill
from cllm.engine.config import EngineConfig, LookaheadConfig
from cllm.engine.engine import Engine
from cllm.engine.load import build_engine
from cllm.errors import InputError
from cllm.evaluation.subject import Subject
from cllm.vllm.arguments import check_config
from cllm.vllm.config import WITH_DRAFT, JacobiOptions, PeerConfig
from cllm.vllm.config import Method as VllmMethodName
from cllm.vllm.jacobi_hooks import SCHEDULER_HOOKS, WORKER_HOOKS, check_hooks
from cllm.vllm.llm import VllmBackend
from cllm.vllm.versions import check_installed, require_vllm

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
    ngram: Literal[0, 2, 3, 4, 5, 6, 7, 8] = 0

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


class LookaheadMethod(LookaheadConfig):
    """Our engine by lookahead decoding: W columns, N-grams and at most G candidates a forward."""

    kind: Literal["lookahead"] = "lookahead"
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
    gpus: int = Field(1, ge=1)  # tensor parallelism
    jacobi: JacobiOptions | None = None  # of method jacobi; None: its defaults. `pad_id` is always the run's

    @model_validator(mode="after")
    def _options_are_for_jacobi(self) -> "VllmMethod":
        if self.jacobi is not None and self.method != "jacobi":
            raise ValueError(f"jacobi: options of method jacobi; the method is {self.method}")
        return self

    @property
    def label(self) -> str:
        name = "vllm ar" if self.method == "ar" else f"vllm {self.method} k={self.guesses}"
        options = self.jacobi or JacobiOptions()
        name += " + n-grams" if options.guess == "ngram" else ""
        name += " fixed" if options.policy == "fixed" else ""
        return name if self.gpus == 1 else f"{name} on {self.gpus} GPUs"


MethodConfig = Annotated[
    ArMethod | JacobiMethod | LookaheadMethod | TransformersMethod | VllmMethod, Field(discriminator="kind")
]
_ENGINES: dict[str, EngineName] = {"transformers": "transformers", "vllm": "vllm"}
_ONE_AT_A_TIME = ("transformers",)
_OwnMethod = ArMethod | JacobiMethod | LookaheadMethod


def engine_of(method: MethodConfig) -> EngineName:
    """Whose AR decoding a method is compared with."""
    return _ENGINES.get(method.kind, "cllm")


def obstacle(method: MethodConfig, *, concurrency: int, temperature: float) -> str | None:
    """Why a method cannot run so, as far as its settings tell; None if it can."""
    if concurrency > 1 and method.kind in _ONE_AT_A_TIME:
        return "decodes one request at a time"
    if temperature > 0 and engine_of(method) != "cllm":
        return f"{engine_of(method)} draws with another noise, so its outputs cannot be compared; use temperature=0"
    return None


def gpus_of(method: MethodConfig) -> int:
    """How many GPUs share the method's model."""
    return method.gpus if isinstance(method, VllmMethod) else 1


def missing_part(method: MethodConfig, checkpoint: str) -> str | None:
    """What this machine, its vLLM or the checkpoint's draft lacks for a method; None if nothing."""
    if not isinstance(method, VllmMethod):
        return None
    try:
        check_installed()
        check_config(_peer(method, checkpoint, max_rows=1, max_tokens=2, eos_ids=(), pad_id=0))
        if method.method == "jacobi":
            check_hooks(require_vllm(), (*SCHEDULER_HOOKS, *WORKER_HOOKS))
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


@dataclass(frozen=True, slots=True)
class Room:
    """What a decoder must hold: requests in flight, and tokens of the longest one."""

    rows: int
    tokens: int


def open_decoder(method: MethodConfig, subject: Subject, room: Room) -> Backend:
    """A decoder of a model in memory.

    Raises:
        InputError: the model cannot keep the settings, or there is too little memory.
    """
    if isinstance(method, TransformersMethod):
        return OneByOne(_generate(subject))
    assert isinstance(method, _OwnMethod)
    return open_engine(method, subject, room)


def open_engine(method: _OwnMethod, subject: Subject, room: Room, *, record: bool = False) -> Engine:
    """Our engine; `record` keeps the trajectories (refill block)."""
    settings = _engine_settings(method)
    config = EngineConfig(**settings, max_rows=room.rows, max_tokens=room.tokens, reuse_prefixes=False, record=record)
    return build_engine(subject.decoder, config, eos_ids=subject.eos_ids, pad_id=subject.pad_id)


def _engine_settings(method: _OwnMethod) -> dict[str, Any]:
    if isinstance(method, LookaheadMethod):
        return {"lookahead": method.model_dump(exclude={"kind", "guess"}), "guess": method.guess}
    return method.model_dump(exclude={"kind"}) if isinstance(method, JacobiMethod) else {"window": 1}


def open_vllm(
    method: VllmMethod,
    checkpoint: str,
    room: Room,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    dtype: torch.dtype,
    revision: str | None = None,
) -> VllmBackend:
    """vLLM over a checkpoint folder or Hugging Face id.

    Args:
        pad_id: the run's padding token, which Jacobi decoding may guess with.

    Raises:
        InputError: vLLM is not installed, or the settings contradict the checkpoints.
    """
    size = {"max_rows": room.rows, "max_tokens": room.tokens}
    config = _peer(method, checkpoint, **size, eos_ids=tuple(eos_ids), pad_id=pad_id)
    name: Literal["bfloat16", "float32"] = "bfloat16" if dtype == torch.bfloat16 else "float32"
    more = {} if revision is None else {"revision": revision}
    return VllmBackend(config.model_copy(update={"dtype": name}), **more)


def _peer(
    method: VllmMethod, checkpoint: str, *, max_rows: int, max_tokens: int, eos_ids: tuple[int, ...], pad_id: int
) -> PeerConfig:
    options = method.jacobi or JacobiOptions()
    return PeerConfig(
        method=method.method,
        model=checkpoint,
        draft=method.draft,
        guesses=method.guesses,
        jacobi=options.model_copy(update={"pad_id": pad_id}),
        max_rows=max_rows,
        max_tokens=max_tokens,
        memory_fraction=method.memory_fraction,
        cache_bytes=method.cache_bytes,
        cuda_graphs=method.cuda_graphs,
        gpus=method.gpus,
        tokenizer=False,
        eos_ids=eos_ids,
    )


def _generate(subject: Subject) -> Callable[[DecodeRequest], Iterator[list[Commit]]]:
    """One commit a token, all of them when the response is finished: `generate` shows nothing before."""
    model: Any = subject.model  # its `generate` has no types
    # What the call leaves open comes from here, and a checkpoint's own may penalise repetition: no other method does.
    model.generation_config = GenerationConfig()

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
