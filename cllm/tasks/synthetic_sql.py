"""Text-to-SQL with generated databases, questions and queries: the task that needs no download.

A question determines its query. The splits share no question and no query: in the `shared` variant a hash of database
and query assigns it to one split, in `unseen` every database belongs to one split.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import Field

from cllm.config import Config
from cllm.errors import InputError
from cllm.tasks.base import SPLITS, Example, Split, Turn
from cllm.tasks.sql import TIME_LIMIT_S, execution_scores
from cllm.tasks.sql_databases import Database, populate, write_database
from cllm.tasks.sql_schemas import shared_schemas
from cllm.tasks.sql_shapes import sample_question
from cllm.tasks.sql_vocabulary import random_schema

_BUCKETS = 20  # of these, two hold test queries or databases, one validation, the rest train
_MAX_DRAWS_PER_EXAMPLE = 200


class SyntheticSqlConfig(Config):
    """Which questions to generate.

    `shared`: six databases in all splits, the prompt names the database. `unseen`: `num_databases` random databases,
    each in one split, and the prompt spells out the schema.
    """

    name: Literal["synthetic_sql"] = "synthetic_sql"
    variant: Literal["shared", "unseen"] = "shared"
    num_train: int = Field(60_000, ge=1)
    num_validation: int = Field(1_000, ge=1)
    num_test: int = Field(1_000, ge=1)
    num_databases: int = Field(200, ge=_BUCKETS)  # of the `unseen` variant
    seed: int = 0
    databases: str = "databases"  # folder for the SQLite files, made if missing
    time_limit_s: float = Field(TIME_LIMIT_S, gt=0)  # of one query


class SyntheticSql:
    """The task. Equal configurations give equal examples in every process."""

    name = "synthetic_sql"
    metric = "execution accuracy"

    def __init__(self, config: SyntheticSqlConfig) -> None:
        self.config = config
        self.counts = Counter[str]()
        self._folder = Path(config.databases).absolute()  # contexts travel to workers with other working folders

    def examples(self) -> Iterator[Example]:
        """Examples of train, validation and test, in this order, generated as they are consumed.

        Raises:
            InputError: the databases cannot be written, or there are fewer distinct questions than asked for.
        """
        self._write_databases()
        sizes = (self.config.num_train, self.config.num_validation, self.config.num_test)
        for split, size in zip(SPLITS, sizes, strict=True):
            yield from self._split(split, size)

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """Execution accuracy, 0 or 1 a row. A worker that lacks the database files generates them again.

        Raises:
            InputError: the databases cannot be written.
        """
        self._write_databases()
        databases = [Path(context["database"]) for context in contexts]
        return execution_scores(responses, references, databases, time_limit_s=self.config.time_limit_s)

    @cached_property
    def _databases(self) -> list[tuple[Database, Path]]:
        databases = _shared(self.config) if self.config.variant == "shared" else _unseen(self.config)
        return [(database, database.path(self._folder)) for database in databases]

    def _write_databases(self) -> None:
        for database, path in self._databases:
            write_database(database, path)

    def _split(self, split: Split, size: int) -> Iterator[Example]:
        shared = self.config.variant == "shared"
        rng = Random(f"{self.config.seed}:{split}")
        databases = [item for index, item in enumerate(self._databases) if shared or _split_of(index) == split]
        seen: set[tuple[str, str]] = set()
        for _ in range(size * _MAX_DRAWS_PER_EXAMPLE):
            if len(seen) == size:
                return
            database, path = databases[int(rng.random() * len(databases))]
            name = database.schema.name
            question, query = sample_question(database, rng)
            if (name, question) in seen or (shared and _split_of(zlib.crc32(f"{name}:{query}".encode())) != split):
                continue
            seen.add((name, question))
            yield self._example(database, path, question, query, split, len(seen) - 1)
        if len(seen) < size:
            raise InputError(f"task.num_{split}: {size} asked for, but only {len(seen)} distinct questions were found")

    def _example(self, database: Database, path: Path, question: str, query: str, split: Split, row: int) -> Example:
        shared = self.config.variant == "shared"
        schema = database.schema
        prompt = f"{schema.name}: {question}\n" if shared else f"{schema.linearised()}\n{question}\n"
        return Example(
            turns=(Turn("user", prompt),),
            response=query,
            split=split,
            group=None if shared else schema.name,
            context={"database": str(path)},
            origin=f"synthetic_sql/{split}:{row}",
        )


def _split_of(number: int) -> Split:
    bucket = number % _BUCKETS
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def _shared(config: SyntheticSqlConfig) -> list[Database]:
    return [populate(schema, f"{config.seed}:{schema.name}") for schema in shared_schemas()]


def _unseen(config: SyntheticSqlConfig) -> list[Database]:
    names = [f"db_{index:04d}" for index in range(config.num_databases)]
    schemas = [random_schema(name, Random(f"{config.seed}:{name}:schema")) for name in names]
    return [populate(schema, f"{config.seed}:{schema.name}") for schema in schemas]
