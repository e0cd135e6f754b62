"""The Ray Train shell around `cllm.training`, shared by `finetune`, `train` and `baselines`."""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from cllm.artifacts import write_artifact
from cllm.config import digest
from cllm.layout import RunLayout, with_absolute_paths
from cllm.provenance import collect_provenance
from cllm.recipe import OptimConfig, Recipe
from cllm.training.baselines import draft_session, medusa_session
from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.session import Session, distill_session, finetune_session
from cllm.training.throughput import Throughput
from cllm.training.trainer import StepLosses
from cllm.training.worker import Worker
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
                # Progress is printed by our own lines. (Ray shows type checkers the RunConfig of its older version.)
                logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
            ),
        )
        trainer.fit()
    # A later run with the same recipe, of changed code say, must start afresh and not from these checkpoints.
    shutil.rmtree(scratch / name)


def scaling(recipe: Recipe) -> ScalingConfig:
    """One worker a GPU, or one worker with several threads on the CPU."""
    resources = recipe.resources
    if resources.gpus:
        return ScalingConfig(num_workers=resources.gpus, use_gpu=True)
    return ScalingConfig(num_workers=1, resources_per_worker={"CPU": resources.cpus_per_worker})


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
            load_checkpoint(session.trainer, Path(folder))
    run(session, Reporter(session, Path(config["logs"]), config["kind"]))
    state = full_model_state(session.trainer)
    if worker.rank == 0:
        session.export(Path(config["export"]), state)


def run(session: Session, reporter: "Reporter") -> None:
    """Train until the last step, or until validation stops improving."""
    trainer, optim = session.trainer, session.trainer.config
    if trainer.stream.num_too_long:
        reporter.warn(f"{trainer.stream.num_too_long} documents are longer than a row of {optim.row_tokens} tokens")
    best, stale = float("inf"), 0
    while trainer.step < optim.steps:
        reporter.note(trainer.train_step())
        last = trainer.step == optim.steps
        if session.validation and (last or (session.validate_every and trainer.step % session.validate_every == 0)):
            loss = reporter.validate()
            best, stale = (loss, 0) if loss < best else (best, stale + 1)
            if session.patience is not None and stale > session.patience:
                break
        if trainer.step % optim.checkpoint_every == 0 and not last:
            reporter.checkpoint()


class Reporter:
    """Progress on the terminal, in TensorBoard, in Ray's metrics, and checkpoints through Ray Train."""

    def __init__(self, session: Session, logs: Path, kind: str) -> None:
        self.session = session
        self.kind = kind
        trainer = session.trainer
        self.second_loss = trainer.objective.second_loss
        self.leads = trainer.worker.rank == 0
        self.writer = SummaryWriter(str(logs)) if self.leads else None
        self.throughput = Throughput(trainer.model, trainer.worker)
        self.gauges: dict[str, Gauge] = {}
        self.started = time.monotonic()

    def note(self, losses: StepLosses) -> None:
        """Log every `log_every` steps and at the first and last one."""
        self.throughput.add(losses.num_tokens)
        trainer, optim = self.session.trainer, self.session.trainer.config
        if trainer.step % optim.log_every and trainer.step not in (1, optim.steps):
            return
        values = asdict(losses) | self.throughput.measure()
        del values["num_tokens"]
        values[self.second_loss] = values.pop("consistency")
        self._emit(values)
        speed = f"{values['tokens_per_s']:,.0f} tok/s" + (f", MFU {values['mfu']:.1%}" if "mfu" in values else "")
        pair = f"AR {losses.ar:.4f}  {self.second_loss} {losses.consistency:.4f}"
        self._print(f"{pair}  lr {losses.learning_rate:.2e}  {speed}")

    def validate(self) -> float:
        """Log the validation losses; returns the weighted sum that training minimises."""
        ar, second = self.session.trainer.validate(self.session.validation)
        self._emit({"validation_ar": ar, f"validation_{self.second_loss}": second})
        self._print(f"validation: AR {ar:.4f}  {self.second_loss} {second:.4f}")
        return self.session.trainer.ar_weight * ar + second

    def warn(self, text: str) -> None:
        """Print what the user should know."""
        self._print(f"warning: {text}; they are left out")

    def checkpoint(self) -> None:
        """Save and report a checkpoint. Ray Train merges the workers' folders, and waits for all of them."""
        trainer = self.session.trainer
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(trainer, Path(folder))
            ray.train.report({"step": trainer.step}, checkpoint=Checkpoint.from_directory(folder))

    def _emit(self, values: dict[str, float]) -> None:
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.session.trainer.step)
            gauge = self.gauges.setdefault(name, Gauge(f"cllm_{self.kind}_{name}", description=f"{self.kind}: {name}"))
            gauge.set(value)
        self.writer.flush()

    def _print(self, text: str) -> None:
        if self.leads:
            step, steps = self.session.trainer.step, self.session.trainer.config.steps
            seconds = time.monotonic() - self.started
            # not print: Ray Train replaces it by one that writes everything twice, to the terminal and to its log
            sys.stdout.write(f"[{self.kind}] step {step}/{steps}  {text}  {seconds:.0f} s\n")
            sys.stdout.flush()
