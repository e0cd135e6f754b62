"""Students' data: linked to the base run, and cut out of wider collections without decoding."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cllm.ablation.data import BaseRun, covers, cut_trajectories, placed
from cllm.decoding.records import BlockTrajectory
from cllm.decoding.trajectories import Trajectory, from_table, read_table, to_table
from cllm.errors import InputError
from cllm.layout import RunLayout
from cllm.recipes import get_recipe
from tests.evaluation.runs import make_run

RECIPE = get_recipe("debug")


def trajectory(prompt_id: str, sample: int = 0) -> Trajectory:
    block = BlockTrajectory(((7, 8), (1, 8), (1, sample)))
    return Trajectory(prompt_id, (5, 6), (1, sample), "eos", (block,))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files; prompt b has two responses, and the responses of d were dropped."""
    (tmp_path / "source").mkdir()
    for index, rows in enumerate([[trajectory("a"), trajectory("b"), trajectory("b", 2)], [trajectory("c")], []]):
        table = to_table(rows, {"teacher": "abc", "dropped": '{"unfinished": 1}'})
        pq.write_table(table, tmp_path / "source" / f"part-{index:05d}.parquet")
    return tmp_path / "source"


def test_the_rows_of_the_prompts_are_kept_with_their_origin(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    assert cut_trajectories(source, tmp_path / "cut", {"a", "b", "d"}) == 3
    (path,) = (tmp_path / "cut").iterdir()
    table, metadata = read_table(path)
    assert from_table(table) == [trajectory("a"), trajectory("b"), trajectory("b", 2)]
    assert metadata == {"schema_version": "1", "teacher": "abc"}


def test_a_cut_without_rows_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trajectory of the first 1 prompts survived"):
        cut_trajectories(source, tmp_path, {"d"})


@pytest.mark.parametrize(
    ("wider", "narrower", "expected"),
    [
        ([], ["collect.num_prompts=48"], True),
        ([], ["collect.num_prompts=12"], True),
        ([], ["collect.num_prompts=49"], False),
        ([], ["collect.num_prompts=null"], False),
        (["collect.num_prompts=null"], ["collect.num_prompts=null"], True),
        (["collect.num_prompts=null"], ["collect.num_prompts=49"], True),
        ([], ["collect.num_prompts=12", "collect.block_size=4"], False),
        ([], ["collect.num_prompts=12", "train.optim.steps=3"], True),
    ],
)
def test_what_a_collection_covers(wider: list[str], narrower: list[str], expected: bool) -> None:
    assert covers(RECIPE.with_overrides(wider), RECIPE.with_overrides(narrower)) is expected


def test_a_place_has_the_base_runs_prompts_and_teacher(tmp_path: Path) -> None:
    base = BaseRun.read(make_run(tmp_path / "run"))
    first = placed(base.recipe, base, tmp_path / "data")
    layout = RunLayout.of(first)
    assert layout.prompts_file.samefile(RunLayout.of(base.recipe).prompts_file)
    assert layout.finetuned.samefile(RunLayout.of(base.recipe).finetuned)
    assert not layout.trajectories.exists()
    same = placed(base.recipe.with_overrides(["train.optim.steps=3"]), base, tmp_path / "data")
    other = placed(base.recipe.with_overrides(["collect.block_size=4"]), base, tmp_path / "data")
    assert same.output == first.output != other.output


def test_a_base_run_that_moved_is_linked_anew_and_another_teacher_has_another_place(tmp_path: Path) -> None:
    base = BaseRun.read(make_run(tmp_path / "run"))
    before = placed(base.recipe, base, tmp_path / "data")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = BaseRun.read(base.recipe.with_overrides([f"output={tmp_path / 'moved'}"]))
    after = placed(moved.recipe, moved, tmp_path / "data")
    assert after.output == before.output
    assert RunLayout.of(after).prompts_file.samefile(tmp_path / "moved" / "prompts" / "prompts.parquet")
    weights = tmp_path / "moved" / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    changed = BaseRun.read(moved.recipe)
    assert placed(changed.recipe, changed, tmp_path / "data").output != after.output
