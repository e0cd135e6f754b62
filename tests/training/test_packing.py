"""One packed forward has the loss and the gradient of the slow per-document twin, for every kind of span."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import DecodeRequest
from cllm.decoding.trajectories import Trajectory
from cllm.recipe import LossConfig
from cllm.training.documents import Document, Span
from cllm.training.forward import document_losses, packed_losses
from cllm.training.masks import attention_mask
from cllm.training.packing import assign_rows, pack, visible_RLL
from cllm.training.sources import draw_spans, make_span
from tests.fakes import EOS, FAMILIES, PAD, tiny_model


def trajectories(model, n=4):
    decoder = JacobiDecoder(model, block_size=n, refill="block", eos_ids=[EOS], pad_id=PAD, record=True)
    rng = random.Random(0)
    prompts = [tuple(rng.choices(range(2, 24), k=rng.randint(1, 9))) for _ in range(8)]
    results = decoder.generate([DecodeRequest(prompt, 18) for prompt in prompts])
    return [Trajectory.from_result(str(i), p, r) for i, (p, r) in enumerate(zip(prompts, results, strict=True))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(target="local", divergence="reverse_kl"),
        LossConfig(context="noisy", schedule="progressive", schedule_window=2, divergence="jsd"),
        LossConfig(context="noisy", target="local", schedule_window=3, states_per_block=2),
    ],
    ids=["global", "local", "noisy-progressive", "noisy-local"],
)
def test_packed_equals_per_document(family, config):
    # two models: spans from one give the other a loss that is far from zero
    rows = trajectories(tiny_model(1, family=family))
    documents = [
        Document(t.prompt_ids, t.response_ids, draw_spans(t, config, random.Random(t.prompt_id))) for t in rows
    ]
    documents.append(Document((5, 6), (7, 8, EOS), learn_response=False))
    assert sum(d.num_consistency_labels for d in documents) > 20

    fast, slow = tiny_model(2, family=family), tiny_model(2, family=family)
    assigned = assign_rows([d.num_tokens for d in documents], 128)
    packed = pack([[documents[i] for i in row] for row in assigned], 128, PAD)
    sums = packed_losses(fast, packed, config.divergence)
    (10 * sums.ar + sums.second).backward()

    total_ar = total_consistency = torch.zeros(())
    for document in documents:
        part = document_losses(slow, document, config.divergence)
        if (loss := 10 * part.ar + part.second).requires_grad:  # the last document has no labels at all
            loss.backward()
        total_ar, total_consistency = total_ar + part.ar.detach(), total_consistency + part.second.detach()

    assert sums.num_ar == sum(d.num_ar_labels for d in documents)
    assert sums.num_second == sum(d.num_consistency_labels for d in documents)
    torch.testing.assert_close(sums.ar.detach(), total_ar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.second.detach(), total_consistency, rtol=1e-4, atol=1e-4)
    assert total_consistency > 1
    for (name, a), (_, b) in zip(fast.named_parameters(), slow.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_flex_mask_equals_dense_mask():
    rows = trajectories(tiny_model(1))
    config = LossConfig(context="noisy", target="local", schedule_window=2)
    documents = [Document(t.prompt_ids, t.response_ids, draw_spans(t, config, random.Random(3))) for t in rows]
    assigned = assign_rows([d.num_tokens for d in documents], 256)
    packed = pack([[documents[i] for i in row] for row in assigned], 256, PAD)
    block_mask = attention_mask(packed, "flex_attention")
    assert isinstance(block_mask, BlockMask)
    index = torch.arange(256)
    for row, visible in enumerate(visible_RLL(packed)):
        flex = block_mask.mask_mod(torch.tensor(row), torch.tensor(0), index[:, None], index[None, :])
        assert torch.equal(flex, visible)


def random_documents(rng, count):
    """Spans of all kinds, and some responses long enough that whole blocks are visible."""

    def tokens(least, most):
        return tuple(rng.choices(range(2, 24), k=rng.randint(least, most)))

    documents = []
    for _ in range(count):
        response = tokens(2, rng.choice((20, 450)))
        spans = []
        for _ in range(rng.randint(0, 6)):
            start = rng.randrange(len(response))
            noisy = tokens(1, 30)[: len(response) - start]
            spans.append(Span(start, noisy, Span(start, noisy[::-1]) if rng.random() < 0.3 else None))
        documents.append(Document(tokens(1, 60), response, tuple(spans), rng.random() < 0.8))
    return documents


@pytest.mark.parametrize("row_tokens", [640, 700])  # a multiple of the block size or not
def test_block_mask_lists_the_blocks_that_something_sees(row_tokens):
    size, num_full = 128, 0
    for seed in range(5):
        documents = [d.fitted(row_tokens) for d in random_documents(random.Random(seed), 12)]
        assigned = assign_rows([d.num_tokens for d in documents], row_tokens)
        packed = pack([[documents[i] for i in row] for row in assigned], row_tokens, PAD)
        missing = -row_tokens % size
        visible = torch.nn.functional.pad(visible_RLL(packed), (0, missing, 0, missing))
        share = visible.unflatten(1, (-1, size)).unflatten(3, (-1, size)).float().mean((2, 4))
        mask = attention_mask(packed, "flex_attention")
        assert mask.seq_lengths == (row_tokens, row_tokens)
        for blocks, num, indices in (
            ((share > 0) & (share < 1), mask.kv_num_blocks, mask.kv_indices),
            (share == 1, mask.full_kv_num_blocks, mask.full_kv_indices),
            (((share > 0) & (share < 1)).mT, mask.q_num_blocks, mask.q_indices),
            ((share == 1).mT, mask.full_q_num_blocks, mask.full_q_indices),
        ):
            listed = torch.zeros_like(blocks)
            for row, line in blocks.sum(-1).nonzero().tolist():
                listed[row, line, indices[row, 0, line, : num[row, 0, line]].long()] = True
            assert torch.equal(num[:, 0], blocks.sum(-1).int())
            assert torch.equal(listed, blocks)
        num_full += int(mask.full_kv_num_blocks.sum())
    assert num_full > 10


def test_visibility_by_hand():
    """Prompt 1 token, response 3, one span of 2 that stands at response positions 1 and 2."""
    packed = pack([[Document((9,), (5, 6, EOS), (Span(1, (7, 8)),))]], 7, PAD)
    assert packed.positions_RL[0].tolist() == [0, 1, 2, 3, 2, 3, 0]
    assert packed.tokens_RL[0].tolist() == [9, 5, 6, EOS, 7, 8, PAD]
    assert packed.ar_T.tolist() == [0, 1, 2]  # their successors are the labels
    assert (packed.student_T.tolist(), packed.teacher_T.tolist()) == ([4, 5], [2, 3])
    sees = [set(row.nonzero().flatten().tolist()) for row in visible_RLL(packed)[0]]
    assert sees == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 4}, {0, 1, 4, 5}, {6}]


def test_spans_leave_out_what_teaches_nothing():
    response = (5, 6, 7, 8, EOS)
    assert make_span(response, 0, (5, 6, 7, 8), (), False) is None
    assert make_span(response, 0, (5, 9, 7, 9), (), False) == Span(1, (9, 7, 9))
    assert make_span(response, 3, (8, 9, 9, 9), (), False) is None  # the end token has no successor
    assert make_span(response, 0, (5, 9, 9, 9), (5, 6, 9, 9), True) == Span(1, (9, 9, 9), Span(1, (6, 9, 9)))
    assert make_span(response, 0, (5, 9, 9, 9), (5, 6, 7, 8), True) == Span(1, (9, 9, 9))


def test_first_fit_loses_only_what_does_not_fit():
    rng = random.Random(1)
    lengths = [rng.randint(1, 140) for _ in range(3000)]
    rows = list(assign_rows(lengths, 128))
    used = sorted(i for row in rows for i in row)
    assert used == [i for i, length in enumerate(lengths) if length <= 128]
    assert all(sum(lengths[i] for i in row) <= 128 for row in rows)
    assert sum(lengths[i] for i in used) / (128 * len(rows)) > 0.95


def test_a_document_that_is_too_long_loses_spans_but_not_its_response():
    document = Document((2, 3), (4, 5, 6, EOS), (Span(0, (7, 8)), Span(1, (9,), Span(1, (8,)))))
    assert document.num_tokens == 10
    assert document.fitted(10) is document
    assert document.fitted(9) == Document((2, 3), (4, 5, 6, EOS), (Span(0, (7, 8)),))
    assert document.fitted(1) == Document((2, 3), (4, 5, 6, EOS))
