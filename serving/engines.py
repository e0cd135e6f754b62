"""The kinds of engines that a replica can hold."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cllm.decoding.backend import Backend
from cllm.engine.async_engine import AsyncEngine
from cllm.engine.load import load_engine
from cllm.engine.process import ProcessEngine
from cllm.engine.shards import ShardedEngine
from cllm.errors import InputError
from cllm.models import context_length, eos_token_ids, load_generation_config, load_tokenizer, pad_token_id
from cllm.vllm.arguments import check_config
from cllm.vllm.config import PeerConfig
from cllm.vllm.llm import VllmBackend
from serving.config import AnyModel, CllmModel, VllmModel
from serving.metrics import StepMetrics


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine that is ready.

    Attributes:
        context: tokens of prompt and response together.
        counts_given: penalties count tokens of a response that goes on (`DecodeRequest.num_given`).
    """

    engine: AsyncEngine
    context: int
    counts_given: bool


def check_model(name: str, model: AnyModel) -> None:
    """Refuse before any replica starts what can be told from the settings.

    Raises:
        InputError: settings that contradict each other or the checkpoints.
    """
    if isinstance(model, VllmModel):
        try:
            check_config(_peer_config(model))
        except InputError as error:
            raise InputError(f"models.{name}: {error}") from error


def start_engine(name: str, model: AnyModel) -> StartedEngine:
    """Load the engine that the model's entry names.

    Raises:
        InputError: no usable checkpoint, settings that the engine cannot keep, or vLLM is not installed.
        TimeoutError: it takes longer than `model.start_s`.
    """
    if isinstance(model, VllmModel):
        context = model.options.max_tokens or context_length(model.path, model.revision)
        make: Callable[[], Backend] = partial(_make_vllm, model, context)
    else:
        context = model.options.max_tokens
        make = partial(_make_cllm, model)
    metrics = StepMetrics(name)
    engine = AsyncEngine(make, metrics.observe, metrics.rest)
    engine.wait_ready(model.start_s)
    return StartedEngine(engine, context, counts_given=isinstance(model, CllmModel))


def _make_cllm(model: CllmModel) -> Backend:
    load = partial(
        load_engine,
        model.path,
        model.options,
        revision=model.revision,
        precision=model.precision,
        quantization=model.quantization,
    )
    return ProcessEngine(load) if model.world == 1 else ShardedEngine(load, model.world)


def _make_vllm(model: VllmModel, context: int) -> Backend:
    generation = load_generation_config(model.path, model.revision)
    tokenizer = load_tokenizer(model.path, model.revision)
    more: dict[str, Any] = {"revision": model.revision}
    if model.world > 1:  # vLLM would ask Ray for the other GPUs, but they are this actor's already
        more["distributed_executor_backend"] = "mp"
    config = _peer_config(model)
    known = {
        "max_tokens": context,
        "eos_ids": eos_token_ids(generation, tokenizer),
        "jacobi": config.jacobi.model_copy(update={"pad_id": pad_token_id(tokenizer)}),
    }
    return VllmBackend(config.model_copy(update=known), **more | model.engine_args)


def _peer_config(model: VllmModel) -> PeerConfig:
    """Without a tokenizer: the replica has one, and finds stop texts itself."""
    return PeerConfig(**dict(model.options), model=model.path, gpus=model.world, tokenizer=False)
