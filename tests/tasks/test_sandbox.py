"""What tries to get out, or to pass without passing, does neither."""

import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest

from cllm.tasks import sandbox
from cllm.tasks.sandbox import Outcome, SandboxLimits, run_program, run_programs

LIMITS = SandboxLimits(seconds=20.0, memory_bytes=256 << 20, output_bytes=4000)
SHORT = SandboxLimits(seconds=0.5)
GUESS_THE_TOKEN = """
import os
for fd in range(1, 20):
    try:
        os.write(fd, b"S" + b"0" * 32)
    except OSError:
        pass
os._exit(0)
"""
DEAF = """
import signal
for number in (1, 2, 3, 14, 15):
    signal.signal(number, signal.SIG_IGN)
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""
KILL_THE_HARNESS = f"""
import os, signal
for kill in (os.kill, os.killpg):
    try:
        kill({os.getpid()}, signal.SIGKILL)
    except PermissionError:
        pass
1 / 0
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox uses what Linux has")


def run(source: str, limits: SandboxLimits = LIMITS) -> Outcome:
    return run_program([source], limits)


def children() -> set[str]:
    """The processes, zombies included, whose parent is this one."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            if stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(stat.parent.name)
    return found


def test_a_program_that_ends_passes_and_its_output_comes_back() -> None:
    assert run("print('héllo')") == Outcome("passed", "héllo\n")


def test_sources_share_one_namespace_and_all_must_end() -> None:
    assert run_program(["x = 1", "assert x == 1"], LIMITS).status == "passed"
    assert run_program(["x = 1", "assert x == 2"], LIMITS).status == "failed"
    assert run_program(["x = '''", "y = 1", "'''"], LIMITS).status == "failed"


def test_the_standard_library_is_there_and_nothing_else() -> None:
    ok = "import collections, dataclasses, hashlib, heapq, itertools, math, random, re, string, typing"
    assert run(ok).status == "passed"
    for other in ("torch", "cllm", "sandbox_child", "pytest"):
        assert "ModuleNotFoundError" in run(f"import {other}").output


def test_threads_and_files_of_its_own_are_allowed() -> None:
    source = """
