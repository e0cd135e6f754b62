"""The generated text-to-SQL task: determinism, disjoint splits, and gold queries that mean something."""

import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from cllm.errors import InputError
from cllm.tasks.base import Example
from cllm.tasks.sql import execute
from cllm.tasks.sql_databases import populate, write_database
from cllm.tasks.sql_grammar import SOURCE_KINDS, Draw
from cllm.tasks.sql_schemas import shared_schemas
from cllm.tasks.sql_shapes import SHAPES, sample_question
from cllm.tasks.synthetic_sql import SyntheticSql, SyntheticSqlConfig

VARIANTS = ("shared", "unseen")


def config(folder: Path, variant: str, **changes: object) -> SyntheticSqlConfig:
    data = {"variant": variant, "num_train": 1500, "num_validation": 100, "num_test": 300, "databases": str(folder)}
    return SyntheticSqlConfig.from_data(data | changes, where="test")


@pytest.fixture(scope="module", params=VARIANTS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SyntheticSql:
    return SyntheticSql(config(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def examples(task: SyntheticSql) -> list[Example]:
    return list(task.examples())


def database_and_query(example: Example) -> tuple[str, str]:
    return example.context["database"], example.response


def test_splits_have_the_sizes_asked_for_and_share_no_prompt_and_no_query(examples: list[Example]) -> None:
    splits = {name: [e for e in examples if e.split == name] for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1500, "validation": 100, "test": 300}
    prompts = Counter((e.group, e.turns[0].content) for e in examples)
    assert max(prompts.values()) == 1
    queries = {name: set(map(database_and_query, rows)) for name, rows in splits.items()}
    assert not queries["train"] & (queries["test"] | queries["validation"])
    assert not queries["test"] & queries["validation"]


def test_no_database_of_the_unseen_variant_is_in_two_splits(task: SyntheticSql, examples: list[Example]) -> None:
    owners: dict[str | None, set[str]] = {}
    for example in examples:
        owners.setdefault(example.group, set()).add(example.split)
    if task.config.variant == "shared":
        assert set(owners) == {None}
    else:
        assert None not in owners
        assert all(len(splits) == 1 for splits in owners.values())


def test_gold_queries_run_return_rows_and_score_one(task: SyntheticSql, examples: list[Example]) -> None:
    sample = Random(0).sample(examples, 500)
    results = [execute(Path(e.context["database"]), e.response) for e in sample]
    assert sum(bool(result.rows) for result in results) >= 0.9 * len(sample)
    gold = [e.response for e in sample]
    assert task.score(gold, gold, [e.context for e in sample]) == [1.0] * len(sample)


def mutated(query: str) -> str | None:
    """The query with one thing changed: its last number, its comparison, its direction, or its aggregate."""
    swaps = ((" > ", " < "), (" < ", " > "), (" ASC", " DESC"), (" DESC", " ASC"), ("AVG(", "SUM("), ("MIN(", "MAX("))
    swaps += (("NOT IN", "IN"), (" != ", " = "), (" AND ", " OR "), (" >= ", " < "), (" = '", " != '"))
    for old, new in swaps:
        if old in query and "BETWEEN" not in query:
            return query.replace(old, new, 1)
    numbers = list(re.finditer(r"\b\d+\b", re.sub(r"T\d", "TT", query)))
    if not numbers:
        return None
    last = numbers[-1]
    return query[: last.start()] + str(int(last.group()) * 2 + 3) + query[last.end() :]


def test_changed_queries_mostly_score_zero(task: SyntheticSql, examples: list[Example]) -> None:
    pairs = [(e, mutated(e.response)) for e in Random(1).sample(examples, 500)]
    changed = [(e, query) for e, query in pairs if query is not None]
    assert len(changed) > 350
    scores = task.score([q for _, q in changed], [e.response for e, _ in changed], [e.context for e, _ in changed])
    assert sum(scores) < 0.2 * len(scores)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_question_determines_its_query(variant: str, tmp_path: Path) -> None:
    answers: dict[tuple[str, str], str] = {}
    for example in SyntheticSql(config(tmp_path, variant, num_train=8000)).examples():
        key = (example.context["database"], example.turns[0].content.splitlines()[-1])
        assert answers.setdefault(key, example.response) == example.response


def test_numbers_and_words_of_a_query_stand_in_its_question(task: SyntheticSql, examples: list[Example]) -> None:
    for example in examples:
        asked = set(re.findall(r"\w+", example.turns[0].content.splitlines()[-1]))
        values = re.findall(r"'%?(\w+)%?'", example.response)
        values += [
            n for n in re.findall(r"(?<![\w.])\d+", example.response) if not example.response.endswith("LIMIT 1")
        ]
        assert asked.issuperset(values), example


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_runs_with_each_of_its_sources(shape: str, tmp_path: Path) -> None:
    rng, built = Random(3), set()
    for schema in shared_schemas():
        database = populate(schema, "seed")
        path = database.path(tmp_path)
        write_database(database, path)
        for kind in SHAPES[shape].sources:
            for table in filter(SHAPES[shape].fits, schema.tables):
                draw = Draw(database, rng)
                needs_join = SOURCE_KINDS[kind].joins > 0 and SHAPES[shape].needs_parent
                if not needs_join or table.parents:
                    question, query = SHAPES[shape].build(draw, draw.source(SOURCE_KINDS[kind], table))
                    assert question
                    built.add((path, question, query, bool(execute(path, query).rows)))  # raises if it does not run
    assert len(SHAPES) >= 14
    assert len(built) > 10
    assert sum(found for *_, found in built) > len(built) / 2


def test_the_space_of_questions_is_large() -> None:
    database, rng = populate(shared_schemas()[0], "seed"), Random(0)
    questions = {sample_question(database, rng)[0] for _ in range(5000)}
    assert len(questions) > 4200


def test_examples_are_the_same_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from cllm.config import digest; from cllm.tasks.synthetic_sql import *;"
        "sizes = dict(num_train=50, num_validation=5, num_test=5, num_databases=20);"
        "task = SyntheticSql(SyntheticSqlConfig(variant=sys.argv[1], databases=sys.argv[2], **sizes));"
        "print(digest([[e.turns[0].content, e.response, e.split, dict(e.context)] for e in task.examples()]))"
    )
    for variant in VARIANTS:
        runs = [
            subprocess.run(
                [sys.executable, "-c", program, variant, str(tmp_path)],
                env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        ]
        assert runs[0] == runs[1] != ""


def test_examples_are_generated_lazily_and_files_written_once(tmp_path: Path) -> None:
    settings = config(tmp_path / "new" / "folder", "shared", num_train=10**9)
    assert len(list(islice(SyntheticSql(settings).examples(), 5))) == 5
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name.split("-")[0] for file in files] == sorted(schema.name for schema in shared_schemas())
    written = [file.stat().st_mtime_ns for file in files]
    next(iter(SyntheticSql(settings).examples()))
    assert [file.stat().st_mtime_ns for file in files] == written
    next(iter(SyntheticSql(settings.with_overrides(["seed=1"])).examples()))
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 2 * len(files)


def test_score_restores_missing_databases(tmp_path: Path) -> None:
    first = SyntheticSql(config(tmp_path, "shared"))
    example = next(iter(first.examples()))
    for file in tmp_path.iterdir():
        file.unlink()
    contexts = [example.context] * 2
    assert first.score([example.response, "SELECT"], [example.response] * 2, contexts) == [1.0, 0.0]


def test_the_prompt_names_the_database_or_spells_out_the_schema(task: SyntheticSql, examples: list[Example]) -> None:
    for example in examples[:50]:
        prompt = example.turns[0].content
        assert prompt.endswith("\n")
        if task.config.variant == "shared":
            assert prompt.count("\n") == 1
            assert Path(example.context["database"]).name.startswith(prompt.split(":")[0] + "-")
        else:
            tables = {part.split(": ")[0] for part in prompt.split("\n")[0].split(" | ")}
            assert set(re.findall(r"(?:FROM|JOIN) (\w+)", example.response)) <= tables


def test_bad_settings_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        next(iter(SyntheticSql(config(tmp_path / "file", "shared")).examples()))
    with pytest.raises(InputError, match="num_train"):
        config(tmp_path, "shared", num_train=0)
