"""Execution accuracy of SQL on SQLite, with queries treated as hostile.

A query runs alone on a read-only connection that may read tables and call a fixed list of pure functions, under limits
on time, rows, bytes and memory. Anything else is a `QueryError`, which the scorer turns into 0.
"""

import math
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cllm.errors import InputError

Cell = int | float | str | bytes | None
Row = tuple[Cell, ...]

TIME_LIMIT_S = 5.0
MAX_ROWS = 50_000
MAX_RESULT_BYTES = 32 << 20
HEAP_LIMIT_BYTES = 128 << 20  # of the process's SQLite library: SQLite knows no limit for one connection
PROGRESS_STEPS = 200  # virtual machine instructions between two looks at the clock

_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 32_768,  # bytes of a cell or row, against `s || s` in a loop
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 8_192,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 16,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 256,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
# Pure, cheap and terminating. Left out on purpose: files and code (load_extension, readfile, fts3_tokenizer), memory
# (zeroblob, randomblob, printf, format, hex), chance (random), and the trim family, quadratic in its arguments.
_FUNCTION_NAMES = """
abs avg ceil ceiling coalesce count date datetime dense_rank exp first_value floor glob group_concat ifnull iif instr
julianday lag last_value lead length like ln log lower max min mod nth_value ntile nullif percent_rank pow power rank
replace round row_number sign sqrt strftime substr substring sum time total typeof unixepoch upper
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_OPAQUE = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
_WORD_OR_PAREN = re.compile(r"[()]|\w+")
_REL_TOLERANCE = 1e-6
_ABS_TOLERANCE = 1e-9


class QueryError(Exception):
    """A query that has no result: wrong, forbidden, too slow, or too large."""


@dataclass(frozen=True, slots=True)
class ResultSet:
    """What a query returned. The number of columns tells two empty results apart."""

    num_columns: int
    rows: tuple[Row, ...]


def execute(database: Path, query: str, *, time_limit_s: float = TIME_LIMIT_S, max_rows: int = MAX_ROWS) -> ResultSet:
    """Run one reading statement on a database that it cannot change.

    Args:
        database: the SQLite file; nobody may write to it meanwhile.
        query: exactly one statement.
        time_limit_s: wall-clock seconds.
        max_rows: a result of more rows is an error.

    Raises:
        QueryError: the query fails, is forbidden, is no query, or exceeds a limit.
        InputError: the database is missing or is no database.
    """
    with _connect(database) as connection:
        deadline = time.monotonic() + time_limit_s
        connection.set_progress_handler(lambda: time.monotonic() > deadline, PROGRESS_STEPS)
        connection.set_authorizer(_authorize)
        try:
            return _fetch(connection.execute(query), max_rows)
        except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError) as error:
            raise QueryError(str(error) or type(error).__name__) from error


def execution_match(database: Path, predicted: str, gold: str, *, time_limit_s: float = TIME_LIMIT_S) -> bool:
    """Whether two queries give the same result: as a list if `gold` orders its rows at top level, else as a multiset.

    Columns compare by position, numbers with a relative tolerance of 1e-6. A query without a result matches nothing.

    Raises:
        InputError: the database is missing or is no database.
    """
    return execution_scores([predicted], [gold], [database], time_limit_s=time_limit_s) == [1.0]


def execution_scores(
    predicted: Sequence[str], gold: Sequence[str], databases: Sequence[Path], *, time_limit_s: float = TIME_LIMIT_S
) -> list[float]:
    """1.0 for every row where `execution_match` holds, else 0.0. Neighbouring rows share the gold query's result.

    Raises:
        InputError: a database is missing or is no database.
    """

    @lru_cache(maxsize=16)
    def gold_result(database: Path, query: str) -> ResultSet | None:
        return _result_or_none(database, query, time_limit_s, MAX_ROWS)

    scores = []
    for prediction, reference, database in zip(predicted, gold, databases, strict=True):
        expected = gold_result(database, reference)
        if expected is None:
            scores.append(0.0)
            continue
        found = _result_or_none(database, prediction, time_limit_s, len(expected.rows))
        scores.append(float(found is not None and same_result(found, expected, ordered=orders_rows(reference))))
    return scores


def orders_rows(query: str) -> bool:
    """Whether the query has an ORDER BY outside all parentheses, strings and comments."""
    depth, previous = 0, ""
    for match in _WORD_OR_PAREN.finditer(_OPAQUE.sub(" ", query)):
        word = match.group().lower()
        depth += (word == "(") - (word == ")")
        if depth == 0 and previous == "order" and word == "by":
            return True
        previous = word
    return False


def same_result(found: ResultSet, expected: ResultSet, *, ordered: bool) -> bool:
    """Whether two results are equal, as lists of rows or as multisets."""
    if found.num_columns != expected.num_columns or len(found.rows) != len(expected.rows):
        return False
    left, right = (rows if ordered else sorted(rows, key=_sort_key) for rows in (found.rows, expected.rows))
    return all(_same_cell(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True))


def _result_or_none(database: Path, query: str, time_limit_s: float, max_rows: int) -> ResultSet | None:
    try:
        return execute(database, query, time_limit_s=time_limit_s, max_rows=max_rows)
    except QueryError:
        return None


@contextmanager
def _connect(database: Path) -> Iterator[sqlite3.Connection]:
    try:
        # immutable: no locks and no journal files beside the database, so a read-only folder will do.
        uri = f"{database.resolve().as_uri()}?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise InputError(f"{database}: cannot open the database: {error}") from error
    with closing(connection):
        connection.text_factory = _decode
        try:
            connection.execute("PRAGMA temp_store = MEMORY")  # sorting counts against the heap limit, not the disk
            connection.execute(f"PRAGMA hard_heap_limit = {HEAP_LIMIT_BYTES}")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise InputError(f"{database}: not a readable SQLite database: {error}") from error
        for category, value in _LIMITS.items():
            connection.setlimit(category, value)
        yield connection


def _decode(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def _authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _fetch(cursor: sqlite3.Cursor, max_rows: int) -> ResultSet:
    if cursor.description is None:
        raise QueryError("no query")
    rows: list[Row] = []
    size = 0
    for row in cursor:
        size += sum(len(cell) if isinstance(cell, str | bytes) else 8 for cell in row)
        if len(rows) == max_rows or size > MAX_RESULT_BYTES:
            raise QueryError(f"more than {max_rows} rows or {MAX_RESULT_BYTES} bytes")
        rows.append(row)
    return ResultSet(len(cursor.description), tuple(rows))


def _sort_key(row: Row) -> tuple[tuple[tuple[int, Cell], ...], tuple[tuple[int, Cell], ...]]:
    # Rounded numbers first, so that results which differ in the last digits alone come out in the same order.
    return tuple(map(_rank(_rounded), row)), tuple(map(_rank(lambda number: number), row))


def _rank(number_key: Callable[[int | float], int | float]) -> Callable[[Cell], tuple[int, Cell]]:
    def rank(cell: Cell) -> tuple[int, Cell]:
        if cell is None:
            return 0, 0
        if isinstance(cell, int | float):
            return 1, number_key(cell)
        return (2, cell) if isinstance(cell, str) else (3, cell)

    return rank


def _rounded(number: int | float) -> float:
    return float(f"{number:.6g}")


def _same_cell(a: Cell, b: Cell) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float) and not (isinstance(a, int) and isinstance(b, int)):
        return math.isclose(a, b, rel_tol=_REL_TOLERANCE, abs_tol=_ABS_TOLERANCE)
    return type(a) is type(b) and a == b
