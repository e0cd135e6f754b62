"""Refining spans in a packed forward is Jacobi decoding with sliding refill from the same place."""

import random

import pytest
import torch

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import next_tokens
from cllm.decoding.trajectories import Trajectory
from cllm.recipe import OptimConfig
from cllm.training.batches import RowStream
from cllm.training.documents import Document, Span
from cllm.training.forward import PackedObjective, document_losses
from cllm.training.on_policy import Refiner
from cllm.training.packing import assign_rows, pack
from cllm.training.sources import WindowGuess, draw_guessed_spans
from cllm.training.trainer import Trainer
from cllm.training.worker import Worker
from tests.fakes import EOS, PAD, tiny_model
from tests.training.baselines import Fixed

N = 5


def test_refined_spans_are_the_students_next_states():
    model = tiny_model(3)
    guess = WindowGuess("pad", N, PAD)
    prompts = [(4, 5, 6), (7,), (9, 3), (11, 12, 13, 14)]
    results = JacobiDecoder(model, block_size=1, eos_ids=[EOS], pad_id=PAD).generate(
        [DecodeRequest(p, 17) for p in prompts]
    )
    documents = []
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        row = Trajectory(str(i), prompt, result.token_ids, result.finish_reason, ())
        documents.append(Document(prompt, result.token_ids, draw_guessed_spans(row, 3, guess, random.Random(i))))
    assert sum(len(d.spans) for d in documents) > 12
    rows = [[documents[i] for i in row] for row in assign_rows([d.num_tokens for d in documents], 96)]
    refiner, objective = Refiner(2, guess, 0), PackedObjective(model, "forward_kl")
    for _ in range(2):
        expected = [[moved(model, document, span) for span in document.spans] for row in rows for document in row]
        rows = refiner.advance(objective, rows, pack(rows, 96, PAD))
        assert [[(s.start, s.tokens) for s in d.spans] for row in rows for d in row] == [
            [state for state in states if state is not None] for states in expected
        ]


def test_refinement_passes_leave_the_gradient_of_mixed_precision_alone():
    """Autocast keeps the weights that it has cast; those cast without gradient must not serve the training pass."""
    documents = [Document((2, 3), (4, 5, 6, EOS), (Span(0, (7, 8)), Span(1, (9,))))]
    packed = pack([documents], 16, PAD)
    gradients = []
    for passes in (0, 2):
        objective = PackedObjective(tiny_model(5), "forward_kl")
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(passes):
                Refiner(2, WindowGuess("pad", N, PAD), 0).advance(objective, [documents], packed)
            sums = objective(packed)
        (sums.ar + sums.second).backward()
        gradients.append({name: p.grad for name, p in objective.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


def moved(model, document, span):
    """The same by the definition: one unpacked forward, then the window moves behind what is right and refills."""
    prompt, response = document.prompt_ids, document.response_ids
    fed = prompt + response[: span.start] + span.tokens[:-1]
    state = next_tokens(model, fed, len(span.tokens), SamplingParams())
    state += [PAD] * N
    last = len(response) - 1
    for offset in range(len(state)):
        if span.start + offset >= last:
            return None
        if state[offset] != response[span.start + offset]:
            end = min(offset + len(span.tokens), last - span.start)
            return span.start + offset, tuple(state[offset:end])
    return None


def test_the_number_of_iterations_covers_its_range_and_repeats():
    refiner = Refiner(2, WindowGuess("pad", N, PAD), 7)
    drawn = [refiner.iterations_at(step) for step in range(100)]
    assert set(drawn) == {0, 1, 2}
    assert drawn == [refiner.iterations_at(step) for step in range(100)]
    assert drawn != [Refiner(2, WindowGuess("pad", N, PAD), 8).iterations_at(step) for step in range(100)]


def test_validation_is_the_mean_over_all_numbers_of_iterations():
    """Of the loss that training would see, whose divisor is the number of tokens before the refinement."""
    model, guess = tiny_model(5), WindowGuess("pad", N, PAD)
    rows = [[Document((2, 3 + i), (4, 5 + i, 6, 7, EOS), (Span(0, (PAD,) * N), Span(2, (9, 8))))] for i in range(4)]
    trainer = Trainer(
        PackedObjective(model, "forward_kl"),
        RowStream(Fixed(rows[0]), 32, seed=0),
        OptimConfig(steps=1, learning_rate=1e-3, row_tokens=32),
        ar_weight=1.0,
        dtype=torch.float32,
        pad_id=PAD,
        worker=Worker(device=torch.device("cpu")),
        refiner=Refiner(2, guess, 0),
    )
    ar, consistency = trainer.validate(rows)
    sums, drawn = torch.zeros(2), rows
    with torch.no_grad():
        for _ in range(3):
            sums += sum(document_losses(model, d, "forward_kl").stacked for row in drawn for d in row)
            drawn = trainer.refiner.advance(trainer.objective, drawn, pack(drawn, 32, PAD))
    assert ar == pytest.approx(float(sums[0]) / 3 / (4 * 5), rel=1e-4)
    assert consistency == pytest.approx(float(sums[1]) / 3 / (4 * (N + 2)), rel=1e-4)
    plain = Refiner(0, guess, 0)
    trainer.refiner = plain
    assert trainer.validate(rows)[1] != pytest.approx(consistency)
