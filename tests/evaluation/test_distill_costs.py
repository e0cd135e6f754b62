"""Token-forwards by hand, and collection timed on a tiny model: both ways give the same responses."""

import pytest

from cllm.decoding.records import BlockTrajectory
from cllm.engine.collection import collection_engine_config
from cllm.engine.load import build_engine
from cllm.engine.weights import model_from_transformers
from cllm.evaluation.collection_speed import Collector, response_of, spread_by_length, time_collection
from cllm.evaluation.distill_costs import (
    TokenCost,
    compare_lengths,
    compare_on,
    mean_forwards,
    packed_cost,
    packed_cost_of_lengths,
    three_forwards_cost,
)
from cllm.recipe import CollectConfig, LossConfig
from cllm.report.distill_costs import collection_document, comparison_document, costs_text
from cllm.tasks.tokenizer import train_tokenizer
from cllm.training.documents import Document, Span
from tests.evaluation.runs import make_prompt
from tests.fakes import EOS, PAD, tiny_model

PAPER_LOSS = LossConfig()
# A prompt of 3 and a response of 6 tokens; blocks of 4. The second span is the part of a block that can still be wrong.
DOCUMENT = Document((2, 3, 4), (5, 6, 7, 8, 9, EOS), (Span(0, (0, 0, 0, 0)), Span(4, (0,))))


class OneEpoch:
    """A source of given documents."""

    def __init__(self, documents: list[Document]) -> None:
        self._documents = documents

    def documents(self, epoch: int) -> list[Document]:
        return self._documents


def test_three_forwards_reach_to_the_end_of_each_block() -> None:
    """Blocks end at 4 and 8 tokens, the last one beyond the response: 3 * (3 + 4) + 3 * (3 + 8)."""
    assert three_forwards_cost(3, 6, 4) == TokenCost(54, 2, 6)


def test_example_of_the_papers_size() -> None:
    """128 + 256 tokens in blocks of 16: 3 * (16 * 128 + 16 * 136) = 12,672 against 128 + 2 * 256 = 640."""
    both = compare_lengths(128, 256, 16, PAPER_LOSS)
    assert (both.three_forwards.token_forwards, both.packed.token_forwards) == (12_672, 640)
    assert both.ratio == pytest.approx(19.8)
    assert both.ratio_per_noisy_token == pytest.approx(19.8)


@pytest.mark.parametrize(
    ("loss", "tokens", "blocks"),
    [
        (PAPER_LOSS, 3 + 6 + 6, 2),
        (LossConfig(states_per_block=3), 3 + 6 + 18, 6),
        (LossConfig(target="local"), 3 + 6 + 6 + 6, 2),
        (LossConfig(ar_labels="reference"), 2 * (3 + 6) + 6, 2),
        (LossConfig(states_per_block=2, on_policy_iterations=4), 3 * (3 + 6 + 12), 4),
    ],
)
def test_packed_cost_of_lengths(loss: LossConfig, tokens: int, blocks: int) -> None:
    cost = packed_cost_of_lengths(3, 6, 4, loss)
    assert (cost.token_forwards, cost.blocks) == (tokens, blocks)


def test_refinement_makes_half_of_its_limit_in_forwards() -> None:
    """0, 1, 2 and 3 iterations are equally likely: 1.5 before the training pass."""
    assert mean_forwards(LossConfig(on_policy_iterations=3)) == 2.5
    assert mean_forwards(PAPER_LOSS) == 1


def test_packed_rows_cost_their_padding_and_refinement() -> None:
    """Two rows of 32 tokens, three documents of two blocks each; 1 + 2 / 2 forwards."""
    cost = packed_cost([[DOCUMENT, DOCUMENT], [DOCUMENT]], 32, 4, LossConfig(on_policy_iterations=2))
    assert cost == TokenCost(128, 6, 15)
    assert cost.per_block == pytest.approx(128 / 6)


def test_a_span_of_noisy_context_holds_several_blocks() -> None:
    document = Document((2,), (5,) * 9, (Span(0, (0,) * 8), Span(8, (0,))))
    assert packed_cost([[document]], 32, 4, LossConfig(context="noisy")).blocks == 3


def test_comparison_is_over_the_same_responses() -> None:
    """14 tokens a document, two in a row of 32. Without a span nothing is trained, but the row is paid; a document that
    fits into no row costs neither scheme anything."""
    idle = Document((2, 3), (5, EOS))
    too_long = Document((2,) * 40, (5, EOS), (Span(0, (0,)),))
    both = compare_on(OneEpoch([DOCUMENT, DOCUMENT, idle, too_long]), 32, 4, PAPER_LOSS, seed=0)
    assert both.packed == TokenCost(32, 4, 10)
    assert both.three_forwards == TokenCost(108, 4, 12)
    assert both.ratio == pytest.approx(27 / 8)


def test_response_ends_behind_its_end_token_or_at_the_limit() -> None:
    blocks = [BlockTrajectory(((0, 0, 0), (5, 6, 7))), BlockTrajectory(((0, 0, 0), (8, EOS, 9)))]
    assert response_of(blocks, 6, frozenset([EOS])) == (5, 6, 7, 8, EOS)
    assert response_of(blocks, 4, frozenset([EOS])) == (5, 6, 7, 8)


def test_prompts_are_spread_over_the_lengths() -> None:
    prompts = [make_prompt(i, (2,) * (1 + i), (EOS,)) for i in (5, 0, 3, 2, 1, 4)]
    assert [len(prompt.prompt_ids) for prompt in spread_by_length(prompts, 2)] == [2, 5]
    assert len(spread_by_length(prompts, 99)) == 6


def test_collection_is_timed_on_equal_responses_and_reported() -> None:
    """Every response is cut off, so that the job would drop all of them: they count all the same."""
    config = CollectConfig(block_size=4, max_new_tokens=10, batch_size=3, guess="prompt")
    prompts = [make_prompt(i, tuple(range(2, 5 + i)), (EOS,)) for i in range(5)]
    model = tiny_model(3)
    engine = build_engine(
        model_from_transformers(model), collection_engine_config(config, longest_prompt=7), eos_ids=[], pad_id=PAD
    )
    collector = Collector(engine, model, train_tokenizer(["a b"], 280), config, seed=7)
    assert collector.batched(prompts, config) == {}
    speed = time_collection(collector, prompts, num_one_by_one=2, repeats=3)
    assert (speed.num_batched, speed.num_one_by_one, speed.identical) == (5, 2, 1.0)
    assert len(speed.batched.repeats) == len(speed.one_by_one.repeats) == 3
    assert min(speed.batched.spread + speed.one_by_one.spread) > 0
    text = costs_text({"collection": collection_document(speed, 1), "training_tokens": _training()})
    assert "100% of the responses are the same" in text
    assert "| example | paper's | 792 | 40 | 19.8 |" in text
    assert "This run with the recipe's loss: 3.0× (goal 10×: missed): with 30 prompt and 36 response tokens" in text


def _training() -> dict[str, object]:
    row = {"responses": "example", "loss": "paper's"} | comparison_document(compare_lengths(128, 256, 16, PAPER_LOSS))
    lengths = {"prompt": 30.0, "response": 36.0, "blocks": 2.7}
    return {"ratio": 3.0, "goal": 10, "block_size": 16, "mean_lengths": lengths, "rows": [row]}
