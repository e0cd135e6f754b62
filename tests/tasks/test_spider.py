"""Spider: the databases built from CSV, the rule for unanswerable questions, and errors that name file, row and key."""

import gzip
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.tasks.base import Example
from cllm.tasks.spider import Spider, SpiderConfig
from cllm.tasks.spider_databases import build_database, read_tables, tables_without_contents

SCHEMA = """-- Dialect: mysql
CREATE TABLE `zoo`.`Animal` (
    `Animal_ID` INT,
    `Name` VARCHAR(20) NOT NULL,
    `Weight` DOUBLE,
    PRIMARY KEY (`Animal_ID`),
    INDEX idx_name (`Name`)
);

CREATE TABLE `zoo`.`visit` (
    `Day` TEXT,
    `Animal_ID` INT,
    FOREIGN KEY (`Animal_ID`) REFERENCES `zoo`.`Animal` (`Animal_ID`)
);
"""
ANIMALS = 'Animal_ID,Name,Weight\n1,"Lea, the lion",150.5\n2,,NULL\n3,null,2\n'
TABLES = [
    {
        "db_id": db_id,
        "table_names_original": ["Animal", "visit"],
        "column_names_original": [
            [-1, "*"],
            [0, "Animal_ID"],
            [0, "Name"],
            [0, "Weight"],
            [1, "Day"],
            [1, "Animal_ID"],
        ],
    }
    for db_id in ("zoo", "lost", "music_2")
]
COUNT = {"db_id": "zoo", "question": " How many animals? ", "query": "SELECT count(*) FROM Animal"}
VISITS = {"db_id": "zoo", "question": "Which days?", "query": "SELECT T1.day FROM VISIT AS T1"}
LOST = {"db_id": "lost", "question": "How many?", "query": "SELECT count(*) FROM Animal"}
KNOWN = LOST | {"db_id": "music_2"}  # of which SpiderMan has no contents


def synonym_row(row: dict[str, str]) -> dict[str, str]:
    return {"db_id": row["db_id"], "SpiderQuestion": row["question"], "SpiderSynQuestion": "?", "query": row["query"]}


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(data).encode()) if path.suffix == ".gz" else json.dumps(data).encode())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "spider"
    data = folder / "databases" / "zoo" / "data"
    data.mkdir(parents=True)
    (data.parent / "schema.sql").write_text(SCHEMA)
    (data / "animal.csv.gz").write_bytes(gzip.compress(ANIMALS.encode()))
    write_json(folder / "tables.json", TABLES)
    write_json(folder / "dev.json.gz", [COUNT, VISITS])
    write_json(folder / "spider_syn" / "train_spider.json.gz", [synonym_row(row) for row in (COUNT, VISITS, LOST)])
    return folder


def load(source: Path, **changes: str) -> tuple[Spider, list[Example]]:
    task = Spider(SpiderConfig(source=str(source), databases=str(source.parent / "built"), **changes))  # type: ignore[arg-type]
    return task, list(task.examples())


def test_rows_become_prompts_with_the_schema(source: Path) -> None:
    _, examples = load(source)
    first = examples[0]
    schema = "Animal ( Animal_ID , Name , Weight ) | visit ( Day , Animal_ID )"
    assert first.turns[0].content == f"{schema}\nHow many animals?\n"
    assert first.response == "SELECT count(*) FROM Animal"
    assert (first.group, first.split) == ("zoo", "train")
    assert first.origin.endswith("train_spider.json.gz:1")


def test_unscorable_questions_leave_test_and_stay_in_train_unless_dropped(source: Path) -> None:
    task, examples = load(source)
    assert [(e.split, e.response) for e in examples if e.split == "test"] == [("test", COUNT["query"])]
    train = [e for e in examples if e.split == "train"]
    assert [bool(e.context) for e in train] == [True, False, False]
    gold = [e.response for e in train]
    assert task.score(gold, gold, [e.context for e in train]) == [1.0, 0.0, 0.0]
    dropping, kept = load(source, without_contents="drop")
    assert [e.response for e in kept if e.split == "train"] == [COUNT["query"]]
    assert task.counts == dropping.counts == {"train_without_contents": 2, "test_without_contents": 1}
    list(task.examples())
    assert task.counts == dropping.counts  # not added up


