"""What serving measures of itself, as documents: load on an endpoint, and the cost of HTTP and Serve.

`serving/load_test.py` and `serving/overhead.py` write these documents.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cllm.config import Config
from cllm.errors import InputError

SchemaVersion = Literal[2]


class Spread(Config):
    """Seconds over all answered requests."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class LoadDocument(Config):
    """What the clients of one load saw.

    Attributes:
        rate: requests a second of an open loop.
        concurrency: clients of a closed loop.
        errors: how often, by what they were.
        tokens: as the server counted them.
        first_token_s, request_s: from the asking.
        per_token_s: mean of a request, behind its first chunk.
        between_chunks_s: all gaps.
    """

    schema_version: SchemaVersion = 2
    kind: Literal["load"] = "load"
    provenance: Mapping[str, Any]
    model: str
    endpoint: Literal["completions", "chat"]
    rate: float | None
    concurrency: int | None
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool = False  # every answer was made to have `max_tokens` tokens
    num_requests: int
    num_answered: int
    errors: Mapping[str, int]
    refused_with_retry_after: int
    seconds: float
    tokens: int
    tokens_per_s: float
    requests_per_s: float
    first_token_s: Spread | None
    per_token_s: Spread | None
    between_chunks_s: Spread | None
    request_s: Spread | None

    @property
    def loop(self) -> str:
        return f"{self.rate:g} requests/s" if self.concurrency is None else f"{self.concurrency} clients"


class Compared(Config):
    """Medians over the repeats; `http_against_engine` is taken within each, with the least and the most of them."""

    engine: float
    http: float
    http_against_engine: float
    least: float
    most: float


class Figures(Config):
    """Of one way in one repeat: tokens a second under load, median seconds to the first token of a lone request."""

    tokens_per_s: float
    first_token_s: float


class Repeat(Config):
    """Both ways, one right after the other."""

    engine: Figures
    http: Figures


class OverheadDocument(Config):
    """The same requests through HTTP and on the engine itself.

    Attributes:
        tokens_per_s: under load; HTTP against the engine is a quotient.
        first_token_s: of lone requests; HTTP against the engine is a difference.
    """

    schema_version: SchemaVersion = 2
    kind: Literal["overhead"] = "overhead"
    provenance: Mapping[str, Any]
    model: str
    settings: Mapping[str, Any]
    tokens_per_s: Compared
    first_token_s: Compared
    repeats: tuple[Repeat, ...]


ServedDocument = LoadDocument | OverheadDocument


class _AnyDocument(Config):
    document: Annotated[ServedDocument, Field(discriminator="kind")]


def find_served(folder: Path) -> list[Path]:
    """Files of a folder that bear the names of such documents: load*.json and overhead*.json."""
    return sorted(path for pattern in ("load*.json", "overhead*.json") for path in folder.glob(pattern))


def read_served(path: Path) -> ServedDocument:
    """Raises InputError if the file is damaged, of another schema version or of another kind."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    return _AnyDocument.from_data({"document": data}, where=str(path)).document
