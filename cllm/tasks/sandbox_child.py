"""The inside of the sandbox. `cllm.tasks.sandbox` runs this file as a script of its own in a bare interpreter.

It imports nothing of ours and stays small. Two processes: the warden (this script's first process) reads the job from
standard input, enters new namespaces where it may, and forks; the program runs in the fork, as another user where that
is possible, under resource limits and an audit hook. The warden kills and reaps it when its time is over.
"""

import _posixsubprocess
import contextlib
import ctypes
import json
import os
import posix
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

STARTED = b"S"  # written before the program runs, so that a broken sandbox is not taken for a failing program
TIMED_OUT = 124  # the warden's exit status, as that of timeout(1)

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 2

# The range that systemd keeps for users who exist only while a service runs: they own no files. A user of its own for
# each program makes RLIMIT_NPROC count this program's processes alone. Containers that map fewer users have "nobody".
TRANSIENT_USERS = range(61184, 65520)
NOBODY = 65534

# Audit events that are refused whatever their arguments, by prefix. Without links and os.chdir, a relative path leads
# out of the working folder only through "..", which its spelling shows.
REFUSED = (
    "ctypes.", "gc.get_", "os.chdir", "os.exec", "os.fork", "os.kill", "os.link", "os.posix_spawn", "os.symlink",
    "os.system", "pty.spawn", "resource.", "signal.pthread_kill", "socket.", "sqlite3.", "subprocess.",
    "sys._current_frames", "syslog.",
)  # fmt: skip
# Audit events that change the file system, and how many of their first arguments are paths.
CHANGES = {
    "os.chflags": 1, "os.chmod": 1, "os.chown": 1, "os.mkdir": 1, "os.remove": 1, "os.removexattr": 1, "os.rename": 2,
    "os.rmdir": 1, "os.setxattr": 1, "os.truncate": 1, "os.utime": 1,
}  # fmt: skip
# What reaches files, memory or processes without an audit event.
MISSING_CALLS = ("mkfifo", "mknod", "memfd_create")
MISSING_MODULES = ("ctypes", "_ctypes", "_dbm", "_gdbm", "readline")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/zero")


def main() -> int:
    """Run the job on standard input; returns the warden's exit status."""
    job: dict[str, Any] = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the job holds the token: the program must not find it there
    report: int = job["report"]
    _isolate()
    user = TRANSIENT_USERS[os.getpid() % len(TRANSIENT_USERS)]  # of its own, by the process id outside
    child = os.fork()
    if child == 0:
        _run(job, report, user)
    os.close(report)  # the parent sees its end when the last process of the program is gone
    signal.signal(signal.SIGALRM, _raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    try:
        _, status = os.waitpid(child, 0)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return TIMED_OUT
    return 0 if status == 0 else 1


def _run(job: dict[str, Any], report: int, user: int) -> NoReturn:
    status, leave = 1, os._exit
    try:
        folder = os.getcwd()
        _drop_privileges(folder, user)
        _limit_resources(job)
        sources, token = job["sources"], job["token"].encode()
        write = os.write
        # Dataclasses look their module up; and this script must not be importable.
        program = sys.modules["program"] = sys.modules["__main__"] = types.ModuleType("program")
        _forbid(folder)
        write(report, STARTED)
        for number, source in enumerate(sources):
            exec(compile(source, f"<part {number}>", "exec", dont_inherit=True), program.__dict__)
        write(report, token)
        status = 0
    except BaseException:  # SystemExit too: leaving early is no success
        traceback.print_exc(limit=-10)  # the end of it: a deep recursion has millions of frames
    finally:
        with contextlib.suppress(BaseException):  # the program may have put anything in its place
            sys.stdout.flush()
        leave(status)


def _raise_timeout(*_: object) -> NoReturn:
    raise TimeoutError


def _isolate() -> None:
    """New namespaces, so without network, and without a sight of other processes; where forbidden, go on without."""
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    # Root needs no user namespace, and in one would stay root to the kernel, which RLIMIT_NPROC does not bind.
    ctypes.CDLL(None).unshare(flags if os.geteuid() == 0 else flags | CLONE_NEWUSER)


def _drop_privileges(folder: str, user: int) -> None:
    libc = ctypes.CDLL(None)
    if os.geteuid() == 0:
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        dropped = _become_other(folder, (user, NOBODY))
        # An interpreter below /root is readable to root only; the audit hook keeps the program to the library.
        kept = 1 << CAP_DAC_READ_SEARCH if dropped and not os.access(os.__file__, os.R_OK) else 0
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # last, for a change of user undoes it


def _become_other(folder: str, users: tuple[int, ...]) -> bool:
    """Become the first of `users` that may be become, and give it the folder; False where none may."""
    for user in users:
        try:
            os.chown(folder, user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return True
        except OSError:
            continue
    return False


def _limit_resources(job: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: int(job["seconds"]) + 1,
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: job["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _forbid(folder: str) -> None:
    """Install the audit hook and take away what it does not see."""
    for module in (os, posix):
        for name in MISSING_CALLS:
            if hasattr(module, name):
                delattr(module, name)
    sys.modules.update(dict.fromkeys(MISSING_MODULES))  # type: ignore[arg-type]  # None: the import fails
    _posixsubprocess.fork_exec = _refuse_process
    sys.addaudithook(_hook(folder, os.path.dirname(os.__file__)))


def _refuse_process(*_: object) -> NoReturn:
    raise PermissionError("the sandbox starts no processes")


def _hook(folder: str, library: str) -> Callable[[str, tuple[Any, ...]], None]:
    # Bound here, so that the program cannot put its own in their place.
    join, normalise, decode, is_folder = os.path.join, os.path.normpath, os.fsdecode, os.path.isdir

    def resolve(path: Any) -> str:
        return normalise(join(folder, decode(path)))

    def below(path: str, root: str) -> bool:
        return path == root or path.startswith(root + "/")

    def may_open(path: str, flags: int) -> bool:
        if below(path, folder) or path in DEVICES:
            return True
        # An open folder of the library would be a start for relative paths, which their spelling does not show.
        return below(path, library) and not flags & WRITING and not is_folder(path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            opened = arguments[0]  # a number: a file that is open already
            allowed = isinstance(opened, int) or may_open(resolve(opened), arguments[2])
        elif event in CHANGES:
            paths = arguments[: CHANGES[event]]
            allowed = event == "os.truncate" and isinstance(paths[0], int)  # needs a file open for writing
            allowed = allowed or all(not isinstance(path, int) and below(resolve(path), folder) for path in paths)
        else:
            allowed = not event.startswith(REFUSED)
        if not allowed:
            raise PermissionError(f"the sandbox refuses {event}")

    return hook


if __name__ == "__main__":
    sys.exit(main())
