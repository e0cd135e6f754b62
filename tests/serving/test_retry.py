"""A response goes on when its replica is lost: nothing missing, nothing twice, whatever the sampling."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from cllm.decoding.records import SamplingParams
from serving.errors import ReplicaLostError
from serving.messages import Backend, Chunk, GenerateRequest, Given
from serving.replica import Replica
from serving.retry import RetryingBackend
from tests.serving.running import MODEL_NAME, model_entry

SAMPLINGS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.0, seed=7),
    "stop": SamplingParams(temperature=1.0, seed=7, stop=("e", "never there")),
    "frequency": SamplingParams(temperature=0.7, seed=1, frequency_penalty=1.5, presence_penalty=0.5),
    "repetition": SamplingParams(repetition_penalty=1.5, min_tokens=20),
    "logprobs": SamplingParams(logprobs=2),
}


class LosingBackend:
    """A real replica that is lost after so many chunks, each time it is asked."""

    def __init__(self, replica: Replica, chunks_each_time: int) -> None:
        self._replica = replica
        self._chunks = chunks_each_time
        self.asked: list[Given] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request.given)
        count = 0
        async for chunk in self._replica.generate(request):
            if count == self._chunks:
                raise ReplicaLostError("lost")
            yield chunk
            count += 1


def collect(backend: Backend, sampling: SamplingParams, max_new_tokens: int = 40) -> list[Chunk]:
    async def run() -> list[Chunk]:
        request = GenerateRequest("r", "How many café", max_new_tokens, sampling, 0.0)
        return [chunk async for chunk in backend.generate(request)]

    return asyncio.run(run())


def joined(chunks: list[Chunk]) -> tuple[object, ...]:
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    scores = [
        (score.text, round(score.logprob, 4), [text for text, _ in score.top])
        for chunk in chunks
        for score in chunk.scores
    ]
    return tokens, "".join(chunk.text for chunk in chunks), scores, chunks[-1].finish_reason


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("chunks_each_time", [1, 3])
def test_a_response_survives_many_losses(replica: Replica, name: str, chunks_each_time: int) -> None:
    sampling = SAMPLINGS[name]
    losing = LosingBackend(replica, chunks_each_time)
    survived = collect(RetryingBackend(losing, attempts=2), sampling)
    assert joined(survived) == joined(collect(replica, sampling))
    assert len(losing.asked) > 1


def test_it_gives_up_after_the_attempts(replica: Replica) -> None:
    losing = LosingBackend(replica, 0)
    with pytest.raises(ReplicaLostError):
        collect(RetryingBackend(losing, attempts=3), SamplingParams())
    assert len(losing.asked) == 3


def test_an_engine_that_stops_is_a_lost_replica(model_folder: Path, replica: Replica) -> None:
    """The other replica is the session's own; the first one's engine ends in the middle of the response."""
    doomed = Replica(MODEL_NAME, model_entry(model_folder))

    class Pair:
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            if request.given.token_ids:
                async for chunk in replica.generate(request):
                    yield chunk
                return
            async for chunk in doomed.generate(request):
                yield chunk
                doomed.close()

    assert joined(collect(RetryingBackend(Pair(), attempts=2), SamplingParams())) == joined(
        collect(replica, SamplingParams())
    )
