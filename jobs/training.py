"""The Ray Train shell around `cllm.training`, shared by `finetune`, `train` and `baselines`."""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer, get_device
from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from cllm.artifacts import write_artifact
from cllm.config import digest
from cllm.errors import InputError
from cllm.layout import RunLayout, with_absolute_paths
from cllm.provenance import collect_provenance
from cllm.recipe import OptimConfig, Recipe
from cllm.training.baselines import draft_session, medusa_session
from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.loop import run
from cllm.training.session import Session, distill_session, finetune_session
from cllm.training.throughput import Throughput, peak_flops
from cllm.training.trainer import StepLosses
from cllm.training.worker import Worker
from jobs.errors import input_error_in
from jobs.stages import Stage

SESSIONS: dict[str, Callable[[Recipe, Worker], Session]] = {
    "teacher": finetune_session,
    "student": distill_session,
    "draft": draft_session,
    "medusa": medusa_session,
}


def fit(recipe: Recipe, stage: Stage, optim: OptimConfig, command: list[str]) -> None:
    """Train `stage` on the cluster and write its checkpoint.

    Run again after a crash of the whole job, it continues from the last checkpoint; lost workers are replaced at once.
    """
    scratch = RunLayout.of(recipe).scratch
    name = f"{stage.kind}-{digest(stage.inputs)}"  # a changed recipe must not continue from the old one's checkpoint
    provenance = collect_provenance(command)
    with write_artifact(stage.path, kind=stage.kind, inputs=stage.inputs, provenance=provenance) as folder:
        config = {
            # Ray Train gives every worker a working folder of its own.
            "recipe": with_absolute_paths(recipe).model_dump(mode="json"),
            "kind": stage.kind,
            "export": str(folder),
            "logs": str(scratch / "tensorboard" / stage.kind),
        }
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=config,
            scaling_config=scaling(recipe),
            run_config=RunConfig(
                name=name,
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=recipe.resources.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                # Ray shows type checkers the RunConfig of its older version.
                callbacks=[BadInputEndsTraining()],  # type: ignore[list-item]
                # Progress is printed by our own lines.
                logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
            ),
        )
        trainer.fit()
    # A later run with the same recipe, of changed code say, must start afresh and not from these checkpoints.
    shutil.rmtree(scratch / name)


def scaling(recipe: Recipe) -> ScalingConfig:
    """One worker a GPU, or workers with several threads each on CPUs, which talk through gloo."""
    resources = recipe.resources
    if resources.gpus:
        return ScalingConfig(num_workers=resources.gpus, use_gpu=True)
    return ScalingConfig(num_workers=resources.workers, resources_per_worker={"CPU": resources.cpus_per_worker})


def train_worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    recipe = Recipe.model_validate(config["recipe"])
    context = ray.train.get_context()
    worker = Worker(device=get_device(), rank=context.get_world_rank(), world=context.get_world_size())
    if worker.device.type == "cpu":
        torch.set_num_threads(recipe.resources.cpus_per_worker)
    session = SESSIONS[config["kind"]](recipe, worker)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            load_checkpoint(session.trainer, Path(folder), session.stopping)
    run(session, RayReporter(session, Path(config["logs"]), config["kind"]))
    state = full_model_state(session.trainer)
    if worker.rank == 0:
        session.export(Path(config["export"]), state)


class BadInputEndsTraining(UserCallback):
    """Ray Train restarts workers whatever has failed; what the recipe or the data do wrong they would do again.

    An exception in a callback ends the run, and is what `fit` raises (as the cause of a ControllerError).
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        messages = (input_error_in(error) for error in worker_exceptions.values())
        if (message := next((found for found in messages if found is not None), None)) is not None:
            raise InputError(message)


class RayReporter:
    """Progress on the terminal, in TensorBoard, in Ray's metrics, and checkpoints through Ray Train."""

    def __init__(self, session: Session, logs: Path, kind: str) -> None:
        self.session = session
        self.kind = kind
        trainer = session.trainer
        self.second_loss = trainer.objective.second_loss
        self.leads = trainer.worker.rank == 0
        self.writer = SummaryWriter(str(logs)) if self.leads else None
        self.throughput = Throughput(trainer.objective, trainer.worker.world, peak_flops(trainer.worker.device))
        self.gauges: dict[str, Gauge] = {}
        self.started = time.monotonic()

    def note(self, losses: StepLosses) -> None:
        """Log every `log_every` steps and at the first and last one."""
        self.throughput.add(losses.num_tokens, losses.refinements)
        trainer, optim = self.session.trainer, self.session.trainer.config
        if trainer.step % optim.log_every and trainer.step not in (1, optim.steps):
            return
        measured = self.throughput.measure()
        values = {"ar": losses.ar, self.second_loss: losses.second, "grad_norm": losses.grad_norm} | measured
        self._emit(values | {"learning_rate": losses.learning_rate})
        speed = f"{measured['tokens_per_s']:,.0f} tok/s" + (f", MFU {measured['mfu']:.1%}" if "mfu" in measured else "")
        pair = f"AR {losses.ar:.4f}  {self.second_loss} {losses.second:.4f}"
        self.tell(f"{pair}  lr {losses.learning_rate:.2e}  {speed}")

    def validated(self, ar: float, second: float) -> None:
        """Log the validation losses."""
        self._emit({"validation_ar": ar, f"validation_{self.second_loss}": second})
        self.tell(f"validation: AR {ar:.4f}  {self.second_loss} {second:.4f}")

    def checkpoint(self) -> None:
        """Save and report a checkpoint. Ray Train merges the workers' folders, and waits for all of them."""
        trainer = self.session.trainer
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(trainer, Path(folder), self.session.stopping)
            ray.train.report({"step": trainer.step}, checkpoint=Checkpoint.from_directory(folder))

    def _emit(self, values: dict[str, float]) -> None:
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.session.trainer.step)
            gauge = self.gauges.setdefault(name, Gauge(f"cllm_{self.kind}_{name}", description=f"{self.kind}: {name}"))
            gauge.set(value)
        self.writer.flush()

    def tell(self, text: str) -> None:
        """Print a line, from one of the workers."""
        if self.leads:
            step, steps = self.session.trainer.step, self.session.trainer.config.steps
            seconds = time.monotonic() - self.started
            # not print: Ray Train replaces it by one that writes everything twice, to the terminal and to its log
            sys.stdout.write(f"[{self.kind}] step {step}/{steps}  {text}  {seconds:.0f} s\n")
            sys.stdout.flush()
