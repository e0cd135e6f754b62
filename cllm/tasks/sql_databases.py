"""Contents of generated databases: rows from a seed, and the SQLite file that holds them."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cllm.config import digest
from cllm.tasks.sql_files import create_database
from cllm.tasks.sql_schemas import Column, Schema, Table

Value = int | str
Record = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Database:
    """A schema with its rows, by table name. Keys run from 1, so row `k` of a table is at index `k - 1`."""

    schema: Schema
    rows: Mapping[str, tuple[Record, ...]]

    def path(self, folder: Path) -> Path:
        """Where the file belongs. The name carries the content's hash: a file that exists is the right one."""
        content = {table.name: [list(row.items()) for row in self.rows[table.name]] for table in self.schema.tables}
        return folder / f"{self.schema.name}-{digest(content)}.sqlite"


def populate(schema: Schema, seed: str) -> Database:
    """Rows for a schema. The same seed gives the same rows in every process."""
    rng = Random(seed)
    rows: dict[str, tuple[Record, ...]] = {}
    for table in schema.tables:
        # A fifth of the parents stays without children, so that "without" has an answer.
        keys = {parent: rng.sample(range(1, n + 1), max(2, n * 4 // 5)) for parent, n in _sizes(schema, table.parents)}
        labels = {column.name: _labels(column, table.num_rows, rng) for column in table.of_kind("label")}
        rows[table.name] = tuple(_record(table, index, keys, labels, rng) for index in range(table.num_rows))
    return Database(schema, rows)


def write_database(database: Database, path: Path) -> None:
    """Write the SQLite file, atomically, unless it exists.

    Raises:
        InputError: the folder cannot be written.
    """
    if path.exists():
        return
    with create_database(path) as connection:
        connection.execute("BEGIN")
        for table in database.schema.tables:
            _fill(connection, table, database.rows[table.name])


def _sizes(schema: Schema, names: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(name, schema.table(name).num_rows) for name in names]


def _labels(column: Column, num_rows: int, rng: Random) -> list[str]:
    if num_rows <= len(column.pool):
        return rng.sample(column.pool, num_rows)
    return rng.choices(column.pool, k=num_rows)


def _record(
    table: Table, index: int, keys: Mapping[str, list[int]], labels: Mapping[str, list[str]], rng: Random
) -> Record:
    record: dict[str, Value] = {"id": index + 1}
    for column in table.columns:
        if column.kind == "number":
            record[column.name] = rng.choice(column.grid)
        else:
            record[column.name] = labels[column.name][index] if column.kind == "label" else rng.choice(column.pool)
    for parent in table.parents:
        record[f"{parent}_id"] = rng.choice(keys[parent])
    return record


def _fill(connection: sqlite3.Connection, table: Table, rows: tuple[Record, ...]) -> None:
    parts = ["id INTEGER PRIMARY KEY"]
    parts += [f"{column.name} {'INTEGER' if column.kind == 'number' else 'TEXT'} NOT NULL" for column in table.columns]
    parts += [f"{parent}_id INTEGER NOT NULL REFERENCES {parent} (id)" for parent in table.parents]
    connection.execute(f'CREATE TABLE "{table.name}" ({", ".join(parts)})')
    marks = ", ".join("?" * len(table.column_names))
    connection.executemany(f'INSERT INTO "{table.name}" VALUES ({marks})', (tuple(row.values()) for row in rows))