def test_a_test_question_on_a_missing_database_is_named(source: Path) -> None:
    write_json(source / "dev.json.gz", [COUNT, LOST])
    with pytest.raises(InputError) as error:
        load(source)
    lost = source / "databases" / "lost"
    built = source.parent / "built" / "lost" / "lost.sqlite"
    assert str(error.value) == f"{source / 'dev.json.gz'}:2: db_id lost: there is neither {lost} nor {built}"


def test_questions_on_what_spiderman_lacks_leave_a_test_split_made_of_train_rows(source: Path) -> None:
    rows = [synonym_row(KNOWN | {"question": f"Question {i}?"}) for i in range(40)]
    write_json(source / "spider_syn" / "train_spider.json.gz", [*rows, synonym_row(COUNT)])
    task, examples = load(source, held_out="questions")
    assert task.counts.total() == 40
    assert task.counts["test_without_contents"] == 41 - len(examples) > 0
    lost = [synonym_row(LOST | {"question": f"Question {i}?"}) for i in range(40)]
    write_json(source / "spider_syn" / "train_spider.json.gz", lost)
    with pytest.raises(InputError, match="db_id lost: there is neither"):
        load(source, held_out="questions")


def test_contents_keep_nulls_empty_strings_and_types(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "zoo.sqlite"
    build_database(source / "databases" / "zoo", target)
    with closing(sqlite3.connect(target)) as connection:
        rows = connection.execute("SELECT * FROM Animal ORDER BY Animal_ID").fetchall()
        assert rows == [(1, "Lea, the lion", 150.5), (2, "", None), (3, "null", 2.0)]
        assert connection.execute("SELECT avg(Weight) FROM Animal").fetchone() == (76.25,)
        assert connection.execute("SELECT count(*) FROM visit").fetchone() == (0,)
    assert tables_without_contents(source / "databases" / "zoo") == {"visit"}
    assert read_tables(target) == [("Animal", ["Animal_ID", "Name", "Weight"]), ("visit", ["Day", "Animal_ID"])]
    assert [path.name for path in target.parent.iterdir()] == ["zoo.sqlite"]


def test_an_existing_database_is_not_built_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "zoo.sqlite"
    target.write_bytes(b"as it was")
    build_database(source / "databases" / "zoo", target)
    assert target.read_bytes() == b"as it was"


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("animal.csv", "Animal_ID,Name,Weight\n1,a,2\n1,b,3\n", r"animal\.csv:2: UNIQUE"),
        ("animal.csv", "Animal_ID,Name\n1\n", r"animal\.csv:1: "),
        ("animal.csv", "Animal_ID,Colour\n1,a\n", r"animal\.csv:1: .*Colour"),
        ("keeper.csv", "a\n1\n", r"keeper\.csv: the schema has no such table"),
    ],
)
def test_a_rejected_row_names_file_and_row_and_leaves_no_database(
    source: Path, tmp_path: Path, file: str, text: str, named: str
) -> None:
    data = source / "databases" / "zoo" / "data"
    (data / "animal.csv.gz").unlink()
    (data / file).write_text(text)
    target = tmp_path / "out" / "zoo.sqlite"
    with pytest.raises(InputError, match=named):
        build_database(data.parent, target)
    assert list(target.parent.iterdir()) == []


def test_official_layout_with_existing_databases(source: Path, tmp_path: Path) -> None:
    build_database(source / "databases" / "zoo", tmp_path / "built" / "zoo" / "zoo.sqlite")
    official = tmp_path / "official"
    write_json(official / "train_spider.json", [COUNT])
    write_json(official / "dev.json", [COUNT, VISITS])
    _, examples = load(official)  # without tables.json the schema comes from the database
    assert [e.split for e in examples] == ["train", "test", "test"]
    assert examples[0].turns[0].content.startswith("Animal ( Animal_ID , Name , Weight ) | visit (")


