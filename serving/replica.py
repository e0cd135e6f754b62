"""One replica: an engine and its tokenizer. Knows nothing of HTTP, and of Ray only metrics."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from cllm.decoding.records import DecodeRequest
from cllm.engine.async_engine import EngineStoppedError
from cllm.errors import InputError
from cllm.models import load_tokenizer
from serving.config import AnyModel
from serving.engines import start_engine
from serving.errors import ReplicaLostError
from serving.messages import Chunk, Delivery, GenerateRequest
from serving.metrics import RequestMetrics
from serving.pieces import Pieces
from serving.prompts import encode
from serving.transcript import Transcript
from serving.watchdog import Watchdog

_WHOLE_PAUSE_S = 1.0  # nobody waits for what is sent in between; it is what another replica would go on from


class Replica:
    """Answers requests with the engine that the model's entry names.

    Raises:
        InputError: no usable checkpoint or tokenizer, or settings that the engine cannot keep.
    """

    def __init__(self, name: str, model: AnyModel) -> None:
        self._tokenizer = load_tokenizer(model.path, model.revision)
        started = start_engine(name, model)
        self._engine, self._context, self._counts_given = started.engine, started.context, started.counts_given
        self._metrics = RequestMetrics(name)
        self._pieces = Pieces(self._tokenizer)
        self._watchdog = Watchdog(model.stall_s)
        self._messages_per_s = model.messages_per_s
        self._encoding = ThreadPoolExecutor(1, "encode")  # long prompts would hold up the streams

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Chunks of what the engine's steps commit to the request, delivered as it wants.

        Raises:
            InputError: the request is refused.
            ReplicaLostError: the engine has stopped.
        """
        timer = self._metrics.follow(request.arrived_at, resumed=bool(request.given.token_ids))
        outcome = "aborted"
        try:
            async with aclosing(self._chunks(request)) as chunks:
                async for chunk in chunks:
                    timer.note(chunk)
                    outcome = chunk.finish_reason or outcome
                    yield chunk
        except InputError:
            outcome = "refused"
            raise
        except EngineStoppedError as error:
            outcome = "error"
            raise ReplicaLostError(str(error)) from error
        except Exception:
            outcome = "error"
            raise
        finally:
            timer.end(outcome)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here.

        Raises:
            RuntimeError: the engine's steps stand still.
            Exception: what ended the engine.
        """
        self._engine.check()
        if self._watchdog.is_stuck(self._engine.steps, self._engine.num_unfinished):
            raise RuntimeError(f"no step for a long time, and {self._engine.num_unfinished} requests wait")

    def num_unfinished(self) -> int:
        """Requests in the engine."""
        return self._engine.num_unfinished

    def close(self) -> None:
        """End the engine."""
        self._engine.close()
        self._encoding.shutdown()

    async def _chunks(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        loop = asyncio.get_running_loop()
        prompt_ids = await loop.run_in_executor(self._encoding, encode, self._tokenizer, request.prompt)
        sampling = request.sampling
        # Penalties count the tokens of the response. An engine that cannot do so in a prompt decodes them again.
        is_penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        repeats = is_penalised and not self._counts_given
        transcript = Transcript(
            self._tokenizer,
            sampling,
            len(prompt_ids),
            request.given,
            repeats=repeats,
            guesses=self._pieces if request.guesses else None,
        )
        decode_request = self._decode_request(request, prompt_ids, () if repeats else request.given.token_ids)
        async with aclosing(self._engine.bursts(decode_request, partial(self._pause_s, request.delivery))) as bursts:
            async for burst in bursts:
                for commits in [[commit] for commit in burst] if request.delivery == "steps" else [burst]:
                    chunk = transcript.add(commits)
                    if chunk is not None:
                        yield chunk
                        if chunk.finish_reason is not None:
                            return

    def _pause_s(self, delivery: Delivery) -> float:
        """Until the next chunk. Turning tokens into a message, sending and writing it cost by the message, and hold up
        the engine's thread: the more streams, the more steps to a chunk."""
        if delivery == "steps":
            return 0.0
        pause_s = self._engine.num_unfinished / self._messages_per_s
        return max(pause_s, _WHOLE_PAUSE_S) if delivery == "whole" else pause_s

    def _decode_request(
        self, request: GenerateRequest, prompt_ids: tuple[int, ...], given: tuple[int, ...]
    ) -> DecodeRequest:
        room = self._context - len(prompt_ids)
        if room < 1:
            raise InputError(f"the prompt has {len(prompt_ids)} tokens, which fill the context of {self._context}")
        max_new_tokens = room if request.max_new_tokens is None else request.max_new_tokens
        sampling = replace(request.sampling, stop=())  # the transcript finds them, off the engine's thread
        return DecodeRequest(prompt_ids + given, max_new_tokens - len(given), sampling, len(given))
