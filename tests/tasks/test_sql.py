"""Execution scoring: what counts as equal, and that hostile queries score 0 and harm nothing."""

import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.errors import InputError
from cllm.tasks.sql import (
    HEAP_LIMIT_BYTES,
    QueryError,
    ResultSet,
    execute,
    execution_match,
    execution_scores,
    orders_rows,
    same_result,
)

GOLD = "SELECT name FROM pet ORDER BY id"
LOOP = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r)"
DOUBLING_CTES = "WITH a0 AS (SELECT 1 AS x)" + "".join(
    f", a{i} AS (SELECT p.x FROM a{i - 1} p, a{i - 1} q)" for i in range(1, 60)
)

HOSTILE = {
    "insert": "INSERT INTO pet VALUES (9, 'z', 1.0)",
    "insert returning": "INSERT INTO pet VALUES (9, 'z', 1.0) RETURNING name",
    "update": "UPDATE pet SET name = 'z'",
    "delete": "DELETE FROM pet",
    "drop": "DROP TABLE pet",
    "create": "CREATE TABLE other (a)",
    "temporary table": "CREATE TEMP TABLE other (a)",
    "attach": "ATTACH 'stolen.sqlite' AS other",
    "detach": "DETACH main",
    "vacuum into": "VACUUM INTO 'stolen.sqlite'",
    "pragma": "PRAGMA user_version",
    "pragma write": "PRAGMA user_version = 7",
    "pragma function": "SELECT name FROM pragma_table_info('pet')",
    "transaction": "BEGIN EXCLUSIVE",
    "load_extension": "SELECT load_extension('libc.so.6')",
    "readfile": "SELECT readfile('/etc/hostname')",
    "fts3_tokenizer": "SELECT fts3_tokenizer('simple')",
    "zeroblob": "SELECT zeroblob(1000000000)",
    "randomblob": "SELECT hex(randomblob(500000000))",
    "printf": "SELECT printf('%.*c', 1000000000, 'x')",
    "doubling string": "WITH RECURSIVE r(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM r) SELECT length(s) FROM r",
    "group_concat": f"{LOOP} SELECT group_concat(i) FROM r",
    "endless rows": f"{LOOP} SELECT i FROM r",
    "endless count": f"{LOOP} SELECT count(*) FROM r",
    "endless sort": f"{LOOP} SELECT i FROM r ORDER BY -i",
    "doubling expressions": f"{DOUBLING_CTES} SELECT x FROM a59",
    "two statements": f"{GOLD}; DELETE FROM pet",
    "deep nesting": "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "long text": "SELECT '" + "x" * 100_000 + "'",
    "null character": "SELECT 1\0",
    "lone surrogate": "SELECT '\ud800'",
    "empty": "",
    "spaces": " \n",
    "comment": "-- nothing",
    "prose": "the answer is 42",
    "unknown table": "SELECT a FROM nowhere",
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "pets # 1?.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT, weight REAL)")
        rows = [(1, "a", 0.1), (2, "b", 0.2), (3, "c", None), (4, "a", 0.3)]
        connection.executemany("INSERT INTO pet VALUES (?, ?, ?)", rows)
        connection.commit()
    return path


def match(database: Path, predicted: str, gold: str) -> bool:
    return execution_match(database, predicted, gold, time_limit_s=1.0)