@pytest.mark.parametrize(
    ("file", "data", "named"),
    [
        ("dev.json.gz", [COUNT, {"db_id": "zoo", "question": "?"}], r"dev\.json\.gz:2: no key 'query'"),
        ("dev.json.gz", [{**COUNT, "db_id": 3}], r"dev\.json\.gz:1: db_id: expected str"),
        ("tables.json", [{"db_id": "zoo", "table_names_original": []}], r"tables\.json:1: .*'column_names_original'"),
        ("tables.json", [{**TABLES[0], "column_names_original": [[7, "x"]]}], r"tables\.json:1: .*\[7, 'x'\]"),
        ("tables.json", [], r"tables\.json has no database 'zoo'"),
    ],
)
def test_malformed_data_names_file_row_and_key(source: Path, file: str, data: Any, named: str) -> None:
    write_json(source / file, data)
    with pytest.raises(InputError, match=named) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(source: Path) -> None:
    (source / "dev.json.gz").write_bytes(b"{")
    with pytest.raises(InputError, match=r"dev\.json\.gz"):
        load(source)
    (source / "dev.json.gz").unlink()
    with pytest.raises(InputError, match="dev"):
        load(source)
    (source / "databases" / "zoo" / "schema.sql").unlink()
    with pytest.raises(InputError, match=r"schema\.sql"):
        load(source)


def test_gold_queries_match_themselves_and_changed_ones_do_not(source: Path) -> None:
    rows = [
        "SELECT Name FROM Animal ORDER BY Weight",
        "SELECT Name FROM Animal WHERE Weight > 100",
        "SELECT max(Weight) FROM Animal",
    ]
    questions = [{"db_id": "zoo", "question": f"Question {i}?", "query": query} for i, query in enumerate(rows)]
    write_json(source / "dev.json.gz", questions)
    task, examples = load(source)
    test = [e for e in examples if e.split == "test"]
    gold, contexts = [e.response for e in test], [e.context for e in test]
    assert gold == rows
    assert task.score(gold, gold, contexts) == [1.0] * 3
    changed = [rows[0] + " DESC", rows[1].replace(">", "<"), rows[2].replace("max", "min")]
    assert task.score(changed, gold, contexts) == [0.0] * 3
    assert task.score(gold[1:] + gold[:1], gold, contexts) == [0.0] * 3


@pytest.mark.skipif("CLLM_DATA" not in os.environ, reason="CLLM_DATA does not name a folder that holds spider/")
def test_dev_gold_queries_match_themselves(tmp_path: Path) -> None:
    task, examples = load_real(tmp_path)
    test = [e for e in examples if e.split == "test"]
    gold, contexts = [e.response for e in test], [e.context for e in test]
    assert len(test) == 1026
    assert task.score(gold, gold, contexts) == [1.0] * 1026
    # Without their rows, only queries that return none stay right.
    emptied = [f"SELECT * FROM ({query.rstrip(';')}) LIMIT 0" for query in gold]
    assert sum(task.score(emptied, gold, contexts)) == 1026 - 1005
    # The next other query answers another question. About 3% of them are right all the same: the data holds some
    # queries twice in other words, and others give the same number by chance.
    others = [next(query for query in [*gold[i:], *gold] if query != gold[i]) for i in range(len(gold))]
    assert sum(task.score(others, gold, contexts)) < 0.05 * 1026
    positions = {int(e.origin.rpartition(":")[2]) - 1 for e in test}
    assert set(range(1034)) - positions == {459, 460, 469, 470, 471, 472, 479, 480}
    assert not {e.group for e in test} & {e.group for e in examples if e.split == "train"}


def load_real(tmp_path: Path) -> tuple[Spider, list[Example]]:
    source = Path(os.environ["CLLM_DATA"]) / "spider"
    task = Spider(SpiderConfig(source=str(source), databases=str(tmp_path / "built")))
    return task, list(task.examples())


def test_questions_or_whole_queries_of_train_are_held_out(source: Path) -> None:
    """Forty questions, two for each of twenty queries."""
    rows = [
        synonym_row(COUNT | {"question": f"Question {i}, wording {j}?", "query": f"SELECT {i} FROM Animal"})
        for i in range(20)
        for j in range(2)
    ]
    write_json(source / "spider_syn" / "train_spider.json.gz", rows)
    for held_out, split_queries in (("queries", False), ("questions", True)):
        _, examples = load(source, held_out=held_out)
        test = {e.response for e in examples if e.split == "test"}
        train = {e.response for e in examples if e.split == "train"}
        assert len(examples) == 40
        assert test
        assert bool(test & train) == split_queries
