r"""What HTTP and Serve cost: the same requests through HTTP and given to the engine itself, in turns.

    python serving/overhead.py --config serving/laptop.yaml --model jacobi --set options.max_rows=32 \
        --prompts prompts.jsonl --output overhead.json

One replica in a Serve application of its own on this machine; both ways use its one engine, in its process, so nothing
differs but the way: HTTP, JSON, tokenizing, Ray's calls, text from tokens. The clients of both are closed loops and ask
greedily. Those of HTTP need a core of their own, or their work counts as overhead. The report is one JSON document, on
the last line of standard output or in --output; a table comes before it.
"""

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import ray
import yaml  # type: ignore[import-untyped]
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema

from cllm.artifacts import write_atomic
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.errors import InputError
from cllm.provenance import collect_provenance
from cllm.report.served import Compared, Figures, OverheadDocument, Repeat
from serving.build import ServedReplica, application
from serving.config import AppConfig, CllmModel
from serving.load_test import Answer, Load, closed_loop, read_prompts, run_load
from serving.prompts import encode

_FIRST_MAX_TOKENS = 16  # where only the first one is timed
Answers = tuple[list[Answer], float]  # and the seconds from the first request to the last token
Way = Callable[[Load], Answers]


class MeasuredReplica(ServedReplica):
    """A replica that can also put requests to its engine by itself."""

    async def measure(self, load: Load, prompts: Sequence[str]) -> Answers:
        """As `serving.load_test.run_load`; tokens in, tokens out."""
        sampling = SamplingParams(temperature=load.temperature, seed=load.seed, ignore_eos=load.ignore_eos)
        known = [DecodeRequest(encode(self._tokenizer, prompt), load.max_tokens, sampling) for prompt in prompts]
        requests = [known[index % len(known)] for index in range(load.num_requests)]
        start = time.perf_counter()
        answers = await closed_loop(partial(self._ask, start), requests, load.concurrency or 1)
        return answers, time.perf_counter() - start

    async def _ask(self, start: float, request: DecodeRequest) -> Answer:
        answer = Answer(time.perf_counter() - start)
        async with aclosing(self._engine.stream(request)) as commits:
            async for commit in commits:
                answer.chunks_at.append(time.perf_counter() - start)
                answer.num_tokens += len(commit.token_ids)
        return answer


def measure(engine: Way, http: Way, busy: Load, lone: Load, repeats: int) -> list[Repeat]:
    """The ways in turns, each first in every other repeat, after a round that does not count."""
    for way in (engine, http):
        _figures(way, replace(busy, num_requests=busy.concurrency or 1), replace(lone, num_requests=2))
    found = []
    for index in range(repeats):
        if index % 2 == 0:
            of_engine = _figures(engine, busy, lone)
            found.append(Repeat(engine=of_engine, http=_figures(http, busy, lone)))
        else:
            of_http = _figures(http, busy, lone)
            found.append(Repeat(engine=_figures(engine, busy, lone), http=of_http))
    return found


def compare_speed(repeats: Sequence[Repeat]) -> Compared:
    """Throughput: quotients within a repeat, so slow drifts cancel."""
    return _compared(repeats, lambda figures: figures.tokens_per_s, lambda http, engine: http / engine)


def compare_delay(repeats: Sequence[Repeat]) -> Compared:
    """Time to the first token: differences within a repeat."""
    return _compared(repeats, lambda figures: figures.first_token_s, lambda http, engine: http - engine)


def _compared(
    repeats: Sequence[Repeat], figure: Callable[[Figures], float], against: Callable[[float, float], float]
) -> Compared:
    pairs = [(figure(repeat.engine), figure(repeat.http)) for repeat in repeats]
    found = [against(http, engine) for engine, http in pairs]
    return Compared(
        engine=median(engine for engine, _ in pairs),
        http=median(http for _, http in pairs),
        http_against_engine=median(found),
        least=min(found),
        most=max(found),
    )


def table(speed: Compared, delay: Compared, concurrency: int) -> str:
    """Two rows: throughput under load, time to the first token of a lone request."""
    rows = [
        ("", "engine", "HTTP", "HTTP against engine (least to most)"),
        (
            f"tokens/s, {concurrency} requests at a time", f"{speed.engine:.1f}", f"{speed.http:.1f}",
            f"{speed.http_against_engine:.1%} ({speed.least:.1%} to {speed.most:.1%})",
        ),
        (
            "ms to the first token, 1 request at a time", f"{1000 * delay.engine:.2f}", f"{1000 * delay.http:.2f}",
            f"{1000 * delay.http_against_engine:+.2f} ({1000 * delay.least:+.2f} to {1000 * delay.most:+.2f})",
        ),
    ]  # fmt: skip
    return "\n".join(f"{name:<44}{engine:>10}{http:>10}  {both}" for name, engine, http, both in rows)


