"""A response goes on when its replica is lost: nothing missing, nothing twice, whatever the sampling."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from cllm.decoding.records import SamplingParams
from serving.errors import OverloadedError, ReplicaLostError
from serving.messages import Chunk, GenerateRequest, Given, Responder
from serving.replica import Replica
from serving.retry import RetryingBackend
from tests.serving.running import MODEL_NAME, model_entry

PROMPT = "SELECT"  # by which some steps commit several tokens
NOTHING = Given()
SAMPLINGS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.0, seed=7),
    "stop": SamplingParams(temperature=1.0, seed=7, stop=("GP", "never there")),
    "frequency": SamplingParams(temperature=0.7, seed=1, frequency_penalty=1.5, presence_penalty=0.5),
    "repetition": SamplingParams(repetition_penalty=1.5, min_tokens=20),
    "min_tokens": SamplingParams(temperature=1.0, seed=7, stop=("GP",), min_tokens=39),
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


class CrowdedBackend:
    """A real replica that is lost after two chunks; whoever comes afterwards finds the queue full so many times."""

    def __init__(self, replica: Replica, refusals: int) -> None:
        self._replica = replica
        self._refusals = refusals
        self.asked: list[Given] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request.given)
        if 1 < len(self.asked) <= 1 + self._refusals:
            raise OverloadedError("full")
        count = 0
        async for chunk in self._replica.generate(request):
            if count == 2 and len(self.asked) == 1:
                raise ReplicaLostError("lost")
            yield chunk
            count += 1


def collect(backend: Responder, sampling: SamplingParams, given: Given = NOTHING) -> list[Chunk]:
    async def run() -> list[Chunk]:
        request = GenerateRequest("r", PROMPT, 40, sampling, 0.0, given)
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
    survived = collect(RetryingBackend(losing, attempts=2, resume_s=60), sampling)
    whole = collect(replica, sampling)
    assert joined(survived) == joined(whole)
    assert len(losing.asked) > 1
    assert name != "greedy" or max(len(chunk.token_ids) for chunk in whole) > 1


def test_tokens_that_another_replica_rounded_differently_are_continued_under_penalties(replica: Replica) -> None:
    sampling = SAMPLINGS["frequency"]
    whole = collect(replica, sampling)
    given = Given()
    for chunk in whole[:10]:
        given = given.plus(chunk)
    foreign = replace(given, token_ids=(*given.token_ids[:-1], given.token_ids[-1] ^ 1))
    for tokens, expected in ((given, joined(whole)[0]), (foreign, None)):
        chunks = collect(replica, sampling, given=tokens)
        behind = tuple(token for chunk in chunks for token in chunk.token_ids)
        assert len(tokens.token_ids + behind) == 40
        assert expected in (None, tokens.token_ids + behind)


def test_it_gives_up_after_the_attempts(replica: Replica) -> None:
    losing = LosingBackend(replica, 0)
    with pytest.raises(ReplicaLostError):
        collect(RetryingBackend(losing, attempts=3, resume_s=60), SamplingParams())
    assert len(losing.asked) == 3


def test_a_response_that_has_begun_waits_for_room_in_a_full_queue(replica: Replica) -> None:
    crowded = CrowdedBackend(replica, refusals=3)
    survived = collect(RetryingBackend(crowded, attempts=2, resume_s=60), SamplingParams())
    assert joined(survived) == joined(collect(replica, SamplingParams()))
    assert len(crowded.asked) == 5  # refusals are no losses
    assert len({len(given.token_ids) for given in crowded.asked[1:]}) == 1


def test_it_waits_for_room_only_so_long(replica: Replica) -> None:
    crowded = CrowdedBackend(replica, refusals=1000)
    with pytest.raises(OverloadedError):
        collect(RetryingBackend(crowded, attempts=2, resume_s=0.2), SamplingParams())
    assert 3 <= len(crowded.asked) < 1000


def test_a_full_queue_refuses_at_once_who_has_nothing_yet() -> None:
    class Full:
        asked = 0

        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            self.asked += 1
            raise OverloadedError("full")
            yield

    full = Full()
    with pytest.raises(OverloadedError):
        collect(RetryingBackend(full, attempts=3, resume_s=60), SamplingParams())
    assert full.asked == 1


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

    assert joined(collect(RetryingBackend(Pair(), attempts=2, resume_s=60), SamplingParams())) == joined(
        collect(replica, SamplingParams())
    )
