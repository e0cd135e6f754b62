"""Trajectories by hand and at random, and the run of a tiny teacher that has collected them."""

import random
from pathlib import Path

import pyarrow.parquet as pq

from cllm.decoding.records import BlockTrajectory
from cllm.decoding.trajectories import Trajectory, to_table
from cllm.layout import RunLayout
from cllm.models import load_tokenizer
from cllm.recipe import Recipe
from cllm.tasks.prompts import Prompt, read_metadata, write_prompts
from cllm.training.session import trajectory_metadata
from tests.evaluation.runs import make_run

BLOCK = 8


def random_trajectory(number: int, *, vocab_size: int = 24, augmented: bool = False, block: int = BLOCK) -> Trajectory:
    """Blocks whose states come closer to the fixed point token by token."""
    rng = random.Random(number)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(2, vocab_size), k=count))

    response = tokens(rng.randint(2, 3 * block))
    padded = response + tokens(-len(response) % block)
    blocks, copies = [], []
    for start in range(0, len(padded), block):
        fixed, state = padded[start : start + block], tokens(block)
        states = [state]
        while state != fixed:
            right = next(i for i in range(block) if state[i] != fixed[i])
            state = fixed[: right + 1] + tokens(block - right - 1)
            states.append(state)
        blocks.append(BlockTrajectory(tuple(states)))
        copies.append(tuple(states[:-1][:2]))
    prompt = tokens(rng.randint(1, 6))
    return Trajectory(f"{number:016x}", prompt, response, "stop", tuple(blocks), tuple(copies) if augmented else ())


def make_collected_run(folder: Path, overrides: tuple[str, ...] = (), num_rows: int = 80) -> Recipe:
    """The run of `make_run` with train prompts and trajectories, in two files; nothing in them is the teacher's."""
    recipe = make_run(folder).with_overrides(overrides)
    layout = RunLayout.of(recipe)
    rows = [random_trajectory(number, vocab_size=300) for number in range(num_rows)]
    prompts = [
        Prompt(row.prompt_id, split, None, row.prompt_ids, row.response_ids[::-1], "question", "answer", {}, "train:1")
        for split in ("train", "validation")
        for row in rows[:: 1 if split == "train" else 8]
    ]
    metadata = {"tokenizer_hash": read_metadata(layout.prompts_file)["tokenizer_hash"]}
    write_prompts(layout.prompts_file, prompts, metadata)
    layout.trajectories.mkdir()
    kept = trajectory_metadata(recipe, load_tokenizer(str(layout.tokenizer))) | {"dropped": "{}"}
    for number in range(2):
        pq.write_table(to_table(rows[number::2], kept), layout.trajectories / f"part-{number:05d}.parquet")
    return recipe
