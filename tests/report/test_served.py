"""What serving measures, in the report: read back, shown, and alone a report as well."""

import json
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.report.page import as_markdown
from cllm.report.served import Compared, LoadDocument, OverheadDocument, Spread, read_served
from cllm.report.served_sections import served_sections
from cllm.report.sources import Sources
from jobs.report import report
from tests.bench.records import PROVENANCE

SECONDS = Spread(mean=0.2, p50=0.15, p90=0.3, p95=0.4, p99=0.5, max=0.6)


def load_document(**changes: Any) -> LoadDocument:
    data = {
        "provenance": PROVENANCE, "model": "jacobi", "endpoint": "chat", "rate": None, "concurrency": 32,
        "max_tokens": 128, "temperature": 0.0, "seed": 0, "num_requests": 200, "num_answered": 198,
        "errors": {"HTTP 503": 2}, "refused_with_retry_after": 2, "seconds": 10.0, "tokens": 25_000,
        "tokens_per_s": 2500.0, "requests_per_s": 19.8, "first_token_s": SECONDS, "per_token_s": None,
        "between_chunks_s": SECONDS, "request_s": SECONDS,
    }  # fmt: skip
    return LoadDocument.model_validate(data | changes)


def overhead_document() -> OverheadDocument:
    speed = Compared(engine=2000.0, http=1800.0, http_against_engine=0.9, least=0.85, most=0.93)
    delay = Compared(engine=0.010, http=0.0125, http_against_engine=0.0025, least=0.002, most=0.004)
    settings = {"concurrency": 16, "max_tokens": 128}
    return OverheadDocument(
        provenance=PROVENANCE, model="ar", settings=settings, tokens_per_s=speed, first_token_s=delay, repeats=()
    )


def test_the_sections_show_the_figures() -> None:
    documents = [load_document(), overhead_document(), load_document(rate=4.0, concurrency=None)]
    text = as_markdown("t", (), served_sections(documents, Sources.of(served=documents)))
    assert "| jacobi | chat | 32 clients | 198 of 200 | 2,500 | 150.00 (400.00) | – | 1 |" in text
    assert "| jacobi | chat | 4 requests/s |" in text
    assert "| ar | 16 | 2,000 | 1,800 | 0.900 (0.850–0.930) | 10.00 | 12.50 | 2.50 (2.00–4.00) | 1 |" in text
    assert served_sections([], Sources.of()) == []


def test_documents_alone_are_a_report(tmp_path: Path) -> None:
    (tmp_path / "load-32.json").write_text(load_document().model_dump_json())
    (tmp_path / "overhead.json").write_text(overhead_document().model_dump_json())
    page, text = (path.read_text() for path in report([tmp_path], tmp_path))
    for title in ("Load on the endpoint", "Cost of HTTP and Serve", "Where the figures are from"):
        assert title in page
        assert f"## {title}" in text
    assert "load of jacobi" in text
    assert PROVENANCE["commit"][:12] in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"schema_version": 1}, "schema_version"), ({"kind": "evaluation"}, "kind"), ({"tokens": "many"}, "tokens")],
)
def test_other_documents_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    (tmp_path / "load.json").write_text(json.dumps(load_document().model_dump(mode="json") | changes))
    with pytest.raises(InputError, match=named) as error:
        read_served(tmp_path / "load.json")
    assert "load.json" in str(error.value)
