"""Measure our engine, and vLLM where it is installed, under the same load.

    python jobs/bench_engine.py --shape llama-2-7b --concurrency 1 8 32 --n 16 --out results/engine.json
    python jobs/bench_engine.py --model runs/demo/student --prompts runs/demo/prompts/prompts.parquet

A row for each decoder, window and number of requests in flight. Each engine runs in a process of its own with a GPU of
its own, or with `--shards` GPUs that divide the model. The last line is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
import torch

from cllm.artifacts import write_atomic
from cllm.bench.agreement import measure_agreement
from cllm.bench.bandwidth import copy_bandwidth, weight_bytes, weight_bytes_of
from cllm.bench.engine_subject import SHAPES, EngineSubject
from cllm.bench.engines import Case, DecoderName, Row, measure_ours, measure_sharded, measure_vllm
from cllm.engine.backends import tune
from cllm.errors import InputError
from cllm.models import default_device, resolve_dtype
from cllm.provenance import collect_provenance
from cllm.report.engines import engines_table
from cllm.vllm.versions import check_installed, is_installed
from jobs.cli import exit_code_of, print_last_line_json
from jobs.cluster import start

DECODERS: tuple[DecoderName, ...] = ("ar", "jacobi", "jacobi-block", "jacobi-adaptive")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="PATH", help="checkpoint: a folder or a Hugging Face id")
    source.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    result.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts.parquet of a run; default: random prompts"
    )
    result.add_argument("--num-prompts", type=int, default=64, metavar="N", help="prompts to draw (default 64)")
    result.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of random prompts (default 128)")
    result.add_argument("--new-tokens", type=int, default=256, metavar="N", help="at most (default 256)")
    result.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    result.add_argument(
        "--jacobi-concurrency",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of requests in flight at which Jacobi is measured, too (default: those of --concurrency)",
    )
    result.add_argument("--n", type=int, nargs="+", default=[16], metavar="N", help="windows of Jacobi (default 16)")
    result.add_argument("--decoders", nargs="+", default=["ar", "jacobi"], choices=DECODERS)
    result.add_argument("--guess", default="pad", choices=["pad", "prompt"], help="initial guesses (default pad)")
    result.add_argument("--shards", type=int, default=1, metavar="N", help="GPUs that divide the model (default 1)")
    result.add_argument("--tune", action="store_true", help="let the kernels find their fastest launches first")
    result.add_argument(
        "--attention",
        default="auto",
        choices=["auto", "flash", "triton", "torch"],
        help="default: the best of a step",
    )
    result.add_argument(
        "--agreement",
        action="store_true",
        help="also compare greedy Jacobi decoding with AR, in float32 and the model's dtype, token by token",
    )
    result.add_argument(
        "--vllm", action=argparse.BooleanOptionalAction, help="vLLM's AR decoding as well (default: where installed)"
    )
    result.add_argument("--vllm-memory", type=float, default=0.9, metavar="SHARE", help="of the GPU (default 0.9)")
    result.add_argument("--out", type=Path, metavar="FILE", help="write the document there, too")
    return result


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    start()
    gpus = ray.cluster_resources().get("GPU", 0)
    if 0 < gpus < arguments.shards:
        raise InputError(f"--shards {arguments.shards}: the cluster has {gpus:g} GPUs")
    # With GPUs enough both engines run at the same time, each on its own; else one after the other.
    needed = arguments.shards if gpus else 0
    pending = [measure_cllm.options(num_gpus=needed, num_cpus=1).remote(arguments)]
    if is_installed() if arguments.vllm is None else arguments.vllm:
        if gpus < needed + 1:
            ray.wait(pending)
        pending.append(measure_peer.options(num_gpus=min(needed, 1), num_cpus=1).remote(arguments))
    parts = ray.get(pending)
    rows = [row for part in parts for row in part.pop("rows")]
    document = {"rows": rows, "settings": settings(arguments), "provenance": collect_provenance(sys.argv)}
    for part in parts:
        document |= part
    if arguments.out:
        write_atomic(arguments.out, json.dumps(document, indent=1, allow_nan=False))
    print(f"\n{engines_table(rows)}\n", flush=True)
    print_last_line_json(document)


def check(arguments: argparse.Namespace) -> None:
    numbers = [arguments.num_prompts, arguments.prompt_tokens, arguments.new_tokens, arguments.shards]
    crowds = [*arguments.concurrency, *(arguments.jacobi_concurrency or [])]
    if min(*numbers, *crowds, *arguments.n) < 1:
        raise InputError(
            "--num-prompts, --prompt-tokens, --new-tokens, --shards, --concurrency, --jacobi-concurrency, --n: "
            "at least 1 each"
        )
    if arguments.prompts is not None and arguments.model is None:
        raise InputError("--prompts: a model with random weights has no tokenizer that made them; give --model")
    if arguments.shards > 1 and (arguments.tune or arguments.agreement):
        raise InputError("--tune and --agreement: they are for a model on one GPU; leave out --shards")
    if arguments.vllm:
        check_installed()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, without folders of this machine."""
    return {key: value for key, value in vars(arguments).items() if key not in ("model", "prompts", "out")}


