"""What a training run tells of itself while it goes on: its TensorBoard files and Ray Train's checkpoints."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.jobs.running import FinishedRun

TAGS = ("ar", "consistency", "grad_norm", "learning_rate", "validation_ar", "validation_consistency")
Scalars = dict[tuple[str, int], float]  # by tag and step


def scalars(run: FinishedRun) -> list[Scalars]:
    """What each first worker logged, in the order in which they were started."""
    files = sorted(
        (run.layout.scratch / "tensorboard" / "student").glob("events.*"), key=lambda path: path.stat().st_mtime_ns
    )
    return [_read_events(path) for path in files]


def saved_step(run: FinishedRun) -> int:
    """The step of the last checkpoint that Ray Train knows of; 0 if there is none."""
    for path in run.layout.scratch.glob("student-*/checkpoint_manager_snapshot.json"):
        try:
            latest = json.loads(path.read_text())["latest_checkpoint_result"]
        except json.JSONDecodeError:  # being written
            return 0
        return latest["metrics"]["step"] if latest else 0
    return 0


def _read_events(path: Path) -> Scalars:
    events = EventAccumulator(str(path)).Reload()
    return {
        (tag, event.step): event.value
        for tag in TAGS
        if tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