import os, tempfile, threading
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
open("a", "w").write("x"); os.rename("a", "b"); assert open("b").read() == "x"; os.remove("b")
with tempfile.TemporaryDirectory(dir=".") as folder: open(folder + "/c", "w").close()
assert os.listdir(".") == []
"""
    assert run(source) == Outcome("passed", "thread\n")


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError",
        "assert False",
        "def (",
        "x = '\ud800'",
        "\0",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "exit()",
        "import os; os._exit(0)",
        "import os; os.close(3); os.close(4); os.close(5)\nraise KeyboardInterrupt",
        GUESS_THE_TOKEN,
        "print('S' + '0' * 32); import os; os._exit(0)",
        "def f(): return f()\nf()",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): return sorted([1], key=lambda _: f())\nf()",
        "import sys; sys.stdout = None; 1 / 0",
    ],
)
def test_what_does_not_run_to_its_end_fails(source: str) -> None:
    assert run(source).status == "failed"


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(1000)"])
def test_an_endless_program_times_out(source: str) -> None:
    assert run(source, SHORT).status == "timeout"


def test_an_endless_program_that_ignores_signals_times_out() -> None:
    assert run(DEAF, SHORT).status == "timeout"


def test_huge_output_is_cut() -> None:
    outcome = run("for _ in range(200): print('x' * 100_000)")
    assert outcome == Outcome("passed", "x" * LIMITS.output_bytes)


def test_endless_output_is_cut_and_times_out() -> None:
    outcome = run("while True: print('x' * 100_000)", SHORT)
    assert outcome == Outcome("timeout", "x" * SHORT.output_bytes)


def test_memory_is_limited() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 30)").output
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))").status == "failed"
    assert run("x = bytearray(64 << 20)").status == "passed"


def test_the_size_of_files_is_limited() -> None:
    assert "File too large" in run("f = open('a', 'wb')\nfor _ in range(9): f.write(b'x' * (1 << 20))").output


def test_open_files_are_limited() -> None:
    assert "Too many open files" in run("x = [open('/dev/null') for _ in range(1000)]").output


@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "os.forkpty()",
        "os.system('true')",
        "os.popen('true')",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['/bin/true'])",
        "_posixsubprocess.fork_exec()",
        "multiprocessing.Process(target=print).start()",
    ],
)
def test_processes_are_refused(call: str) -> None:
    outcome = run(f"import multiprocessing, os, subprocess, _posixsubprocess\n{call}")
    assert outcome.status == "failed"
    assert "PermissionError: the sandbox" in outcome.output


def test_a_fork_bomb_that_catches_errors_does_nothing() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except PermissionError: pass"
    assert run(bomb, SHORT).status == "timeout"


def test_threads_are_limited() -> None:
    start = "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    assert "can't start new thread" in run(f"import threading, time\nfor _ in range(100): {start}").output


@pytest.mark.parametrize("victim", ["os.getppid()", "os.getpid()", "-1", "0", "1"])
def test_signals_are_refused(victim: str) -> None:
    source = f"import os, signal\nos.kill({victim}, signal.SIGKILL)"
    assert "PermissionError: the sandbox refuses os.kill" in run(source).output


def test_killing_the_harness_does_not_reach_it() -> None:
    assert run(KILL_THE_HARNESS).status == "failed"


@pytest.mark.parametrize(
    "call",
    [
        "open(path, 'w')",
        "open(path, 'a')",
        "open(path, 'r+')",
        "open(path)",
        "open('../' * 9 + path, 'w')",
        "open(path.encode(), 'w')",
        "open(pathlib.Path(path), 'w')",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "io.FileIO(path, 'w')",
        "os.remove(path)",
        "os.rename(path, 'mine')",
        "os.rename('/dev/null', path)",
        "os.truncate(path, 0)",
        "os.chmod(path, 0)",
        "os.utime(path)",
        "os.symlink(path, 'mine')",
        "os.link(path, 'mine')",
        "os.chdir(folder)",
        "os.mkdir(path + '.new')",
        "os.rmdir(folder)",
        "os.mkfifo(path + '.new')",
        "os.mknod(path + '.new')",
        "os.open(folder, os.O_RDONLY)",
        "os.open(os.path.dirname(os.__file__), os.O_RDONLY)",
        "open(os.__file__, 'a')",
        "shutil.rmtree(folder)",
        "shutil.copy(os.__file__, path)",
        "sqlite3.connect(path)",
        "__import__('ctypes')",
    ],
)
def test_files_outside_are_refused(tmp_path: Path, call: str) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    tmp_path.chmod(0o777)
    path.chmod(0o666)
    names = f"path, folder = {str(path)!r}, {str(tmp_path)!r}\n"
    assert (
        run(f"import io, os, pathlib, shutil\ntry: import sqlite3\nexcept ImportError: pass\n{names}{call}").status
        == "failed"
    )
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_the_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        source = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
        assert run(source).status == "failed"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "call",
    [
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair()",
        "socket.getaddrinfo('localhost', 80)",
        "urllib.request.urlopen('http://127.0.0.1')",
    ],
)
def test_sockets_of_all_kinds_are_refused(call: str) -> None:
    outcome = run(f"import socket, urllib.request\n{call}")
    assert outcome.status == "failed"
    assert "the sandbox refuses socket." in outcome.output


def test_the_program_cannot_look_for_the_token_among_all_objects() -> None:
    for call in ("gc.get_objects()", "gc.get_referrers(1)", "sys._current_frames()"):
        assert "PermissionError" in run(f"import gc, sys\n{call}").output
    assert run("import __main__; __main__.main").status == "failed"
    assert run("assert open(0).read() == ''").status == "passed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_runs_programs_as_somebody_else() -> None:
    source = "import os; assert os.getuid() and os.geteuid() and os.getgid() and not os.getgroups(); os.setuid(0)"
    assert "Operation not permitted" in run(source).output


def test_folders_and_processes_are_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    before = children()
    assert run("open('a', 'w'); print(1)").output == "1\n"
    assert run("open('a', 'w')\nwhile True: pass", SHORT).status == "timeout"
    assert list(tmp_path.iterdir()) == []
    assert children() == before


def test_a_sandbox_that_does_not_start_is_no_failing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "child.py"
    broken.write_text("raise OSError('nothing works')")
    monkeypatch.setattr(sandbox, "_CHILD", broken)
    with pytest.raises(RuntimeError, match="could not start"):
        run("pass")


def test_many_programs_keep_their_order() -> None:
    outcomes = run_programs([[f"assert {i} % 3"] for i in range(7)], LIMITS, workers=3)
    assert [o.status == "passed" for o in outcomes] == [bool(i % 3) for i in range(7)]