@ray.remote(max_calls=1)  # its process ends with it and leaves all memory to vLLM
def measure_cllm(arguments: argparse.Namespace) -> dict[str, Any]:
    subject, device = subject_of(arguments), default_device()
    bandwidth = copy_bandwidth(device)
    document = {"copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 1), "hardware": collect_provenance(())["hardware"]}
    if arguments.shards > 1:
        config = subject.config()
        floor_ms = 1000 * weight_bytes_of(config) / bandwidth
        requests = subject.requests(config.vocab_size)
        measured = measure_sharded(
            subject, list(cases(arguments)), requests, arguments.shards, guess=arguments.guess, floor_ms=floor_ms
        )
        return document | {"rows": noted(measured), "floor_ms": floor_ms}
    document |= measure_alone(subject, arguments, bandwidth, device)
    if arguments.agreement:
        dtypes = dict.fromkeys([torch.float32, resolve_dtype("auto", device)])
        found = [measure_agreement(subject, max(arguments.n), dtype, device) for dtype in dtypes]
        document["agreement_with_ar"] = [one for of_dtype in found for one in of_dtype]
    return document


def measure_alone(
    subject: EngineSubject, arguments: argparse.Namespace, bandwidth: float, device: torch.device
) -> dict[str, Any]:
    """The rows of a model on one device."""
    model, eos_ids, pad_id = subject.open(resolve_dtype("auto", device), device)
    todo = list(cases(arguments))
    if arguments.tune:
        tune(model, sorted({case.step_tokens for case in todo}))
    floor_ms = 1000 * weight_bytes(model) / bandwidth
    requests = subject.requests(model.shape.vocab_size)
    measured = measure_ours(
        model,
        subject.name,
        todo,
        requests,
        eos_ids=eos_ids,
        pad_id=pad_id,
        guess=arguments.guess,
        floor_ms=floor_ms,
    )
    return {
        "rows": noted(measured),
        "floor_ms": floor_ms,
        "kernels": {"ops": type(model.ops).__name__, "attention": type(model.attention).__name__},
    }


@ray.remote
def measure_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, stats = measure_vllm(subject_of(arguments), arguments.concurrency, arguments.vllm_memory)
    return {"rows": noted(rows), "vllm": stats}


def noted(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows' documents, each printed as soon as it is measured."""
    documents = []
    for row in rows:
        documents.append(row.document())
        print(json.dumps(documents[-1]), flush=True)
    return documents


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    asked = {"ar": arguments.concurrency}
    jacobi = arguments.jacobi_concurrency or arguments.concurrency
    for concurrency in sorted({*arguments.concurrency, *jacobi}):
        for decoder in arguments.decoders:
            if concurrency in asked.get(decoder, jacobi):
                for n in [1] if decoder == "ar" else arguments.n:
                    yield Case(decoder, n, concurrency)


def subject_of(arguments: argparse.Namespace) -> EngineSubject:
    return EngineSubject(
        path=arguments.model,
        shape=arguments.shape,
        prompts=arguments.prompts,
        num_prompts=arguments.num_prompts,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        attention=arguments.attention,
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: run(parser().parse_args())))
