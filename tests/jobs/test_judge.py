"""The judge's job against endpoints that speak the protocol: one that always says the same, and our own server."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cllm.bench.judged import judge_files, read_judged
from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import Cell
from cllm.bench.matrix_results import read_records, write_record, write_results
from cllm.bench.methods import ArMethod, JacobiMethod
from cllm.bench.result import CellRecord
from cllm.tasks.base import JUDGED
from cllm.tasks.mt_bench import MtBench, MtBenchConfig
from cllm.tasks.prompts import second_turn_id
from cllm.tasks.splits import example_id
from jobs import judge
from serving.replica import Replica
from tests.bench.records import make_cell, make_record, make_result
from tests.bench.runs import CHATS, write_questions
from tests.serving.running import MODEL_NAME, local_app, model_entry, save_tiny_model, serving_on_a_port


class Endpoint(ThreadingHTTPServer):
    """Answers chat completions with one reply and keeps what it was asked."""

    def __init__(self, reply: str, status: int = 200, refused: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.status = reply, status
        self.refused = refused  # a message with this text is refused with 400
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Endpoint)
        assert self.path == "/v1/chat/completions"
        request = self.rfile.read(int(self.headers["Content-Length"])).decode()
        server.asked.append(json.loads(request))
        status = 400 if server.refused and server.refused in request else server.status
        message = {"role": "assistant", "content": server.reply}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
        why = "too long" if status == 400 else "no such model"
        data = json.dumps(body if status == 200 else {"error": {"message": why}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on the test's output."""


@contextmanager
def endpoint(reply: str, status: int = 200, refused: str = "") -> Iterator[Endpoint]:
    with Endpoint(reply, status, refused) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return write_questions(tmp_path / "mt_bench", CHATS)


@pytest.fixture
def results(tmp_path: Path, questions: str) -> Path:
    """The teacher's and the CLLM's answers to the questions; those to the first one are equal."""
    ids = [example_id("mt_bench", e) for e in MtBench(MtBenchConfig(source=questions)).examples()]
    prompts = (*ids, *map(second_turn_id, ids))

    def record(model: str, **changed: Any) -> CellRecord:
        texts = [f"{'all' if id == prompts[0] else model} answers {id}" for id in prompts]
        counts = {"response_tokens": (4,) * 6, "response_forwards": (4,) * 6, "response_digests": ("x",) * 6}
        result = make_result(
            metric=JUDGED, scores=(), prompt_ids=prompts, responses=texts, categories=("math",) * 6, **counts
        )
        return make_record(make_cell(model=model, task="mt_bench", test="mt_bench", **changed), result)

    folder = tmp_path / "results"
    write_record(folder, make_record())  # another task, which needs no judge
    write_record(folder, record("teacher", method=ArMethod()))
    write_record(folder, record("teacher", method=ArMethod(), concurrency=4))
    write_record(folder, record("cllm", method=JacobiMethod(window=16)))
    write_results(folder, get_matrix("debug"), [])
    return folder


def judged_cells(folder: Path, name: str = "judge.json") -> list[dict[str, Any]]:
    return json.loads((folder / name).read_text())["cells"]


def call(results: Path, url: str, questions: str, *more: str) -> int:
    return judge.main([str(results), "--url", url, "--model", "judge", "--questions", questions, *more])


