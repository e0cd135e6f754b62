"""The index algebra of Jacobi decoding inside vLLM against our decoder and plain Python. Needs no vLLM."""

import random

import pytest
import torch
from transformers import PreTrainedModel

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.guess import Guesser
from cllm.decoding.records import Commit, DecodeRequest
from cllm.vllm.jacobi import (
    append_predictions,
    next_guesses_BG,
    ngram_guesses_BG,
    prompt_guesses_BG,
    verify,
)
from tests.fakes import tiny_model
from tests.vllm.making import PROMPTS, greedy

WINDOW, COUNT = 6, 24


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Small weights: its answers repeat themselves, so that guesses hold now and then."""
    return tiny_model(0, vocab_size=64, scale=0.05)


class FlatDecoder:
    """Decodes the PROMPTS as vLLM does: flat logits, drafts in slots; rows use every other slot, in reverse."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens = [list(prompt) for prompt in PROMPTS]
        self.slots_B = torch.arange(2 * len(PROMPTS) - 2, -1, -2)
        self.prompts_SL = torch.zeros(2 * len(PROMPTS), 64, dtype=torch.int32)
        for slot, prompt in zip(self.slots_B.tolist(), PROMPTS, strict=True):
            self.prompts_SL[slot, : len(prompt)] = torch.tensor(prompt)
        self.lengths_B = torch.tensor([len(prompt) for prompt in PROMPTS])
        self.drafts_SG = torch.zeros(2 * len(PROMPTS), WINDOW - 1, dtype=torch.long)
        self.drafts_SG[self.slots_B] = self._fresh_BG(self.lengths_B)

    def step(self, widths: list[int]) -> list[tuple[int, ...]]:
        """One step with that many inputs for each row; what it commits."""
        inputs, predictions = [], []
        for tokens, slot, width in zip(self.tokens, self.slots_B.tolist(), widths, strict=True):
            window = tokens[-1:] + self.drafts_SG[slot, : width - 1].tolist()
            logits_LV = self.model(torch.tensor([tokens[:-1] + window])).logits[0]
            inputs += window
            predictions += logits_LV[-width:].argmax(-1).tolist()
        offsets_B1 = torch.tensor([0, *widths]).cumsum(0).int()
        verified = verify(torch.tensor(predictions), torch.tensor(inputs, dtype=torch.int32), offsets_B1, WINDOW)
        fresh_BG = self._fresh_BG(torch.tensor([len(tokens) for tokens in self.tokens]) + verified.counts_B)
        is_first_B = torch.zeros(len(PROMPTS), dtype=torch.bool)
        self.drafts_SG[self.slots_B] = next_guesses_BG(verified, self.drafts_SG[self.slots_B], fresh_BG, is_first_B)
        commits = [
            tuple(row[:n]) for row, n in zip(verified.tokens_BW.tolist(), verified.counts_B.tolist(), strict=True)
        ]
        for tokens, commit in zip(self.tokens, commits, strict=True):
            tokens += commit
        return commits

    def _fresh_BG(self, starts_B: torch.Tensor) -> torch.Tensor:
        positions_BG = starts_B[:, None] + torch.arange(WINDOW - 1)
        return prompt_guesses_BG(self.prompts_SL, self.lengths_B, self.slots_B, torch.zeros(len(PROMPTS)), positions_BG)


@torch.inference_mode()
def test_every_step_commits_what_the_decoder_commits(model: PreTrainedModel) -> None:
    decoder = JacobiDecoder(model, block_size=WINDOW, refill="sliding", eos_ids=[], pad_id=0)
    wanted: list[list[Commit]] = [[] for _ in PROMPTS]
    for commits in decoder.stream(_plain_requests()):
        for commit in commits:
            wanted[commit.row].append(commit)
    flat = FlatDecoder(model)
    steps = [flat.step([WINDOW] * len(PROMPTS)) for _ in range(max(map(len, wanted)))]
    accepted = 0
    for row, commits in enumerate(wanted):
        for step, commit in zip(steps, commits[:-1], strict=False):  # the last is cut at the response's length
            assert step[row] == commit.token_ids
            accepted += len(commit.token_ids) - 1
    assert accepted > 5, "no guess ever held: the test shows nothing"


