"""Refining spans in a packed forward is Jacobi decoding with sliding refill from the same place."""

import random

import torch

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import next_tokens
from cllm.decoding.trajectories import Trajectory
from cllm.training.documents import Document, Span
from cllm.training.forward import PackedObjective
from cllm.training.on_policy import Refiner
from cllm.training.packing import assign_rows, pack
from cllm.training.sources import WindowGuess, draw_guessed_spans
from tests.fakes import EOS, PAD, tiny_model

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
        (sums.ar + sums.consistency).backward()
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
    assert torch.is_inference_mode_enabled() is False