def test_ratings_by_a_judge_that_always_says_seven(
    results: Path, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint("Good enough.\n[[7]]") as server:
        assert call(results, server.url, questions) == 0
        # Two cells of six turns; where both answered the same in the first turn, it was asked about once.
        assert len(server.asked) == 11
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["scores"] == {"demo teacher ar single": 7.0, "demo cllm jacobi-sliding n=16 single": 7.0}
        assert call(results, server.url, questions) == 0
        assert len(server.asked) == 11  # all replies are there
    written = json.loads((results / "judge.json").read_text())
    assert (written["judge"]["model"], written["judge"]["endpoint"]) == ("judge", server.url)
    assert [(cell["judged"], cell["unparsed"], cell["by_turn"]) for cell in written["cells"]] == [(6, 0, [7, 7])] * 2
    sent = [request["messages"] for request in server.asked]
    assert all(judgment["messages"] in sent for judgment in written["judgments"])
    assert {judgment["reply"] for judgment in written["judgments"]} == {"Good enough.\n[[7]]"}
    assert all(request["temperature"] == 0 for request in server.asked)


def test_a_judge_that_likes_the_first_place_finds_ties(
    results: Path, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint("[[A]]") as server:
        assert call(results, server.url, questions, "--mode", "pairwise") == 0
    (cell,) = json.loads((results / "judge.json").read_text())["cells"]
    assert (cell["wins"], cell["ties"], cell["losses"], cell["unparsed"]) == (0, 6, 0, 0)
    assert len(server.asked) == 2 * 5
    assert "not judged: demo mt_bench teacher ar c=1, pairwise" in capsys.readouterr().out


def test_an_interrupted_job_asks_on(results: Path, questions: str, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint("[[7]]") as server:
        assert call(results, server.url, questions) == 0
        kept = sorted((results / "judgments").iterdir())
        for path in kept[:4]:
            path.unlink()
        assert call(results, server.url, questions) == 0
        assert len(server.asked) == 11 + 4
    kept[0].write_text("half")
    assert call(results, server.url, questions) == 2
    assert "not a readable judgment; remove the file" in capsys.readouterr().err


def test_modes_and_judges_add_up(results: Path, questions: str) -> None:
    with endpoint("[[7]] [[B]]") as server:
        assert call(results, server.url, questions) == 0
        assert call(results, server.url, questions, "--mode", "pairwise") == 0
        assert [(cell["model"], cell["mode"]) for cell in judged_cells(results)] == [
            ("teacher", "single"), ("cllm", "single"), ("cllm", "pairwise"),
        ]  # fmt: skip
        assert call(results, server.url, questions, "--max-tokens", "5") == 0  # another judge, for its replies differ
        assert call(results, server.url, questions) == 0
    first, second = judge_files(results)
    assert (first.name, len(judged_cells(results))) == ("judge.json", 3)
    assert [cell["mode"] for cell in judged_cells(results, second.name)] == ["single"] * 2
    assert {read_judged(path).judge.max_tokens for path in (first, second)} == {1024, 5}


def test_a_student_that_was_trained_again_is_judged_anew(results: Path, questions: str) -> None:
    """Its old cells stay in the folder, under keys that may come first or last."""
    (old,) = [record for record in read_records(results).values() if record.cell.model == "cllm"]
    assert old.result is not None
    texts = tuple(text.replace("cllm", "new") for text in old.result.responses)
    with endpoint("[[7]]") as server:
        assert call(results, server.url, questions) == 0
        for weights in ("a" * 16, "b" * 16, "c" * 16):
            cell = old.cell.model_copy(update={"weights": weights})
            later = {**old.provenance, "time": f"2026-02-0{'abc'.index(weights[0]) + 1}"}
            fields = {"key": cell.fingerprint(), "cell": Cell(**cell.model_dump()), "provenance": later}
            changed = old.model_copy(update=fields | {"result": old.result.model_copy(update={"responses": texts})})
            write_record(results, changed)
            assert call(results, server.url, questions) == 0
            assert [cell["key"] for cell in judged_cells(results) if cell["model"] == "cllm"] == [changed.key]
    said = [json.dumps(request["messages"]) for request in server.asked]
    assert sum("new answers" in text for text in said) == 5  # asked once for all, but for the turn that all share


def test_ratings_of_every_turn_are_kept(results: Path, questions: str) -> None:
    with endpoint("[[7]]", refused="teacher answers") as server:
        assert call(results, server.url, questions) == 0
    teacher, cllm = judged_cells(results)
    assert cllm["ratings"] == [7.0] * 6
    assert sorted(teacher["ratings"], key=str) == [7.0] + [None] * 5


def test_a_message_that_the_endpoint_refuses_has_no_verdict(
    results: Path, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others have; and the next run asks again, for the endpoint may have learnt it."""
    with endpoint("[[7]]", refused="teacher answers") as server:
        assert call(results, server.url, questions) == 0
        assert len(server.asked) == 11
        assert "refused by the endpoint" in capsys.readouterr().out
        teacher, cllm = judged_cells(results)
        assert (teacher["unparsed"], teacher["score"], cllm["unparsed"], cllm["score"]) == (5, 7, 0, 7)
        assert len(list((results / "judgments").iterdir())) == 6
        server.refused = ""
        assert call(results, server.url, questions) == 0
        assert len(server.asked) == 11 + 5
    assert [cell["unparsed"] for cell in judged_cells(results)] == [0, 0]


def test_an_endpoint_that_refuses_everything_is_no_judge(
    results: Path, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint("", status=400) as server:
        assert call(results, server.url, questions) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: judge judge at {server.url}: every message was refused by the endpoint: " in line
    assert not (results / "judge.json").exists()


def test_nonsense_is_counted_and_shown(
    results: Path, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our own server with a tiny random model as the judge."""
    model = save_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4000}))  # a judge reads a lot
    replica = Replica(MODEL_NAME, model_entry(model, options={"max_tokens": 4000, "max_rows": 8}))
    try:
        with serving_on_a_port(local_app({MODEL_NAME: replica})) as server:
            words = [str(results), "--url", f"{server.url}/v1", "--model", MODEL_NAME, "--questions", questions]
            assert judge.main([*words, "--max-tokens", "8"]) == 0
    finally:
        replica.close()
    out = capsys.readouterr().out
    assert out.count("no score: no reply held a verdict; 6 of 6 turns without a verdict") == 2
    assert out.count("no verdict in judgments/") == judge.SHOWN
    assert "... and in 6 others" in out
    assert set(json.loads(out.splitlines()[-1])["scores"].values()) == {None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no score without a judge: give --url and --model"),
        (["--url", "http://127.0.0.1:1/v1"], "there is no score without a judge"),
        (["--url", "localhost", "--model", "x"], "--url localhost: expected http://HOST/v1"),
        (["--url", "http://me:secret@host/v1", "--model", "x"], "must hold no password or key"),
        (["--url", "http://host/v1", "--model", "x", "--workers", "0"], "--workers 0: must be at least 1"),
    ],
)
def test_no_score_without_a_judge(
    results: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge.main([str(results), *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "secret" not in out + err
    assert not (results / "judge.json").exists()


def test_an_endpoint_that_refuses_is_one_line(
    results: Path, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint("", status=404) as server:
        assert call(results, server.url, questions) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: judge judge at {server.url}: ")
    assert "no such model" in line


def test_results_without_responses_or_with_other_questions(
    results: Path, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_questions(tmp_path / "other", CHATS[:1])
    assert call(results, "http://127.0.0.1:1/v1", other) == 2
    assert "has no question with the id" in capsys.readouterr().err
    folder = tmp_path / "plain"
    write_record(folder, make_record())
    write_results(folder, get_matrix("debug"), [])
    assert call(folder, "http://127.0.0.1:1/v1", questions) == 2
    assert "no responses to judge" in capsys.readouterr().err
