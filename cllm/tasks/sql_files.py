"""Creating SQLite files atomically."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cllm.errors import InputError


@contextmanager
def create_database(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a new database that appears at `path` when the block ends without error.

    Other processes see no file or all of it; where two create the same file, the last one stays.

    Raises:
        InputError: the folder cannot be written, or SQLite refuses a statement of the block.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                # The rename publishes the file and a crash leaves none, so neither syncing nor a journal is needed.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute("PRAGMA journal_mode = OFF")
                yield connection
                if connection.in_transaction:
                    connection.execute("COMMIT")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"{path}: cannot write the database: {error}") from error