def read_model(path: Path, name: str, overrides: Sequence[str]) -> CllmModel:
    """The model's entry in a file of `serve deploy`.

    Raises:
        InputError: no such file or model, another engine than ours, or an override that does not fit.
    """
    try:
        found = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise InputError(f"--config {path}: not a file for `serve deploy`: {error}") from error
    models = {
        known: model
        for served in found.applications
        for known, model in AppConfig.from_data(served.args, where=str(path)).models.items()
    }
    model = models.get(name)
    if not isinstance(model, CllmModel):
        ours = [known for known, model in models.items() if isinstance(model, CllmModel)]
        raise InputError(f"--model {name}: {path} has {', '.join(ours) or 'no model'} with our engine")
    return model.with_overrides(overrides)


def document(arguments: argparse.Namespace, model: CllmModel, repeats: Sequence[Repeat]) -> OverheadDocument:
    """Settings, figures of each repeat, their summary, provenance."""
    given = model.model_dump(mode="json", exclude={"path", "revision", "replicas"})  # no folders of this machine
    asked = ("requests", "lone_requests", "max_tokens", "concurrency", "ignore_eos")
    return OverheadDocument(
        provenance=collect_provenance(["serving/overhead.py", *arguments.words]),
        model=arguments.model,
        settings={name: getattr(arguments, name) for name in asked} | {"model": given, "environment": serve_settings()},
        tokens_per_s=compare_speed(repeats),
        first_token_s=compare_delay(repeats),
        repeats=tuple(repeats),
    )


def serve_settings() -> dict[str, str]:
    """Variables that choose how Serve runs: its proxy, its threads."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("RAY_SERVE_")}


@contextmanager
def deployed(name: str, model: CllmModel) -> Iterator[tuple[str, serve.handle.DeploymentHandle[MeasuredReplica]]]:
    """URL and handle of one replica, on a Ray that ends with it."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    with socket.create_server(("127.0.0.1", 0)) as free:  # as late as can be: it may be taken in between
        port = free.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        one = model.model_copy(update={"replicas": 1})
        bound = application(AppConfig(models={name: one}), MeasuredReplica)
        serve.run(bound, name="overhead", route_prefix="/")
        yield f"http://127.0.0.1:{port}", serve.get_deployment_handle(name, "overhead")
    finally:
        serve.shutdown()
        ray.shutdown()


async def _measured(
    handle: serve.handle.DeploymentHandle[MeasuredReplica], load: Load, prompts: Sequence[str]
) -> Answers:
    return await handle.measure.remote(load, prompts)


def _figures(way: Way, busy: Load, lone: Load) -> Figures:
    answers, seconds = _complete(way(busy))
    speed = sum(answer.num_tokens for answer in answers) / seconds
    answers, _ = _complete(way(lone))
    return Figures(tokens_per_s=speed, first_token_s=median(answer.first_token_s for answer in answers))


def _complete(found: Answers) -> Answers:
    failed = [answer.error or "no tokens" for answer in found[0] if answer.error or not answer.chunks_at]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found[0])} requests failed, the first with: {failed[0]}")
    return found


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """With `words` themselves, for the provenance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="of `serve deploy`")
    parser.add_argument("--model", required=True, metavar="NAME", help="in that file; one replica, without keys")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="as of serving/load_test.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in the model's entry")
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="for throughput (default 32)")
    parser.add_argument("--requests", type=int, default=256, metavar="N", help="for throughput (default 256)")
    parser.add_argument("--lone-requests", type=int, default=50, metavar="N", help="for the first token (default 50)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer (default 128)")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of --max-tokens tokens")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--output", type=Path, metavar="FILE")
    asked = parser.parse_args(words, argparse.Namespace(words=list(words)))
    for name in ("concurrency", "requests", "lone_requests", "max_tokens", "repeats"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {getattr(asked, name)}")
    return asked


def main(words: Sequence[str]) -> int:
    """The exit code: 0, or 2 for bad input."""
    asked = parse_arguments(words)
    try:
        prompts = read_prompts(asked.prompts)
        model = read_model(asked.config, asked.model, asked.set)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # One loop for all: with RAY_SERVE_THROUGHPUT_OPTIMIZED=1 a handle belongs to the loop that it is first used in.
    with asyncio.Runner() as loop, deployed(asked.model, model) as (url, handle):
        busy = Load(url, asked.model, asked.requests, asked.max_tokens, asked.concurrency, ignore_eos=asked.ignore_eos)
        shortest = min(asked.max_tokens, _FIRST_MAX_TOKENS)
        lone = Load(url, asked.model, asked.lone_requests, shortest, concurrency=1)
        repeats = measure(
            lambda load: loop.run(_measured(handle, load, prompts)),
            lambda load: loop.run(run_load(load, prompts)),
            busy,
            lone,
            asked.repeats,
        )
        found = document(asked, model, repeats)
        if asked.output is not None:  # before Serve shuts down, which takes half a minute behind HAProxy
            write_atomic(asked.output, found.model_dump_json(indent=2) + "\n")
    print(f"{table(found.tokens_per_s, found.first_token_s, asked.concurrency)}\n\n{found.model_dump_json()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
