"""Collect Jacobi trajectories of the teacher with Ray Data (paper algorithm 1).

    python jobs/collect.py --recipe demo

The prompts are cut into shards. An actor decodes a shard and writes its file whole or not at all; a job that was killed
goes on with the missing shards, and a shard's rows depend on nothing but the shard, so that it ends with exactly the
rows of an uninterrupted run.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from transformers import PreTrainedTokenizerBase

from cllm.artifacts import resumable_artifact, write_atomic
from cllm.decoding.trajectories import read_table, to_table
from cllm.engine.collection import collect, collection_engine_config
from cllm.engine.engine import Engine
from cllm.engine.load import load_engine
from cllm.errors import InputError
from cllm.layout import RunLayout, teacher_path, teacher_revision
from cllm.models import check_context_fits, default_device, load_tokenizer
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.tasks.prompts import Prompt, check_tokenizer, draw_prompts
from cllm.training.session import trajectory_metadata
from jobs import stages
from jobs.cli import main, stage
from jobs.cluster import connect
from jobs.pool import actor_pool


@dataclass(frozen=True, slots=True)
class Teacher:
    """What one actor decodes with, and its work."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    shards: list[list[Prompt]]

    @classmethod
    def load(cls, recipe: Recipe) -> "Teacher":
        """Raises InputError if the teacher cannot be loaded, or cannot read the prompts."""
        device, config = default_device(), recipe.collect
        if device.type == "cpu":
            torch.set_num_threads(recipe.resources.cpus_per_actor)
        tokenizer, work = load_tokenizer(str(RunLayout.of(recipe).tokenizer)), shards(recipe)
        path, revision = teacher_path(recipe), teacher_revision(recipe)
        longest = max(len(prompt.prompt_ids) for shard in work for prompt in shard)
        check_context_fits(path, revision, prompt_tokens=longest, new_tokens=config.max_new_tokens)
        engine = load_engine(
            path,
            collection_engine_config(config, longest),
            revision=revision,
            precision=config.precision,
            device=device,
            tokenizer=tokenizer,
        )
        return cls(engine, tokenizer, work)


class ShardCollector:
    """A Ray Data actor: holds the teacher, turns shard numbers into shard files with the given metadata.

    The model is loaded for the first shard, not in the constructor: what goes wrong there Ray reports in hundreds of
    lines around the one that matters.
    """

    def __init__(self, recipe: Recipe, folder: str, metadata: dict[str, str]) -> None:
        self.recipe = recipe
        self.folder = Path(folder)
        self.metadata = metadata
        self.teacher: Teacher | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (index,) = batch["shard"].tolist()
        path = shard_path(self.folder, index)
        if not path.exists():  # else Ray repeats a call whose result was lost with its node
            self._collect(index, path)
        responses = pq.read_table(path, columns=["response_ids"])["response_ids"]
        tokens = pc.sum(pc.list_value_length(responses)).as_py() or 0
        return {"shard": np.array([index]), "rows": np.array([len(responses)]), "tokens": np.array([tokens])}

    def _collect(self, index: int, path: Path) -> None:
        teacher = self.teacher = self.teacher or Teacher.load(self.recipe)
        prompts = teacher.shards[index]
        rows, dropped = collect(teacher.engine, teacher.tokenizer, prompts, self.recipe.collect, self.recipe.seed)
        temporary = path.with_suffix(".tmp")
        pq.write_table(to_table(rows, self.metadata | {"dropped": json.dumps(dropped)}), temporary)
        temporary.replace(path)


def shards(recipe: Recipe) -> list[list[Prompt]]:
    """The train prompts, cut into shards."""
    drawn = draw_prompts(RunLayout.of(recipe).prompts_file, "train", recipe.collect.num_prompts)
    size = recipe.collect.shard_prompts
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    output = stages.collect(recipe)
    output.require_sources()
    check_teachers_tokenizer(recipe)
    connect(recipe)
    provenance = collect_provenance(sys.argv)
    with (
        stage(f"trajectories: {'Jacobi' if recipe.collect.record else 'AR'} decoding of the train prompts"),
        resumable_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder,
    ):
        run_missing_shards(recipe, folder)
        write_atomic(folder / "counts.json", json.dumps(count_rows(recipe, folder), indent=1))


def check_teachers_tokenizer(recipe: Recipe) -> None:
    """Raise InputError if the prompts were made with another tokenizer than the teacher's."""
    path = teacher_path(recipe)
    check_tokenizer(RunLayout.of(recipe).prompts_file, load_tokenizer(path, teacher_revision(recipe)), path)


def run_missing_shards(recipe: Recipe, folder: Path) -> None:
    """Collect the shards that have no file yet, and print progress."""
    total = len(shards(recipe))
    missing = [index for index in range(total) if not shard_path(folder, index).exists()]
    if len(missing) < total:
        print(f"continuing: {total - len(missing)} of {total} shards are there", flush=True)
    if not missing:
        return
    metadata = trajectory_metadata(recipe, load_tokenizer(str(RunLayout.of(recipe).tokenizer)))
    pool = actor_pool(recipe, len(missing))
    results = ray.data.from_items(
        [{"shard": index} for index in missing], override_num_blocks=len(missing)
    ).map_batches(
        ShardCollector,
        batch_size=1,
        compute=pool.strategy,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        fn_constructor_kwargs={"recipe": recipe, "folder": str(folder), "metadata": metadata},
    )
    start = time.monotonic()
    rows = tokens = 0
    for done, result in enumerate(results.iter_rows(), total - len(missing) + 1):
        rows, tokens = rows + int(result["rows"]), tokens + int(result["tokens"])
        seconds = time.monotonic() - start
        print(f"shard {done}/{total}: {rows} responses, {tokens / seconds:,.0f} tok/s, {seconds:.0f} s", flush=True)


def count_rows(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Kept and dropped responses over all shards.

    Raises:
        InputError: no response survived.
    """
    kept, dropped = 0, Counter[str]()
    for index in range(len(shards(recipe))):
        table, metadata = read_table(shard_path(folder, index))
        kept += table.num_rows
        dropped.update(json.loads(metadata["dropped"]))
    if kept == 0:
        shutil.rmtree(folder)  # nothing in it is worth continuing, and other settings must not be held up by it
        raise InputError(f"no trajectory survived the filters of the collect section; dropped: {dict(dropped)}")
    print(f"kept {kept} responses, dropped {dict(dropped) or 'none'}", flush=True)
    return {"kept": kept, "dropped": dict(dropped)}


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
