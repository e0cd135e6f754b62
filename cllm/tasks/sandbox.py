"""Running programs that a language model wrote.

What holds, and through what:

- Time, memory, file size, open files: resource limits, and a wall clock kept by a process that the program cannot see.
- Success: a token that only the harness knows comes back through a pipe after the last source has run. Leaving early
  with any status, or printing anything, is a failure.
- Output: read and thrown away beyond a limit.
- Network, other processes: new namespaces (Linux, as root or where user namespaces are allowed), and an audit hook that
  refuses sockets, forks, executions and signals.
- Files: the audit hook allows writing below a fresh folder and reading there and in the standard library. As root, the
  program also runs as a user who owns nothing and without capabilities, except that to read an interpreter which only
  root can read.

What does not hold: the audit hook and the token live in the program's own interpreter. A program that sets out to break
CPython, or searches the interpreter's frames for the token, can get past them. As root, and elsewhere with user
namespaces, the kernel still keeps it off the network and other processes; off the files, only as root. Where
namespaces are forbidden and the harness is not root, only the hook stands between the program and the harness's user,
and RLIMIT_NPROC counts that user's other processes too: run the harness in a container of its own there. The number of
files written is not limited, only the size of each.
"""

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from cllm.tasks import sandbox_child

_CHILD = Path(sandbox_child.__file__)
_GRACE_SECONDS = 10.0  # how long the warden may take beyond its own time limit before it is killed as well
_CHUNK = 1 << 16
_REPORT_BYTES = 64  # more than the start mark and the token


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one program may use."""

    seconds: float = 5.0  # of wall time; of processor time, a second more
    memory_bytes: int = 1 << 30  # address space of each process, the interpreter's included
    processes: int = 8  # with threads; forks are refused anyway
    file_bytes: int = 1 << 20  # of each file written
    open_files: int = 64
    output_bytes: int = 1 << 14  # kept of standard output and error together


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: `passed` only if all sources ran to their end.
        output: the start of standard output and error, with the traceback of a failure if it fitted.
    """

    status: Literal["passed", "failed", "timeout"]
    output: str


def run_program(sources: Sequence[str], limits: SandboxLimits) -> Outcome:
    """Run Python sources one after the other in one namespace; only the standard library can be imported.

    Raises:
        RuntimeError: the sandbox itself could not start the program.
    """
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        return _run_in(folder, sources, limits)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_programs(programs: Sequence[Sequence[str]], limits: SandboxLimits, *, workers: int) -> list[Outcome]:
    """`run_program` of each, `workers` at a time, in the given order."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(lambda sources: run_program(sources, limits), programs))


def _run_in(folder: str, sources: Sequence[str], limits: SandboxLimits) -> Outcome:
    token = secrets.token_hex(16)
    report_end, child_end = os.pipe()
    with open(report_end, "rb", buffering=0) as report:
        with open(child_end, "wb", buffering=0), tempfile.TemporaryFile("w+", encoding="utf-8") as job:
            json.dump({"sources": list(sources), "token": token, "report": child_end, **asdict(limits)}, job)
            job.seek(0)
            process = _start(folder, job, child_end)
        try:
            reported, output = _listen(process, report, limits)
            status = process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            reported, output, status = b"", b"", sandbox_child.TIMED_OUT
        finally:
            _end(process)
    text = output.decode("utf-8", errors="replace")
    if status == sandbox_child.TIMED_OUT:
        return Outcome("timeout", text)
    if not reported.startswith(sandbox_child.STARTED):
        raise RuntimeError(f"the sandbox could not start a program (exit status {status}): {text}")
    passed = secrets.compare_digest(reported, sandbox_child.STARTED + token.encode())
    return Outcome("passed" if passed else "failed", text)


def _start(folder: str, job: IO[str], report: int) -> "subprocess.Popen[bytes]":
    # No site packages, no user folder, nothing of ours on the path; the hash seed makes the order in sets repeatable.
    return subprocess.Popen(
        [sys.executable, "-S", "-s", "-P", "-B", str(_CHILD)],
        stdin=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(report,),
        cwd=folder,
        env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        start_new_session=True,
    )


def _listen(process: "subprocess.Popen[bytes]", report: IO[bytes], limits: SandboxLimits) -> tuple[bytes, bytes]:
    """What came through the report pipe until its end, and the start of the output.

    Raises:
        subprocess.TimeoutExpired: the warden did not keep its own time limit.
    """
    assert process.stdout is not None
    pipes = {process.stdout.fileno(): limits.output_bytes, report.fileno(): _REPORT_BYTES}
    received = dict.fromkeys(pipes, b"")
    deadline = time.monotonic() + limits.seconds + _GRACE_SECONDS
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            if not ready:
                raise subprocess.TimeoutExpired(process.args, limits.seconds)
            for key, _ in ready:
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(key.fd)
                received[key.fd] += data[: pipes[key.fd] - len(received[key.fd])]
    return received[report.fileno()], received[process.stdout.fileno()]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of the process group, and reap."""
    # Before the wait: until it is reaped, the warden keeps the group's number from being given to others.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
