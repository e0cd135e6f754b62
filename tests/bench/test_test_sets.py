"""Other test sets than a run's own: their cells and keys, conversations of two turns, responses for a judge."""

from pathlib import Path
from typing import Any

import pytest

from cllm.bench.matrix import Cell, Platform
from cllm.bench.measure import Workbench
from cllm.bench.plan import Plan, plan
from cllm.bench.prompts import Run, draw_questions, longest_request, second_turns
from cllm.bench.result import CellResult
from cllm.errors import InputError
from cllm.recipe import Recipe
from cllm.tasks.base import JUDGED
from cllm.tasks.mt_bench import MtBenchConfig
from cllm.tasks.prompts import second_turn_id
from cllm.tasks.spec_bench import SpecBenchConfig
from tests.bench.runs import CHATS, make_chat_run, matrix_over, run_of, write_questions

PLATFORM = Platform(device="cpu", threads=1, versions={})
METHODS = [{"kind": "ar"}, {"kind": "jacobi", "window": 4}, {"kind": "transformers"}]
LOAD = {"num_prompts": 8, "speed_prompts": 2, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_chat_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_questions(tmp_path_factory.mktemp("mt_bench"), CHATS)


def plan_over(recipe: Recipe, output: Path, tests: list[dict[str, Any] | None], **changed: Any) -> Plan:
    runs = [run_of(recipe, test=test) for test in tests]
    settings = {"methods": METHODS, "concurrencies": [1, 2], "load": LOAD, "models": ["teacher"]}
    return plan(matrix_over(recipe, output, **settings | {"runs": runs} | changed), PLATFORM)


@pytest.fixture(scope="module")
def measured(
    chat_run: Recipe, source: str, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Cell, CellResult, Run]]:
    found = plan_over(chat_run, tmp_path_factory.mktemp("results"), [{"name": "mt_bench", "source": source}])
    bench = Workbench()
    runs = [(cell, found.runs[cell.run_key]) for cell in found.cells]
    return [(cell, bench.measure(cell, run), run) for cell, run in runs]


def test_a_run_appears_with_several_tasks(chat_run: Recipe, source: str, tmp_path: Path) -> None:
    found = plan_over(chat_run, tmp_path, [None, {"name": "mt_bench", "source": source}])
    assert {(cell.run, cell.task) for cell in found.cells} == {("debug", "synthetic_sql"), ("debug", "mt_bench")}
    assert len({cell.key for cell in found.cells}) == len(found.cells)
    assert len({cell.group[:2] for cell in found.cells}) == 1  # the model is loaded once for both
    assert {str(reason) for reason in found.cannot_run} == {
        "debug teacher transformers generate c=2: decodes one request at a time",
        "debug mt_bench teacher transformers generate c=2: decodes one request at a time",
    }


def test_keys_depend_on_the_test_set_and_its_second_questions(chat_run: Recipe, tmp_path: Path) -> None:
    def keys(name: str, *chats: dict[str, object]) -> set[str]:
        test = {"name": "mt_bench", "source": write_questions(tmp_path / name, chats)}
        return {cell.key for cell in plan_over(chat_run, tmp_path, [test]).cells}

    first, second = dict(CHATS[0]), dict(CHATS[1])
    known = keys("a", first, second)
    assert keys("b", second, first) == known
    assert keys("c", first).isdisjoint(known)
    assert keys("d", first, second | {"turns": ["What is a cell?", "Another question?"]}).isdisjoint(known)


def test_conversations_need_a_chat_template(tiny_run: Recipe, source: str, tmp_path: Path) -> None:
    (reason,) = plan_over(tiny_run, tmp_path, [{"name": "mt_bench", "source": source}]).cannot_run
    assert "two turns need a run with prompts.template=chat" in reason.why
    spec = {"name": "spec_bench", "source": source, "turns": "first"}
    assert {cell.task for cell in plan_over(tiny_run, tmp_path, [spec]).cells} == {"spec_bench"}


def test_prompts_that_are_too_long_are_counted(chat_run: Recipe, tmp_path: Path) -> None:
    long = {"category": "qa", "turns": ["who " * 400]}
    test = {"name": "spec_bench", "source": write_questions(tmp_path / "spec", [{**long, "turns": ["who?"]}, long])}
    found = plan_over(chat_run, tmp_path, [test])
    assert "1 prompts left out: longer than max_prompt_tokens=256" in found.left_out[0].why
    assert not any("left out" in reason.why for reason in found.cannot_run)
    assert found.cells
    (reason,) = plan_over(chat_run, tmp_path, [], runs=[run_of(chat_run, test=test, max_prompt_tokens=4000)]).cannot_run
    assert "max_position_embeddings=512" in reason.why  # prompts that are let in must be readable