@pytest.mark.parametrize("query", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_query_scores_zero_and_changes_nothing(
    database: Path, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(database.parent)
    before = database.read_bytes()
    with pytest.raises(QueryError):
        execute(database, query, time_limit_s=0.3)
    assert execution_scores([query, GOLD], [GOLD, GOLD], [database, database], time_limit_s=0.3) == [0.0, 1.0]
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.iterdir()] == [database.name]


def test_memory_stays_within_the_heap_limit(database: Path) -> None:
    wide = "WITH RECURSIVE d(k, s) AS (SELECT 1, 'x' UNION ALL SELECT k + 1, s || s FROM d WHERE k < 14), "
    wide += "r(i, s) AS (SELECT 1, s FROM d WHERE k = 14 UNION ALL SELECT i + 1, s FROM r) "
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(QueryError, match="MemoryError"):
        execute(database, wide + "SELECT count(*) FROM (SELECT i, s FROM r ORDER BY s, -i)", time_limit_s=60)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 2 * HEAP_LIMIT_BYTES
    assert len(execute(database, GOLD).rows) == 4  # and the next query has memory again


def test_a_result_larger_than_the_gold_one_is_not_collected(database: Path) -> None:
    with pytest.raises(QueryError, match="more than 3 rows"):
        execute(database, GOLD, max_rows=3)
    assert len(execute(database, GOLD, max_rows=4).rows) == 4


def test_rows_compare_as_a_multiset_unless_gold_orders_them(database: Path) -> None:
    ascending, descending = "SELECT name FROM pet ORDER BY name", "SELECT name FROM pet ORDER BY name DESC"
    assert match(database, descending, "SELECT name FROM pet")
    assert not match(database, descending, ascending)
    assert match(database, "SELECT name FROM pet ORDER BY name, id", ascending)
    assert not match(database, "SELECT DISTINCT name FROM pet", "SELECT name FROM pet")
    assert not match(database, "SELECT name FROM pet WHERE id < 4 UNION ALL SELECT 'b'", "SELECT name FROM pet")


def test_column_order_and_number_matter(database: Path) -> None:
    assert not match(database, "SELECT name, id FROM pet", "SELECT id, name FROM pet")
    nothing = "SELECT id FROM pet WHERE id < 0"
    assert match(database, "SELECT name FROM pet WHERE id > 99", nothing)
    assert not match(database, "SELECT id, name FROM pet WHERE id > 99", nothing)


def test_cells_compare_by_value_and_kind(database: Path) -> None:
    assert match(database, "SELECT 0.1 + 0.2", "SELECT 0.3")
    assert match(database, "SELECT 3", "SELECT 3.0")
    assert not match(database, "SELECT 0.3001", "SELECT 0.3")
    assert not match(database, "SELECT '3'", "SELECT 3")
    assert not match(database, "SELECT NULL", "SELECT 0")
    assert not match(database, "SELECT x'61'", "SELECT 'a'")
    assert not match(database, "SELECT 9007199254740993", "SELECT 9007199254740992")
    assert match(database, "SELECT name FROM pet WHERE weight IS NULL;", "SELECT 'c'")


def test_a_gold_query_without_result_matches_nothing(database: Path) -> None:
    assert not match(database, "SELECT wrong FROM pet", "SELECT wrong FROM pet")


def test_undecodable_text_is_compared_not_refused(database: Path) -> None:
    assert match(database, "SELECT CAST(x'ff' AS TEXT)", "SELECT CAST(x'ff' AS TEXT)")


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n  by a limit 1", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b = 'x ORDER BY y'", False),
        ("SELECT a FROM t WHERE b = ') ORDER BY (' ORDER BY a", True),
        ('SELECT "order by" FROM t -- ORDER BY a', False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
    ],
)
def test_top_level_order_by(query: str, ordered: bool) -> None:
    assert orders_rows(query) is ordered


cells = st.one_of(st.none(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=3))


@given(st.lists(st.tuples(cells, cells), max_size=6), st.randoms(use_true_random=False))
def test_a_permutation_is_the_same_multiset(rows: list[tuple[int | float | str | None, ...]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    left, right = ResultSet(2, tuple(rows)), ResultSet(2, tuple(shuffled))
    assert same_result(left, right, ordered=False)
    assert same_result(left, right, ordered=True) or rows != shuffled


def test_missing_or_broken_database_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.sqlite"):
        execution_scores(["SELECT 1"], ["SELECT 1"], [tmp_path / "gone.sqlite"])
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"this is not a database" * 100)
    with pytest.raises(InputError, match=r"broken\.sqlite"):
        execute(broken, "SELECT 1")
