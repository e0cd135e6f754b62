"""JSON documents that say which version of their schema they have."""

import json
from pathlib import Path
from typing import Any

from cllm.errors import InputError


def read_versioned(path: Path, version: int, *, outdated: str, missing: str) -> Any:
    """A document of that version. The version comes first: fields of another one would only confuse.

    Args:
        outdated, missing: what to do about a document of an earlier version, and about none.

    Raises:
        InputError: no such file, no JSON in it, or another version; with the way out.
    """
    data = read_json(path, missing=missing)
    found = version_of(data)
    if found == version:
        return data
    newer = isinstance(found, int) and found > version
    way = "update this code to read it" if newer else outdated
    raise InputError(f"{path}: schema version {found}, this code reads {version}; {way}")


def read_json(path: Path, *, missing: str) -> Any:
    """Raises InputError: no such file, or no JSON in it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {missing}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error


def version_of(data: Any) -> Any:
    """What a document gives as its version; None if nothing."""
    return data.get("schema_version") if isinstance(data, dict) else None
