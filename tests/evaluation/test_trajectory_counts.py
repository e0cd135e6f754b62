"""Fast-forwarded and stationary tokens: a trajectory by hand, and against the decoder's own counts."""

import pytest

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import BlockTrajectory, DecodeRequest, DecodeResult
from cllm.evaluation.trajectory_counts import (
    TrajectoryCounts,
    add_counts,
    count_trajectory,
    fast_forwarded,
    stationary_tokens,
)
from tests.fakes import EOS, PAD, tiny_model

# The fixed point is 1 2 3 4 5 6. Wrong tokens are 9.
WORKED = BlockTrajectory(
    (
        (9, 9, 9, 4, 9, 9),  # the guess; its 4 is right by luck
        (1, 9, 9, 4, 9, 6),  # 1 is right for free; 4 and 6 are right behind wrong tokens
        (1, 2, 9, 4, 9, 9),  # 2 follows; 6 is lost again, so it was not stationary then
        (1, 2, 3, 4, 5, 9),  # 3 for free, not confirmed by a right guess; 4 stayed; 5 is right and nothing wrong before
        (1, 2, 3, 4, 5, 6),  # the guesses 4 5 are confirmed, and 6 behind them is right for free
    )
)


def test_worked_trajectory() -> None:
    assert fast_forwarded(WORKED, 6) == [1, 1, 1, 3]
    assert stationary_tokens(WORKED, 6) == [3]


def test_tokens_behind_the_end_do_not_count() -> None:
    assert stationary_tokens(WORKED, 3) == []
    assert fast_forwarded(BlockTrajectory(((7, 8, 9), (1, 8, 9))), 1) == [1]
    assert fast_forwarded(BlockTrajectory(((1, 2, 9), (1, 2, 3))), 2) == [2]


def test_a_token_counts_once_and_a_lucky_guess_counts_as_a_prediction() -> None:
    """2 is right in the guess and in states 1 and 2, always behind a wrong token until the end."""
    block = BlockTrajectory(((8, 8, 2), (1, 8, 2), (1, 5, 2)))
    assert stationary_tokens(block, 3) == [2]


def test_a_guess_that_is_confirmed_at_once_is_fast_forwarded_not_stationary() -> None:
    block = BlockTrajectory(((1, 2, 9), (1, 2, 3)))
    assert stationary_tokens(block, 3) == []
    assert fast_forwarded(block, 3) == [3]


def test_counts_of_a_response_of_two_blocks() -> None:
    """The second block ends after two tokens: its stationary third one lies behind the end."""
    second = BlockTrajectory(((9, 9, 9, 9, 9, 9), (7, 9, 3, 9, 9, 9), (7, EOS, 3, 9, 9, 9)))
    result = DecodeResult((1, 2, 3, 4, 5, 6, 7, EOS), "stop", (1, 1, 1, 3, 1, 1), (WORKED, second))
    counts = count_trajectory(result)
    assert counts == TrajectoryCounts(blocks=2, iterations=6, committed=8, stationary=1)
    assert counts.fast_forwarded == pytest.approx(8 / 6)
    assert counts.stationary_per_block == 0.5
    assert add_counts([counts, counts]) == TrajectoryCounts(4, 12, 16, 2)


@pytest.mark.parametrize("n", [2, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_counts_agree_with_the_decoder(seed: int, n: int) -> None:
    """What is read off the states is what the decoder says that it committed, ends inside blocks included."""
    decoder = JacobiDecoder(
        tiny_model(seed), block_size=n, refill="block", eos_ids=[EOS], pad_id=PAD, record=True, guess="prompt"
    )
    requests = [DecodeRequest((3, 9, 4), 21), DecodeRequest((8,), 30), DecodeRequest((5, 6, 5, 6), 7)]
    for result in decoder.generate(requests):
        lengths = [min(n, len(result.token_ids) - start) for start in range(0, len(result.token_ids), n)]
        read_off = [fast_forwarded(block, size) for block, size in zip(result.trajectory, lengths, strict=True)]
        assert tuple(count for block in read_off for count in block) == result.accepted