def test_a_test_set_that_is_not_there(chat_run: Recipe, tmp_path: Path) -> None:
    (reason,) = plan_over(chat_run, tmp_path, [{"name": "mt_bench", "source": str(tmp_path)}]).cannot_run
    assert str(reason).startswith("debug mt_bench: ")
    assert "no file" in reason.why


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"recipe": "debug"}, {"recipe": "debug"}], "stands there twice"),
        (
            [{"recipe": "debug", "name": "x"}, {"recipe": "demo", "name": "x", "test": {"name": "mt_bench"}}],
            "'x' names two different runs",
        ),
        ([{"recipe": "debug", "max_prompt_tokens": 5}], "max_prompt_tokens is for another test set"),
        ([{"recipe": "debug", "test": {"name": "chess", "source": "x"}}], "runs.0.test"),
    ],
)
def test_bad_runs_name_the_key(tiny_run: Recipe, tmp_path: Path, runs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        matrix_over(tiny_run, tmp_path, runs=runs)


def test_both_turns_are_asked_and_the_second_follows_on_the_models_answer(
    measured: list[tuple[Cell, CellResult, Run]],
) -> None:
    for cell, result, run in measured:
        first = draw_questions(run, cell.load.num_prompts).prompts
        ids = [prompt.prompt_id for prompt in first]
        assert list(result.prompt_ids) == [*ids, *map(second_turn_id, ids)]
        assert len(result.responses) == 2 * len(CHATS)
        later = second_turns(run, first, result.responses[: len(first)], 400)
        for prompt, answer in zip(later, result.responses, strict=False):
            assert f"<assistant>{answer}<user>" in prompt.prompt_text


def test_conversations_give_the_same_tokens_by_every_method(measured: list[tuple[Cell, CellResult, Run]]) -> None:
    assert len(measured) == 2 + 2 + 1
    assert len({result.response_digests for _, result, _ in measured}) == 1


def test_what_a_judge_needs_is_kept_and_no_score_is_made_up(measured: list[tuple[Cell, CellResult, Run]]) -> None:
    for _, result, _ in measured:
        assert (result.metric, result.scores) == (JUDGED, ())
        assert sorted(result.categories) == ["math", "math", "stem", "stem", "writing", "writing"]
        assert result.reference_perplexity is None  # two of the questions have no reference answer


def test_forwards_add_up_to_tokens_a_forward(measured: list[tuple[Cell, CellResult, Run]]) -> None:
    for cell, result, _ in measured:
        assert sum(result.response_tokens) / sum(result.response_forwards) == pytest.approx(result.tpf)
        assert sum(result.response_tokens) / len(result.response_tokens) == result.mean_response_tokens
        if cell.method.kind != "jacobi":
            assert result.response_forwards == result.response_tokens


def test_an_answer_that_does_not_fit_loses_its_end(chat_run: Recipe, source: str) -> None:
    run = Run(chat_run, MtBenchConfig(source=source))
    first = draw_questions(run, 8).prompts
    limit = longest_request(run, first, 10) - 10
    later = second_turns(run, first, ["\ufffd" * 300] * len(first), limit)  # three bytes, so three tokens, each
    assert max(len(prompt.prompt_ids) for prompt in later) <= limit
    assert all("<assistant>\ufffd" in prompt.prompt_text for prompt in later)
    with pytest.raises(InputError, match=r"question\.jsonl:[0-9]: its two questions have [0-9]+ tokens too many"):
        second_turns(run, first, ["x"] * len(first), 5)


def test_rows_without_a_second_turn_are_asked_once(chat_run: Recipe, tmp_path: Path) -> None:
    rows = [{"category": "qa", "turns": ["Who?"]}, {"category": "math", "turns": ["2?", "3?"]}]
    run = Run(chat_run, SpecBenchConfig(source=write_questions(tmp_path, rows)))
    found = draw_questions(run, 8).prompts
    (later,) = second_turns(run, found, ["a", "b"], 400)
    assert later.context["category"] == "mt_bench"
    assert "<user>3?" in later.prompt_text
