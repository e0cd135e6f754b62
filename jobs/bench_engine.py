"""Measure our engine, and vLLM where it is installed, under the same load.

    python jobs/bench_engine.py --shape llama-2-7b --concurrency 1 8 32 --n 16 --out results/engine.json
    python jobs/bench_engine.py --model runs/demo/student --prompts runs/demo/prompts/prompts.parquet

A row for each decoder, window and number of requests in flight. Each engine runs in a process of its own with a GPU of
its own. The last line is one JSON document.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from cllm.artifacts import write_atomic
from cllm.bench.bandwidth import copy_bandwidth, weight_bytes, weight_bytes_of
from cllm.bench.engines import Case, DecoderName, Row, measure_load, measure_ours, memory_in_use
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.attention import TorchAttention
from cllm.engine.backends import attention_for, ops_for, triton_attention, tune
from cllm.engine.model import DecoderModel
from cllm.engine.weights import ModelOptions, load_model, random_model
from cllm.errors import InputError
from cllm.models import (
    default_device,
    eos_token_ids,
    load_generation_config,
    load_tokenizer,
    pad_token_id,
    resolve_dtype,
)
from cllm.provenance import collect_provenance
from cllm.report.engines import engines_table
from cllm.tasks.prompts import draw_prompts
from cllm.vllm.config import PeerConfig
from cllm.vllm.llm import VllmBackend
from jobs.cli import exit_code_of, print_last_line_json
from jobs.cluster import start

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    },
}
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
    result.add_argument("--n", type=int, nargs="+", default=[16], metavar="N", help="windows of Jacobi (default 16)")
    result.add_argument("--decoders", nargs="+", default=["ar", "jacobi"], choices=DECODERS)
    result.add_argument("--guess", default="pad", choices=["pad", "prompt"], help="initial guesses (default pad)")
    result.add_argument("--tune", action="store_true", help="let the kernels find their fastest launches first")
    result.add_argument("--attention", default="auto", choices=["auto", "triton", "torch"], help="default: the best")
    result.add_argument("--vllm-memory", type=float, default=0.9, metavar="SHARE", help="of the GPU (default 0.9)")
    result.add_argument("--vllm", action="store_true", help="measure vLLM's AR decoding as well")
    result.add_argument("--out", type=Path, metavar="FILE", help="write the document there, too")
    return result


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    start()
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    # With two GPUs both engines run at the same time, each on its own; with one, or none, one after the other.
    pending = [measure_cllm.options(num_gpus=gpus, num_cpus=1).remote(arguments)]
    if arguments.vllm:
        if ray.cluster_resources().get("GPU", 0) < 2:
            ray.wait(pending)
        pending.append(measure_vllm.options(num_gpus=gpus, num_cpus=1).remote(arguments))
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
    numbers = [arguments.num_prompts, arguments.prompt_tokens, arguments.new_tokens]
    if min(*numbers, *arguments.concurrency, *arguments.n) < 1:
        raise InputError("--num-prompts, --prompt-tokens, --new-tokens, --concurrency, --n: must be at least 1")
    if arguments.prompts is not None and arguments.model is None:
        raise InputError("--prompts: a model with random weights has no tokenizer that made them; give --model")


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, without folders of this machine."""
    return {key: value for key, value in vars(arguments).items() if key not in ("model", "prompts", "out")}


@ray.remote
def measure_cllm(arguments: argparse.Namespace) -> dict[str, Any]:
    device = default_device()
    model, eos_ids, pad_id = subject(arguments, device)
    todo = list(cases(arguments))
    if arguments.tune:
        tune(model, sorted({case.n * case.concurrency for case in todo}))
    requests = requests_for(arguments, model.shape.vocab_size)
    bandwidth = copy_bandwidth(device)
    floor_ms = 1000 * weight_bytes(model) / bandwidth
    measured = measure_ours(
        model,
        model_name(arguments),
        todo,
        requests,
        eos_ids=eos_ids,
        pad_id=pad_id,
        guess=arguments.guess,
        floor_ms=floor_ms,
    )
    return {
        "rows": [noted(row) for row in measured],
        "copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "floor_ms": floor_ms,
        "hardware": collect_provenance(())["hardware"],
        "kernels": {"ops": type(model.ops).__name__, "attention": type(model.attention).__name__},
    }


@ray.remote
def measure_vllm(arguments: argparse.Namespace) -> dict[str, Any]:
    device = default_device()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model
        if path is None:
            shape_config(arguments.shape).save_pretrained(folder)
            path = folder
        config = AutoConfig.from_pretrained(path)
        requests = requests_for(arguments, config.vocab_size)
        floor_ms = 1000 * weight_bytes_of(config) / copy_bandwidth(device)
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        peer = PeerConfig(
            method="ar",
            model=path,
            max_rows=max(arguments.concurrency),
            max_tokens=longest,
            memory_fraction=arguments.vllm_memory,
            tokenizer=False,
        )
        backend = VllmBackend(peer, load_format="dummy" if arguments.model is None else "auto")
        rows = []
        for concurrency in arguments.concurrency:
            load = measure_load(backend, requests, concurrency)
            row = Row.of(
                load,
                floor_ms=floor_ms,
                engine="vllm",
                decoder="ar",
                model=model_name(arguments),
                concurrency=concurrency,
                n=1,
                memory_gib=memory_in_use(device),
            )
            rows.append(noted(row))
        return {"rows": rows, "vllm": backend.stats().as_row()}


def noted(row: Row) -> dict[str, Any]:
    """The row's document, printed as soon as it is measured."""
    document = row.document()
    print(json.dumps(document), flush=True)
    return document


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for concurrency in arguments.concurrency:
        for decoder in arguments.decoders:
            for n in [1] if decoder == "ar" else arguments.n:
                yield Case(decoder, n, concurrency)


def subject(arguments: argparse.Namespace, device: torch.device) -> tuple[DecoderModel, Sequence[int], int]:
    """The model to measure, its end tokens and its padding token."""
    dtype = resolve_dtype("auto", device)
    attention = TorchAttention() if arguments.attention == "torch" else attention_for(device, dtype)
    if arguments.attention == "triton":
        attention = triton_attention(device)
    options: ModelOptions = {"ops": ops_for(device, dtype), "attention": attention}
    if arguments.model is None:
        return random_model(shape_config(arguments.shape), dtype, device, **options), (), 0
    tokenizer = load_tokenizer(arguments.model)
    eos_ids = eos_token_ids(load_generation_config(arguments.model), tokenizer)
    return load_model(arguments.model, dtype, device, **options), eos_ids, pad_token_id(tokenizer)


def shape_config(name: str) -> PretrainedConfig:
    return LlamaConfig(**SHAPES[name], dtype="bfloat16", architectures=["LlamaForCausalLM"])


def model_name(arguments: argparse.Namespace) -> str:
    return arguments.shape or Path(arguments.model).name


def requests_for(arguments: argparse.Namespace, vocab_size: int) -> list[DecodeRequest]:
    """Test prompts by hashed id, which end where the model ends them; or random ones of fixed length."""
    if arguments.prompts is not None:
        drawn = draw_prompts(arguments.prompts, "test", arguments.num_prompts)
        return [DecodeRequest(prompt.prompt_ids, arguments.new_tokens) for prompt in drawn]
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(vocab_size, (arguments.num_prompts, arguments.prompt_tokens), generator=generator)
    endless = SamplingParams(ignore_eos=True)
    return [DecodeRequest(tuple(row), arguments.new_tokens, endless) for row in tokens_BL.tolist()]


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: run(parser().parse_args())))
