"""Where students find their data: a run folder for each collection, with the base run's prompts and teacher in it.

Prompts are ordered by a hash, so the trajectories of fewer prompts are a part of those of more: they are cut out of a
wider collection, not decoded again.
"""

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cllm.config import digest
from cllm.decoding.trajectories import read_table
from cllm.errors import InputError
from cllm.layout import RunLayout, teacher_path, teacher_revision
from cllm.models import weights_revision
from cllm.recipe import Recipe


@dataclass(frozen=True, slots=True)
class BaseRun:
    """What all students start from; `prompts` and `teacher` are hashes of the prompts' file and of the weights."""

    recipe: Recipe
    prompts: str
    teacher: str

    @classmethod
    def read(cls, recipe: Recipe) -> "BaseRun":
        """Of a run with prompts and teacher."""
        with RunLayout.of(recipe).prompts_file.open("rb") as file:
            prompts = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return cls(recipe, prompts, weights_revision(teacher_path(recipe), teacher_revision(recipe)))


def placed(recipe: Recipe, base: BaseRun, folder: Path) -> Recipe:
    """The recipe of a student in the run folder below `folder` that is for its collection.

    The folder is made here, without trajectories: prompts and teacher in it are links to those of the base run.
    """
    name = digest([recipe.collect.model_dump(mode="json"), base.prompts, base.teacher])
    result = recipe.model_copy(update={"output": str((folder / name).absolute()), "storage": None})
    ours, theirs = RunLayout.of(result), RunLayout.of(base.recipe)
    ours.root.mkdir(parents=True, exist_ok=True)
    _link(ours.prompts, theirs.prompts)
    if recipe.finetune is not None:
        _link(ours.finetuned, theirs.finetuned)
    return result


def covers(wider: Recipe, recipe: Recipe) -> bool:
    """Whether the trajectories of `wider` hold those of `recipe`: the same collection, of at least as many prompts."""
    if wider.collect.model_copy(update={"num_prompts": recipe.collect.num_prompts}) != recipe.collect:
        return False
    have, wanted = wider.collect.num_prompts, recipe.collect.num_prompts
    return have is None or (wanted is not None and have >= wanted)


def cut_trajectories(source: Path, target: Path, prompt_ids: Collection[str]) -> int:
    """Copy the rows of these prompts, file by file, from one folder of trajectories to another; returns how many.

    Raises:
        InputError: a file that cannot be read, or no such row.
    """
    wanted = pa.array(sorted(prompt_ids), pa.string())
    rows = 0
    for path in sorted(source.glob("part-*.parquet")):
        table, metadata = read_table(path)
        table = table.filter(pc.is_in(table["prompt_id"], value_set=wanted))
        if table.num_rows:
            del metadata["dropped"]  # counts of the whole file
            pq.write_table(table.replace_schema_metadata(metadata), target / path.name)
            rows += table.num_rows
    if rows == 0:
        raise InputError(f"{source}: no trajectory of the first {len(prompt_ids)} prompts survived the cleaning rules")
    return rows


def _link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, in one step where it was a link to something else."""
    if path.is_symlink() and Path(os.readlink(path)) == target:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
