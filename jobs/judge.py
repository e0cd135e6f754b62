"""Rate the answers to MT-bench in a benchmark's results with a judge behind an OpenAI-compatible API.

    python jobs/judge.py runs/paper-benchmark --url https://api.openai.com/v1 --model gpt-4o
    python jobs/judge.py RESULTS --questions data/mt_bench --url http://judge:8000/v1 --model NAME --mode pairwise

Single: each answer gets 1 to 10. Pairwise: against the teacher's AR answer, in both orders. Replies are kept in the
folder `judgments` as they come, so a job that was killed asks on where it stopped. `judge.json` holds the scores, the
judge, and every message and reply word for word; a second mode or later cells are added to it, another judge has a file
of its own. What the endpoint refuses, such as a message that is too long, counts as a reply without a verdict, and the
next run asks it again. The last line is one JSON document.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from cllm.artifacts import write_atomic
from cllm.bench.judged import (
    JUDGE_NAME,
    Answers,
    JudgedCell,
    JudgeResults,
    JudgeSettings,
    answers_of,
    baseline_of,
    compared,
    file_of,
    merged,
    rated,
)
from cllm.bench.matrix_results import read_results
from cllm.errors import InputError
from cllm.evaluation.judge import Complete, Judge, Judgment, Mode
from cllm.evaluation.judge_prompts import Message
from cllm.provenance import collect_provenance
from cllm.tasks.mt_bench import MtBenchConfig
from jobs.cli import exit_code_of, print_last_line_json

RESULTS_NAME = JUDGE_NAME
JUDGMENTS_NAME = "judgments"
MODES: tuple[Mode, ...] = ("single", "pairwise")
ATTEMPTS = 5  # for a request that the endpoint refuses for now
SHOWN = 5  # replies without a verdict
REFUSALS = (400, 413, 422)  # HTTP: this message cannot be judged; others may
REFUSED = "refused by the endpoint: "  # what a reply begins with that the endpoint did not give


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    result.add_argument("folder", type=Path, metavar="FOLDER", help="with the results.json of a benchmark")
    result.add_argument("--url", help="of the judge's API, e.g. http://judge:8000/v1")
    result.add_argument("--model", help="of the judge")
    result.add_argument("--key-variable", default="OPENAI_API_KEY", help="environment variable with the API's key")
    result.add_argument("--mode", choices=MODES, nargs="+", default=["single"])
    result.add_argument("--questions", help="MT-bench: a file, a folder or a Hugging Face name")
    result.add_argument("--workers", type=int, default=8, help="requests at a time")
    result.add_argument("--max-tokens", type=int, default=1024, help="of a reply")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; bad input is one line and code 2."""
    arguments = parser().parse_args(argv)
    return exit_code_of(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Raises InputError: no judge, an endpoint that does not answer, or nothing to judge."""
    settings = judge_settings(arguments)
    if arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers}: must be at least 1")
    source = arguments.questions or MtBenchConfig().source
    answers = answers_of(read_results([arguments.folder]), source)
    known = read_judgments(arguments.folder)
    judge = Judge(
        open_judge(settings, os.environ.get(arguments.key_variable, "none")),
        settings.fingerprint(),
        known=known,
        keep=lambda judgment: None if is_refused(judgment) else write_judgment(arguments.folder, judgment),
        workers=arguments.workers,
    )
    print(f"{len(answers)} cells, judged by {settings.title}; {len(known)} replies are there already", flush=True)
    path, earlier = file_of(arguments.folder, settings)
    results = judge_all(judge, answers, arguments.mode, settings)
    check_answered(results)
    results = merged(earlier, results, {ours.record.key for ours in answers})
    write_atomic(path, results.model_dump_json(indent=1))
    show(results)
    scores = {f"{cell.run} {cell.model} {cell.method} {cell.mode}": _figure(cell) for cell in results.cells}
    print_last_line_json({"judge": settings.title, "cells": len(results.cells), "scores": scores})


def judge_settings(arguments: argparse.Namespace) -> JudgeSettings:
    """Raises InputError: there is no judge, or its address holds a password, which results must not."""
    if not arguments.url or not arguments.model:
        raise InputError("there is no score without a judge: give --url and --model")
    address = urlsplit(arguments.url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise InputError(f"--url {arguments.url}: expected http://HOST/v1 or https://HOST/v1")
    if address.username or address.password or address.query:
        raise InputError("--url: results name it, so it must hold no password or key; use --key-variable")
    return JudgeSettings(model=arguments.model, endpoint=arguments.url.rstrip("/"), max_tokens=arguments.max_tokens)


def open_judge(settings: JudgeSettings, key: str) -> Complete:
    """The client of an OpenAI-compatible API.

    Raises:
        InputError: the package openai is not installed.
    """
    try:
        import openai  # here, for no other job needs it
    except ImportError:
        raise InputError("a judge needs the package openai: pip install openai") from None
    client = openai.OpenAI(base_url=settings.endpoint, api_key=key, max_retries=ATTEMPTS - 1)

    def complete(messages: Sequence[Message]) -> str:
        try:
            reply = client.chat.completions.create(
                model=settings.model,
                messages=list(messages),  # type: ignore[arg-type]  # roles are strings here
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
            )
        except openai.OpenAIError as error:
            why = str(error).splitlines()[0]
            if getattr(error, "status_code", None) in REFUSALS:
                return REFUSED + why.replace("[[", "[")  # an error may quote a verdict
            raise InputError(f"judge {settings.title}: {why}") from error
        return (reply.choices[0].message.content or "") if reply.choices else ""

    return complete


def judge_all(judge: Judge, answers: Sequence[Answers], modes: Sequence[Mode], settings: JudgeSettings) -> JudgeResults:
    """Every cell in every mode."""
    cells: list[JudgedCell] = []
    judgments: dict[str, Judgment] = {}
    not_judged: list[str] = []

    def note(cell: JudgedCell, used: Sequence[Judgment]) -> None:
        cells.append(cell)
        judgments.update((judgment.key, judgment) for judgment in used)

    for ours in answers:
        if "single" in modes:
            ratings = judge.rate(ours.conversations)
            note(rated(ours, ratings), ratings.judgments)
        if "pairwise" in modes:
            baseline = baseline_of(ours, answers)
            if baseline is None:
                not_judged.append(
                    f"{ours.record.cell.title}, pairwise: no other AR cell of the teacher to compare with"
                )
                continue
            found = judge.compare(ours.conversations, baseline.conversations)
            note(compared(ours, baseline, found), found.judgments)
    return JudgeResults(
        judge=settings,
        cells=tuple(cells),
        not_judged=tuple(not_judged),
        judgments=tuple(judgments.values()),
        provenance=collect_provenance(sys.argv),
    )


def is_refused(judgment: Judgment) -> bool:
    return judgment.reply.startswith(REFUSED)


def check_answered(results: JudgeResults) -> None:
    """Raises InputError if the endpoint has refused everything: then it is the judge that is wrong, not a message."""
    if results.judgments and all(map(is_refused, results.judgments)):
        raise InputError(f"judge {results.judge.title}: every message was {results.judgments[0].reply}")


def read_judgments(folder: Path) -> list[Judgment]:
    """Replies of earlier runs.

    Raises:
        InputError: a file is damaged.
    """
    found = []
    for path in sorted((folder / JUDGMENTS_NAME).glob("*.json")):
        try:
            found.append(Judgment.model_validate_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable judgment; remove the file") from error
    return found


def write_judgment(folder: Path, judgment: Judgment) -> None:
    """Raises InputError if the disk is full."""
    path = folder / JUDGMENTS_NAME / f"{judgment.key}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, judgment.model_dump_json(indent=1))


def show(results: JudgeResults) -> None:
    """Scores, what has none, and replies without a verdict."""
    for cell in results.cells:
        title = f"{cell.run} {cell.task} {cell.model} {cell.method} ({cell.mode})"
        print(f"{title}: {_words(cell)}; {cell.unparsed} of {cell.judged} turns without a verdict", flush=True)
    for reason in results.not_judged:
        print(f"not judged: {reason}", flush=True)
    replies = {judgment.key: judgment.reply for judgment in results.judgments}
    silent = list(dict.fromkeys(key for cell in results.cells for key in cell.silent))
    for key in silent[:SHOWN]:
        where = "" if replies[key].startswith(REFUSED) else f" in {JUDGMENTS_NAME}/{key}.json"
        print(f"no verdict{where}: {replies[key][:80]!r}", flush=True)
    if len(silent) > SHOWN:
        print(f"... and in {len(silent) - SHOWN} others", flush=True)


def _words(cell: JudgedCell) -> str:
    figure = _figure(cell)
    if figure is None:
        return "no score: no reply held a verdict"
    if cell.mode == "single":
        return f"{figure:.2f} of 10"
    return f"{cell.wins} wins, {cell.ties} ties, {cell.losses} losses against the teacher's AR"


def _figure(cell: JudgedCell) -> float | None:
    return cell.score if cell.mode == "single" else cell.win_rate


if __name__ == "__main__":
    sys.exit(main())
