"""Where a run keeps its artefacts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cllm.recipe import DraftConfig, ModelConfig, Recipe

Source = TypeVar("Source", ModelConfig, DraftConfig)


@dataclass(frozen=True, slots=True)
class RunLayout:
    """Folders of one run below its root (shared storage on a cluster)."""

    root: Path

    @staticmethod
    def of(recipe: Recipe) -> "RunLayout":
        return RunLayout(Path(recipe.output).absolute())

    @property
    def prompts(self) -> Path:
        return self.root / "prompts"

    @property
    def prompts_file(self) -> Path:
        return self.prompts / "prompts.parquet"

    @property
    def tokenizer(self) -> Path:
        return self.prompts / "tokenizer"

    @property
    def finetuned(self) -> Path:
        return self.root / "teacher"

    @property
    def trajectories(self) -> Path:
        return self.root / "trajectories"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def draft(self) -> Path:
        return self.root / "draft"

    @property
    def medusa(self) -> Path:
        return self.root / "medusa"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def bench(self) -> Path:
        return self.root / "bench"

    @property
    def scratch(self) -> Path:
        """Ray Train's checkpoints and TensorBoard logs, of use only until a stage is finished."""
        return self.root / "scratch"


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe for a process with another working folder: its output, and models that are local folders."""
    baselines = recipe.baselines
    if baselines is not None and baselines.draft is not None:
        baselines = baselines.model_copy(update={"draft": _placed(baselines.draft)})
    changed = {"output": str(RunLayout.of(recipe).root), "teacher": _placed(recipe.teacher), "baselines": baselines}
    return recipe.model_copy(update=changed)


def _placed(source: Source) -> Source:
    if source.path is None or not Path(source.path).is_dir():
        return source
    return source.model_copy(update={"path": str(Path(source.path).absolute())})


def teacher_path(recipe: Recipe) -> str:
    """Folder or Hugging Face id of the teacher that trajectories come from."""
    if recipe.finetune is not None:
        return str(RunLayout.of(recipe).finetuned)
    assert recipe.teacher.path is not None
    return recipe.teacher.path


def teacher_revision(recipe: Recipe) -> str | None:
    """Revision to load the teacher at; a fine-tuned teacher is a folder and has none."""
    return None if recipe.finetune is not None else recipe.teacher.revision
