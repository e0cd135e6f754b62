"""One student of an ablation as a measurement: what decides its outcome, and what came out."""

from functools import cached_property

from pydantic import Field

from cllm.ablation.data import BaseRun
from cllm.ablation.grid import Student
from cllm.bench.matrix import Platform
from cllm.config import Config
from cllm.recipe import CollectConfig, EvaluateConfig, TrainConfig


class Cell(Config):
    """The content of a training and its measurement; its key hashes it. A factor's name and labels are not in it, so a
    grid that grows repeats nothing."""

    task: str
    prompts: str  # hash of the prompts' file
    teacher: str  # hash of the weights
    collect: CollectConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    compile: bool
    run_seed: int  # of the base run: guesses and samples of the collection
    seed: int  # of training
    platform: Platform

    @cached_property
    def key(self) -> str:
        return self.fingerprint()


class Figures(Config):
    """What a student came to. All greedy; Jacobi with sliding refill.

    Attributes:
        tpf: tokens a forward over all test prompts.
        speedups: tokens a second over those of its AR decoding, one prompt at a time, one figure a repeat.
        tokens_per_s: one figure a repeat.
        scores: the task's, in [0, 1], one a test prompt.
        reference_perplexity: of the student on the reference answers; None where it is not finite.
        train_seconds: from the first step to the last, on one device.
        train_tokens: packed tokens, padding included.
    """

    metric: str
    tpf: float
    speedups: tuple[float, ...] = Field(min_length=1)
    tokens_per_s: tuple[float, ...] = Field(min_length=1)
    scores: tuple[float, ...] = Field(min_length=1)
    reference_perplexity: float | None
    mean_response_tokens: float
    train_seconds: float
    train_tokens: int


def make_cell(student: Student, base: BaseRun, platform: Platform) -> Cell:
    """The cell of a student of the base run on a platform."""
    recipe = student.recipe
    return Cell(
        task=recipe.task.name,
        prompts=base.prompts,
        teacher=base.teacher,
        collect=recipe.collect,
        train=recipe.train,
        evaluate=recipe.evaluate,
        compile=recipe.resources.compile,
        run_seed=recipe.seed,
        seed=student.seed,
        platform=platform,
    )
