"""Documents of other jobs that a report takes in: an ablation's, a judge's."""

import json
from pathlib import Path
from typing import Any

from cllm.ablation import results as ablation
from cllm.bench import judged
from cllm.bench.judged import JudgeResults
from cllm.errors import InputError
from cllm.report.ablation import AblationDocument


def read_ablation(path: Path) -> AblationDocument:
    """Raises InputError if the file is missing or damaged, of another schema version, or without students."""
    data = _read(path, ablation.SCHEMA_VERSION, "jobs/ablate.py")
    document = AblationDocument.from_data(data, where=str(path))
    if not document.rows:
        raise InputError(f"{path}: rows: no students in it")
    return document


def read_judged(path: Path) -> JudgeResults:
    """Raises InputError if the file is missing or damaged, or of another schema version."""
    return JudgeResults.from_data(_read(path, judged.SCHEMA_VERSION, "jobs/judge.py"), where=str(path))


def _read(path: Path, version: int, job: str) -> Any:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != version:
        raise InputError(f"{path}: schema version {found}, this code reads {version}; run {job} again")
    return data
