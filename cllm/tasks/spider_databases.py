"""Spider's databases: built from SpiderMan's MySQL schemas and CSV contents, or described as they exist.

The layout read is `<folder>/<db_id>/schema.sql` and `<folder>/<db_id>/data/<table>.csv[.gz]`; the file written is
`<out>/<db_id>/<db_id>.sqlite`, where Spider's evaluation scripts look for it.
"""

import csv
import gzip
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TextIO

from cllm.errors import InputError
from cllm.tasks.sql_files import create_database

# MySQL alone has indexes inside CREATE TABLE.
_INDEX = re.compile(r",\s*INDEX\b[^,(]*\([^()]*\)", re.IGNORECASE)
_TABLE = re.compile(r"CREATE\s+TABLE\s+(?:`[^`]+`\.)?`([^`]+)`", re.IGNORECASE)

TableColumns = list[tuple[str, list[str]]]  # tables in order, each with its columns


def database_file(folder: Path, db_id: str) -> Path:
    """Where the SQLite file of a database is."""
    return folder / db_id / f"{db_id}.sqlite"


def tables_without_contents(source: Path) -> frozenset[str]:
    """The tables, in lower case, that the schema in `source` declares but whose rows the data set does not have.

    Raises:
        InputError: the schema cannot be read.
    """
    declared = {name.lower() for name in _TABLE.findall(_read_schema(source))}
    return frozenset(declared - _contents(source).keys())


def build_database(source: Path, target: Path) -> None:
    """Build one database, atomically, unless `target` exists. A table without CSV file stays empty.

    The CSV field NULL is SQL NULL and an empty field the empty string; column types apply SQLite's affinities.

    Raises:
        InputError: files missing, malformed, or at odds with the schema (file and row named); or `target` not writable.
    """
    if target.exists():
        return
    schema = _INDEX.sub("", _read_schema(source).replace(f"`{source.name}`.", ""))
    contents = _contents(source)
    with create_database(target) as connection:
        try:
            connection.executescript(schema)
        except sqlite3.Error as error:
            raise InputError(f"{source / 'schema.sql'}: {error}") from error
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        unknown = contents.keys() - {name.lower() for name in names}
        if unknown:
            raise InputError(f"{contents[min(unknown)]}: the schema has no such table")
        connection.execute("BEGIN")
        for name in names:
            if name.lower() in contents:
                _load(connection, name, contents[name.lower()])


def read_tables(database: Path) -> TableColumns:
    """Tables and columns of an existing database.

    Raises:
        InputError: missing, or no database.
    """
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            query = (
                "SELECT t.name, c.name FROM sqlite_master AS t JOIN pragma_table_info(t.name) AS c "
                "WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%' ORDER BY t.rowid, c.cid"
            )
            tables: dict[str, list[str]] = {}
            for table, column in connection.execute(query):
                tables.setdefault(table, []).append(column)
    except sqlite3.Error as error:
        raise InputError(f"{database}: cannot read the database: {error}") from error
    return list(tables.items())


def _read_schema(source: Path) -> str:
    path = source / "schema.sql"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _contents(source: Path) -> dict[str, Path]:
    return {path.name.split(".csv")[0].lower(): path for path in sorted((source / "data").glob("*.csv*"))}


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _load(connection: sqlite3.Connection, table: str, path: Path) -> None:
    origin = str(path)
    try:
        with _open(path) as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            columns = ", ".join(f"`{column}`" for column in header)
            insert = f"INSERT INTO `{table}` ({columns}) VALUES ({', '.join('?' * len(header))})"
            for row_number, fields in enumerate(reader, start=1):
                origin = f"{path}:{row_number}"
                connection.execute(insert, [None if field == "NULL" else field for field in fields])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, sqlite3.Error) as error:
        raise InputError(f"{origin}: {error}") from error