@torch.inference_mode()
def test_windows_of_any_width_give_the_greedy_answer_and_lose_no_guess(model: PreTrainedModel) -> None:
    """A guess is the latest prediction for its position, or else the random prompt token of that position."""
    draw = random.Random(0)
    flat = FlatDecoder(model)
    latest: list[dict[int, int]] = [{} for _ in PROMPTS]
    for _ in range(COUNT):
        widths = [draw.choice((1, 2, 4, WINDOW)) for _ in PROMPTS]
        before = [list(tokens) for tokens in flat.tokens]
        drafts = flat.drafts_SG.clone()
        flat.step(widths)
        for row, prompt in enumerate(PROMPTS):
            slot = int(flat.slots_B[row])
            window = before[row] + drafts[slot, : widths[row] - 1].tolist()
            predictions = model(torch.tensor([window])).logits[0, -widths[row] :].argmax(-1).tolist()
            latest[row] |= {len(before[row]) + i: token for i, token in enumerate(predictions)}
            start, guesser = len(flat.tokens[row]), Guesser("prompt", prompt, 0, 0)
            places = range(start, start + WINDOW - 1)
            wanted = [latest[row].get(p, guesser.guess(p, 1)[0]) for p in places]
            assert flat.drafts_SG[slot].tolist() == wanted
    for row, request in enumerate(_plain_requests()):
        answer = flat.tokens[row][len(request.prompt_ids) :]
        assert tuple(answer[:COUNT]) == greedy(model, request)


def test_a_row_that_read_its_prompt_forgets_old_guesses() -> None:
    verified = verify(torch.tensor([9]), torch.tensor([3]), torch.tensor([0, 1]), 4)
    old_BG, fresh_BG = torch.tensor([[1, 2, 3]]), torch.tensor([[5, 6, 7]])
    assert verified.counts_B.tolist() == [1]
    assert next_guesses_BG(verified, old_BG, fresh_BG, torch.tensor([True])).tolist() == [[5, 6, 7]]
    assert next_guesses_BG(verified, old_BG, fresh_BG, torch.tensor([False])).tolist() == [[2, 3, 7]]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31 + 7, 2**63 - 1, -(2**63)])
def test_prompt_guesses_are_those_of_the_guesser(seed: int) -> None:
    prompt = tuple(range(100, 137))
    table_SL = torch.zeros(3, 50, dtype=torch.int32)
    table_SL[2, : len(prompt)] = torch.tensor(prompt)
    positions_BG = torch.tensor([[37, 38, 39, 4000, 2**30]])
    found = prompt_guesses_BG(
        table_SL, torch.tensor([len(prompt)]), torch.tensor([2]), torch.tensor([seed]), positions_BG
    )
    wanted = [Guesser("prompt", prompt, 0, seed).guess(p, 1)[0] for p in positions_BG[0].tolist()]
    assert found.tolist() == [wanted]


def test_ngram_guesses_are_those_of_a_search() -> None:
    draw = random.Random(1)
    rows = [[draw.randrange(4) for _ in range(draw.randrange(2, 20))] for _ in range(200)]
    lengths_B = torch.tensor(list(map(len, rows)))
    known_BL = torch.tensor([row + [draw.randrange(4) for _ in range(24 - len(row))] for row in rows])
    found_BG, is_found_B = ngram_guesses_BG(known_BL, lengths_B, 5)
    for row, found, is_found in zip(rows, found_BG.tolist(), is_found_B.tolist(), strict=True):
        wanted = _search(row, 5)
        assert is_found == (wanted is not None)
        assert wanted is None or found == wanted


def test_predictions_are_appended_behind_the_seed() -> None:
    verified = verify(torch.tensor([7, 8, 9]), torch.tensor([3, 7, 4]), torch.tensor([0, 3]), 4)
    known_BL, lengths_B = append_predictions(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]]), torch.tensor([2]), verified)
    assert known_BL.tolist() == [[1, 2, 3, 7, 8, 9, 0, 0]]
    assert lengths_B.tolist() == [6]
    assert verified.counts_B.tolist() == [2]


def _search(row: list[int], count: int) -> list[int] | None:
    for size in (2, 1):
        for end in range(len(row) - 1, size - 1, -1):
            if len(row) >= size and row[end - size : end] == row[-size:]:
                follow = row[end:]
                return [follow[i % len(follow)] for i in range(count)]
    return None


def _plain_requests() -> list[DecodeRequest]:
    return [DecodeRequest(prompt, COUNT) for prompt in PROMPTS]
