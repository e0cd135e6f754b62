"""Running jobs as a user does, and killing them as the world does."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cllm.layout import RunLayout
from cllm.recipe import Recipe
from cllm.recipes import get_recipe

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 150  # for what takes seconds on an idle machine


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run folder with all five outputs, and what the pipeline printed on the way."""

    recipe: Recipe
    overrides: tuple[str, ...]
    done: subprocess.CompletedProcess[str]

    @property
    def layout(self) -> RunLayout:
        return RunLayout.of(self.recipe)

    def copy(self, root: Path, *parts: str) -> "FinishedRun":
        """The same run elsewhere with only the outputs named; the test may do with it what it likes."""
        for part in parts:
            shutil.copytree(self.layout.root / part, root / part)
        return finished_run((f"output={root}", *self.overrides[1:]), self.done)


def finished_run(overrides: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> FinishedRun:
    return FinishedRun(get_recipe("debug").with_overrides(overrides), overrides, done)


def arguments(overrides: tuple[str, ...], recipe: str = "debug", *, flag: str = "--recipe") -> list[str]:
    return [flag, recipe, *(word for override in overrides for word in ("--set", override))]


def run_job(
    job: str, overrides: tuple[str, ...], *, cwd: Path, flag: str = "--recipe", more: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end on a local Ray of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments(overrides, flag=flag), *more],
        cwd=cwd,
        env=_environment() | env,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )


class KilledJob:
    """A job in a session of its own. Ray gives its daemons process groups of their own, so that killing the driver's
    group leaves them; they are known by the temporary folder that only this job's Ray uses."""

    def __init__(self, job: str, overrides: tuple[str, ...], *, cwd: Path, folder: str, log: Path, flag: str) -> None:
        self._folder = folder
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments(overrides, flag=flag)],
                cwd=cwd,
                env=_environment() | {"RAY_TMPDIR": folder},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll fast: what the test waits for may be over soon."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"the job ended too early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.log.read_text()}"
            time.sleep(0.002)

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)

    def find(self, title: str) -> list[psutil.Process]:
        """The job's Ray workers of that title ("ray::CLASS")."""
        return [process for process in self._processes() if _title(process).startswith(title)]

    def kill(self) -> None:
        """SIGKILL to the driver's group first, as a terminal or a scheduler does, then to all of its Ray."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        deadline = time.monotonic() + 30
        while left := self._processes():  # more than one round: a raylet may start a worker meanwhile
            assert time.monotonic() < deadline, f"left behind: {left}"
            for process in left:
                _kill(process)
            time.sleep(0.05)

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _uses(process, self._folder)]


@contextmanager
def killed_job(job: str, overrides: tuple[str, ...], *, cwd: Path, flag: str = "--recipe") -> Iterator[KilledJob]:
    """A running job, of which nothing is left afterwards."""
    # Ray puts sockets into its folder, whose path must be shorter than 108 characters: pytest's is too long.
    folder = tempfile.mkdtemp(prefix="ray-")
    try:
        started = KilledJob(job, overrides, cwd=cwd, folder=folder, log=cwd / f"{job}.log", flag=flag)
        try:
            yield started
        finally:
            started.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | quiet


def _uses(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get("RAY_TMPDIR") == folder or any(folder in word for word in process.cmdline())
    except psutil.Error:  # gone, a zombie, or somebody else's
        return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
