"""From commits to chunks: however commits are taken together, the response is the same."""

import random
from pathlib import Path

import pytest

from cllm.decoding.records import Commit, SamplingParams, TokenLogprob
from cllm.models import load_tokenizer
from serving.messages import Chunk, Given
from serving.transcript import Transcript

TEXT = "How many singers are there? Höhe: 3 m"


def commits_of(token_ids: list[int], seed: int) -> list[Commit]:
    """Random steps of one to four tokens."""
    chance = random.Random(seed)
    found, start = [], 0
    while start < len(token_ids):
        some = tuple(token_ids[start : start + chance.randint(1, 4)])
        start += len(some)
        scores = tuple(TokenLogprob(-float(token), ()) for token in some)
        found.append(Commit(0, some, "length" if start >= len(token_ids) else None, scores))
    return found


def together(commits: list[Commit], seed: int) -> list[list[Commit]]:
    chance = random.Random(seed)
    groups: list[list[Commit]] = [[]]
    for commit in commits:
        if groups[-1] and chance.random() < 0.5:
            groups.append([])
        groups[-1].append(commit)
    return groups


def chunks_of(transcript: Transcript, groups: list[list[Commit]]) -> list[Chunk]:
    found = []
    for group in groups:
        chunk = transcript.add(group)
        if chunk is not None:
            found.append(chunk)
            if chunk.finish_reason is not None:
                return found
    raise AssertionError("no end")


def joined(chunks: list[Chunk]) -> tuple[object, ...]:
    return (
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.token_ids],
        [count for chunk in chunks for count in chunk.accepted],
        [score for chunk in chunks for score in chunk.scores],
        chunks[-1].finish_reason,
    )


@pytest.mark.parametrize("stop", [(), ("there",), ("re",)])
@pytest.mark.parametrize("given", [0, 3])
@pytest.mark.parametrize("seed", range(8))
def test_steps_may_be_taken_together(model_folder: Path, seed: int, given: int, stop: tuple[str, ...]) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    token_ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    commits = commits_of(token_ids, seed)
    had = Given(tuple(token_ids[:given]), len(tokenizer.decode(token_ids[:given])))

    def run(groups: list[list[Commit]]) -> tuple[object, ...]:
        transcript = Transcript(tokenizer, SamplingParams(stop=stop), 1, had, repeats=bool(given))
        return joined(chunks_of(transcript, groups))

    expected = run([[commit] for commit in commits])
    found = run(together(commits, seed))
    assert found == expected
    text, tokens, accepted, _, reason = expected
    assert sum(accepted) == len(tokens)  # type: ignore[call-overload, arg-type]
    assert stop or text == tokenizer.decode(token_ids[given:])
    assert reason == ("stop" if stop else "length")
