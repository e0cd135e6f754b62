"""The overhead program: its arithmetic, the order of its measurements, and the whole of it on a small model."""

import json
from pathlib import Path

import pytest
import yaml

from cllm.errors import InputError
from cllm.report.served import Figures, OverheadDocument, Repeat, read_served
from serving.load_test import Answer, Load
from serving.overhead import Answers, compare_delay, compare_speed, main, measure, read_model, table
from tests.serving.running import model_entry


def repeat(engine: tuple[float, float], http: tuple[float, float]) -> Repeat:
    """Of tokens a second and seconds to the first token."""
    ways = [Figures(tokens_per_s=speed, first_token_s=first) for speed, first in (engine, http)]
    return Repeat(engine=ways[0], http=ways[1])


REPEATS = [
    repeat((100.0, 0.010), (90.0, 0.015)),
    repeat((200.0, 0.020), (190.0, 0.028)),
    repeat((400.0, 0.040), (320.0, 0.043)),
]


def test_quotients_and_differences_are_within_a_repeat() -> None:
    speed, delay = compare_speed(REPEATS), compare_delay(REPEATS)
    assert (speed.engine, speed.http) == (200.0, 190.0)
    assert [speed.least, speed.http_against_engine, speed.most] == pytest.approx([0.8, 0.9, 0.95])  # not 190 / 200
    assert (delay.engine, delay.http) == (0.020, 0.028)
    added = [delay.least, delay.http_against_engine, delay.most]
    assert added == pytest.approx([0.003, 0.005, 0.008])  # not 0.028 - 0.020


def test_the_table_says_the_same() -> None:
    lines = table(compare_speed(REPEATS), compare_delay(REPEATS), 32).splitlines()
    assert "32 requests" in lines[1]
    assert lines[1].endswith("200.0     190.0  90.0% (80.0% to 95.0%)")
    assert lines[2].endswith("20.00     28.00  +5.00 (+3.00 to +8.00)")


class Recorded:
    """A way with known times, which notes when it is gone and with what load."""

    def __init__(self, name: str, log: list[str], speed: float, first_token_s: list[float]) -> None:
        self.name, self.log, self.speed, self.first_token_s = name, log, speed, first_token_s

    def __call__(self, load: Load) -> Answers:
        self.log.append(f"{self.name} {load.concurrency}x{load.num_requests}")
        firsts = [self.first_token_s[i % len(self.first_token_s)] for i in range(load.num_requests)]
        answers = [Answer(1.0, [1.0 + first], load.max_tokens) for first in firsts]
        return answers, load.num_requests * load.max_tokens / self.speed


def loads() -> tuple[Load, Load]:
    return Load("http://x", "m", 12, 10, concurrency=4), Load("http://x", "m", 3, 2, concurrency=1)


def test_the_ways_take_turns_after_a_round_that_does_not_count() -> None:
    log: list[str] = []
    engine, http = Recorded("engine", log, 100.0, [0.1, 0.2, 0.9]), Recorded("http", log, 50.0, [0.5])
    found = measure(engine, http, *loads(), repeats=3)
    assert log[:4] == ["engine 4x4", "engine 1x2", "http 4x4", "http 1x2"]
    order = ["engine", "http", "http", "engine", "engine", "http"]
    assert log[4:] == [f"{name} {load}" for name in order for load in ("4x12", "1x3")]
    assert len(found) == 3
    for one in found:
        assert one.engine.tokens_per_s == pytest.approx(100.0)
        assert one.http.tokens_per_s == pytest.approx(50.0)
        assert one.engine.first_token_s == pytest.approx(0.2)  # the median, not the mean
        assert one.http.first_token_s == pytest.approx(0.5)


def test_a_failed_request_leaves_no_figure() -> None:
    def refused(load: Load) -> Answers:
        return [Answer(0.0, [0.1], 5), Answer(0.0, error="HTTP 503")], 1.0

    with pytest.raises(RuntimeError, match="1 of 2 requests failed, the first with: HTTP 503"):
        measure(refused, refused, *loads(), repeats=1)


def deploy_file(folder: Path, model_folder: Path) -> Path:
    models = {"tiny": model_entry(model_folder).model_dump(mode="json")}
    models["peer"] = {"engine": "vllm", "path": str(model_folder), "options": {"method": "ar"}}
    application = {"name": "a", "import_path": "serving.build:app", "args": {"models": models}}
    (folder / "deploy.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    return folder / "deploy.yaml"


def test_the_models_entry_with_overrides(tmp_path: Path, model_folder: Path) -> None:
    path = deploy_file(tmp_path, model_folder)
    entry = model_entry(model_folder)
    assert read_model(path, "tiny", []) == entry
    assert read_model(path, "tiny", ["options.max_rows=32"]).options.max_rows == 32


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("none", [], "has tiny with our engine"),
        ("peer", [], "has tiny with our engine"),
        ("tiny", ["options.rows=3"], "unknown key 'rows'"),
    ],
)
def test_bad_settings(tmp_path: Path, model_folder: Path, name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_model(deploy_file(tmp_path, model_folder), name, overrides)


@pytest.mark.parametrize("text", [None, "a: [", "a: 3", "[]"])
def test_bad_files(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "deploy.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="--config"):
        read_model(path, "tiny", [])


@pytest.mark.ray
def test_the_program(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('"How many"\n"SELECT"\n')
    output = tmp_path / "overhead.json"
    words = [
        "--config",
        deploy_file(tmp_path, model_folder),
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--model",
        "tiny",
    ]
    counts = ["--concurrency", 3, "--requests", 6, "--lone-requests", 2, "--max-tokens", 20, "--repeats", 2]
    assert main([str(word) for word in [*words, *counts, "--output", output]]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(output.read_text())
    found = read_served(output)
    assert isinstance(found, OverheadDocument)
    assert (found.model, found.settings["concurrency"]) == ("tiny", 3)
    assert str(tmp_path) not in json.dumps(found.settings)
    assert found.provenance["command"][0] == "serving/overhead.py"
    assert len(found.repeats) == 2
    speed, delay = compare_speed(found.repeats), compare_delay(found.repeats)
    assert (found.tokens_per_s, found.first_token_s) == (speed, delay)
    assert table(speed, delay, 3) in "\n".join(lines)
    ways = [way for one in found.repeats for way in (one.engine, one.http)]
    assert all(way.tokens_per_s > 0 and way.first_token_s > 0 for way in ways)
