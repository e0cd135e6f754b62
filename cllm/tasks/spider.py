"""Spider: text-to-SQL over many databases, scored by execution accuracy.

Train is Spider's train set with the original questions, test is its **dev** set (the test set is not public);
validation is carved out of train by database. The contents come from SpiderMan where they are built here, so figures
compare within one set of databases, not with published ones.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cllm.config import Config
from cllm.errors import InputError
from cllm.tasks.base import Example, Split, Turn
from cllm.tasks.source import find_file, read_file, read_rows, require, require_any
from cllm.tasks.spider_databases import (
    TableColumns,
    build_database,
    database_file,
    read_tables,
    tables_without_contents,
)
from cllm.tasks.sql import TIME_LIMIT_S, execution_scores

_HELD_OUT_SHARE = 10  # one query, or question, in so many is held out
_NOT_IN_SPIDERMAN = frozenset({"formula_1", "music_2", "sakila_1"})  # train databases that it has no contents of


class SpiderConfig(Config):
    """Where Spider is.

    `source`: a folder with `dev.json`, `train_spider.json` (there or in `spider_syn/`), `tables.json`, and perhaps
    `databases/` with the contents to build from; or a Hugging Face dataset with `db_id`, `question` and `query`, such
    as "xlangai/spider". JSON files may be gzipped.
    """

    name: Literal["spider"] = "spider"
    source: str
    # Folder of <db_id>/<db_id>.sqlite, on storage that all workers share; missing ones are built. None: in a run
    # `databases` in its output, otherwise in the working folder.
    databases: str | None = None
    # Train rows that read a table or database without contents can be trained on but not scored. They are counted.
    without_contents: Literal["keep", "drop"] = "keep"
    # What test has and train has not. databases: test is the dev set. The others are for teachers from scratch, which
    # learn nothing about unseen schemas: test is a tenth of the train set, by query with all its questions, or by
    # question (easier: train may hold the query, asked for in other words).
    held_out: Literal["databases", "queries", "questions"] = "databases"
    time_limit_s: float = Field(TIME_LIMIT_S, gt=0)  # of one query


class Spider:
    """See `cllm.tasks.base.Task`."""

    name = "spider"
    metric = "execution accuracy"

    def __init__(self, config: SpiderConfig) -> None:
        self._config = config
        self.counts = Counter[str]()
        self._folder = Path(config.source).expanduser()
        self._databases = (
            Path(config.databases or "databases").expanduser().absolute()
        )  # workers have other working folders
        self._schema_text = lru_cache(maxsize=None)(self._describe)
        self._missing = lru_cache(maxsize=None)(self._find_missing)

    def examples(self) -> Iterator[Example]:
        """Train rows, then test rows. Builds the databases that are missing.

        Left out of test, by rule, are questions whose gold query reads a table without contents: it returns nothing,
        so every query that returns nothing would count as right. In SpiderMan's contents these are the eight dev
        questions on `wta_1.rankings` (positions 459, 460, 469-472, 479 and 480 from 0). They are counted, as are train
        rows that cannot be scored. Any other database that a test question asks must be there.

        Raises:
            InputError: files or a database missing, or malformed (file, row and key named).
        """
        self.counts.clear()
        sources: tuple[Split, ...] = ("train", "test") if self._config.held_out == "databases" else ("train",)
        for source in sources:
            for origin, row in self._rows(source):
                example = self._example(row, origin, source)
                if example is not None:
                    yield example

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """Execution accuracy, 0 or 1 a row; 0 for a row whose database has no contents.

        Raises:
            InputError: a database file has gone.
        """
        scorable = [index for index, context in enumerate(contexts) if "database" in context]
        scores = [0.0] * len(responses)
        found = execution_scores(
            [responses[index] for index in scorable],
            [references[index] for index in scorable],
            [Path(contexts[index]["database"]) for index in scorable],
            time_limit_s=self._config.time_limit_s,
        )
        for index, score in zip(scorable, found, strict=True):
            scores[index] = score
        return scores

    def _rows(self, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self._folder.is_dir():
            return read_rows(self._config.source, "train" if split == "train" else "validation")
        if split == "test":
            return read_rows(self._config.source, names=("dev",))
        nested = find_file(self._folder / "spider_syn", "train_spider")
        return read_file(nested) if nested else read_rows(self._config.source, names=("train_spider",))

    def _example(self, row: dict[str, Any], origin: str, split: Split) -> Example | None:
        db_id = require(row, "db_id", str, origin)
        question = require_any(row, ("SpiderQuestion", "question"), str, origin).strip()
        query = require(row, "query", str, origin).strip()
        group = db_id
        if self._config.held_out != "databases":
            held_out = query if self._config.held_out == "queries" else question
            group = f"{db_id}: {' '.join(held_out.split())}"
            split = "test" if zlib.crc32(group.encode()) % _HELD_OUT_SHARE == 0 else "train"
        missing = self._missing(db_id)
        if missing is None and split == "test" and db_id not in _NOT_IN_SPIDERMAN:
            places = f"{self._folder / 'databases' / db_id} nor {database_file(self._databases, db_id)}"
            raise InputError(f"{origin}: db_id {db_id}: there is neither {places}")
        scorable = missing is not None and missing.isdisjoint(re.findall(r"\w+", query.lower()))
        if not scorable:
            self.counts[f"{split}_without_contents"] += 1
            if split == "test" or self._config.without_contents == "drop":
                return None
        return Example(
            turns=(Turn("user", f"{self._schema_text(db_id)}\n{question}\n"),),
            response=query,
            split=split,
            group=group,
            context={"database": str(database_file(self._databases, db_id))} if scorable else {},
            origin=origin,
        )

    def _find_missing(self, db_id: str) -> frozenset[str] | None:
        """The database's tables without contents; None if there is no such database. Builds it if it can."""
        target, source = database_file(self._databases, db_id), self._folder / "databases" / db_id
        if source.is_dir():
            build_database(source, target)
            return tables_without_contents(source)
        return frozenset() if target.exists() else None

    def _describe(self, db_id: str) -> str:
        if self._tables is None:
            tables = read_tables(database_file(self._databases, db_id))
        elif db_id in self._tables:
            tables = self._tables[db_id]
        else:
            raise InputError(f"{self._config.source}: tables.json has no database {db_id!r}")
        return " | ".join(f"{table} ( {' , '.join(columns)} )" for table, columns in tables)

    @cached_property
    def _tables(self) -> dict[str, TableColumns] | None:
        """Tables and columns by database, as SQL must write them; None where the source has no `tables.json`."""
        path = find_file(self._folder, "tables") if self._folder.is_dir() else None
        return None if path is None else dict(_tables_of(row, origin) for origin, row in read_file(path))


def _tables_of(row: dict[str, Any], origin: str) -> tuple[str, TableColumns]:
    names = require(row, "table_names_original", list, origin)
    tables: TableColumns = [(str(name), []) for name in names]
    for entry in require(row, "column_names_original", list, origin):
        match entry:
            case [int(table), str(column)] if table < len(tables):
                if table >= 0:  # -1 is the entry for "*"
                    tables[table][1].append(column)
            case _:
                raise InputError(f"{origin}: column_names_original: expected [table number, name], got {entry!r:.60}")
    return require(row, "db_id", str, origin), tables
