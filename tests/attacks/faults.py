"""Run work in a process of its own and decide, before each of its file-system calls, whether it may happen.

Linux asks this process by seccomp's notifications, so the calls of every thread and of every library are seen, those of
Rust and C++ too. Nothing is asked about files outside one folder.
"""

from __future__ import annotations

import array  # noqa: F401 (socket.send_fds would import it where no file can be opened any more)
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# name: (number on x86-64, number on ARM64, where its paths are). `p0`: the path in argument 0; `a0`: a directory's
# descriptor in argument 0 and the path in the next; `f0`: an open file.
_CALLS: dict[str, tuple[int | None, int | None, str]] = {
    "read": (0, 63, "f0"),
    "write": (1, 64, "f0"),
    "open": (2, None, "p0"),
    "stat": (4, None, "p0"),
    "fstat": (5, 80, "f0"),
    "lstat": (6, None, "p0"),
    "pread64": (17, 67, "f0"),
    "pwrite64": (18, 68, "f0"),
    "readv": (19, 65, "f0"),
    "writev": (20, 66, "f0"),
    "access": (21, None, "p0"),
    "sendfile": (40, 71, "f0"),
    "flock": (73, 32, "f0"),
    "fsync": (74, 82, "f0"),
    "fdatasync": (75, 83, "f0"),
    "truncate": (76, 45, "p0"),
    "ftruncate": (77, 46, "f0"),
    "rename": (82, None, "p0 p1"),
    "mkdir": (83, None, "p0"),
    "rmdir": (84, None, "p0"),
    "creat": (85, None, "p0"),
    "link": (86, None, "p0 p1"),
    "unlink": (87, None, "p0"),
    "symlink": (88, None, "p1"),
    "readlink": (89, None, "p0"),
    "statfs": (137, 43, "p0"),
    "fstatfs": (138, 44, "f0"),
    "getdents64": (217, 61, "f0"),
    "openat": (257, 56, "a0"),
    "mkdirat": (258, 34, "a0"),
    "newfstatat": (262, 79, "a0"),
    "unlinkat": (263, 35, "a0"),
    "renameat": (264, 38, "a0 a2"),
    "linkat": (265, 37, "a0 a2"),
    "symlinkat": (266, 36, "a1"),
    "readlinkat": (267, 78, "a0"),
    "faccessat": (269, 48, "a0"),
    "utimensat": (280, 88, "a0"),
    "fallocate": (285, 47, "f0"),
    "preadv": (295, 69, "f0"),
    "pwritev": (296, 70, "f0"),
    "renameat2": (316, 276, "a0 a2"),
    "copy_file_range": (326, 285, "f2"),
    "statx": (332, 291, "a0"),
    "openat2": (437, 437, "a0"),
    "faccessat2": (439, 439, "a0"),
}
_SYNCS = {"fsync", "fdatasync"}
_WRITES = {"write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "fallocate"}
_GROWS = {"mkdir", "mkdirat", "creat", "link", "linkat", "symlink", "symlinkat"}
_MOVES = {"rename", "renameat", "renameat2", "truncate", "ftruncate", "utimensat", "flock"}
_LOOKUPS = {
    "stat",
    "lstat",
    "newfstatat",
    "statx",
    "access",
    "faccessat",
    "faccessat2",
    "readlink",
    "readlinkat",
}
_REMOVES = {"unlink", "unlinkat", "rmdir"}
_MACHINE = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
_SECCOMP = (317, 277)

# A call that is being asked about is not cut short by a signal, as most calls on files never are (Linux 5.19).
_NEW_LISTENER, _WAIT_KILLABLE = 8, 32
_USER_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_PAGE = 4096
_SECONDS = 120
KILL, TERMINATE = -1, -2


@dataclass(frozen=True)
class Call:
    """A file-system call that a process is about to make, with the paths that it is about."""

    name: str
    paths: tuple[str, ...]
    creates: bool

    @property
    def needs_space(self) -> bool:
        """Whether a full disk could refuse it."""
        return self.creates or self.name in _WRITES | _GROWS | _SYNCS

    @property
    def changes(self) -> bool:
        return self.needs_space or self.removes or self.name in _MOVES

    @property
    def looks_up(self) -> bool:
        return self.name in _LOOKUPS

    @property
    def removes(self) -> bool:
        return self.name in _REMOVES

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.paths)})"


# What happens at a call: None lets it pass, an errno is its answer; `KILL` and `TERMINATE` are signals before it.
Decide = Callable[[Call], int | None]


@dataclass(frozen=True)
class Ended:
    """How the process ended: its exit code (negative: a signal's number; None: it hung) and what it printed."""

    code: int | None
    printed: str


def why_not() -> str:
    """Why processes cannot be watched here; empty where they can."""
    if sys.platform != "linux" or _MACHINE is None:
        return "seccomp's numbers are known for Linux on x86-64 and ARM64"
    ended = watch(lambda: 0, Path("/nonexistent"), lambda call: None)
    return "" if ended.code == 0 else f"this kernel has no seccomp notifications ({ended.printed[-200:]})"


def watch(work: Callable[[], int], folder: Path, decide: Decide) -> Ended:
    """Run ``work`` in a forked process, whose exit code it returns; ``decide`` is asked before each call on ``folder``.

    Syncs are answered at once, as if the disk had taken everything: they would be most of the time.
    """
    ours, theirs = socket.socketpair()
    log = os.memfd_create("printed")
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = _be_watched(work, theirs, log)
        finally:
            # Whatever is raised, a signal that comes late too, must not go on in this copy of the caller.
            os._exit(code)
    theirs.close()
    try:
        _, (listener, *_), _, _ = socket.recv_fds(ours, 1, 1) or (b"", [-1], 0, None)
    except ValueError:
        listener = -1
    try:
        hung = listener >= 0 and not _answer(listener, pid, str(folder), decide)
        if hung:
            os.kill(pid, signal.SIGKILL)
    finally:
        if listener >= 0:
            os.close(listener)
        ours.close()
    _, status = os.waitpid(pid, 0)
    printed = os.pread(log, 1 << 20, 0).decode(errors="replace")
    os.close(log)
    return Ended(None if hung else os.waitstatus_to_exitcode(status), printed)


def _be_watched(work: Callable[[], int], channel: socket.socket, log: int) -> int:
    """In the new process: from here on each call waits for an answer."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        socket.send_fds(channel, [b"."], [_install()])
        code = work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("yes", ctypes.c_ubyte),
        ("no", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _install() -> int:
    """Have the calls of this thread, and of those that it starts, asked about; returns the descriptor that asks."""
    numbers = sorted(_names())
    steps = [(0x20, 0, 0, 0)]
    steps += [(0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    steps += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _USER_NOTIFY)]
    program = _Program(len(steps), (_Instruction * len(steps))(*steps))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges: what a process needs to filter its own calls
    listener = libc.syscall(_SECCOMP[_MACHINE or 0], 1, _NEW_LISTENER | _WAIT_KILLABLE, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(listener)


def _names() -> dict[int, str]:
    found = ((entry[_MACHINE or 0], name) for name, entry in _CALLS.items())
    return {int(number): name for number, name in found if isinstance(number, int)}


def _answer(listener: int, pid: int, folder: str, decide: Decide) -> bool:
    """Answer every question until the process ends, or is killed; False when it takes too long."""
    names, until = _names(), time.monotonic() + _SECONDS
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while time.monotonic() < until:
        events = poll.poll(1000)
        if not events:
            continue
        if not events[0][1] & select.POLLIN:
            return True
        asked = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, asked)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            raise
        number, thread, _, which, _, _, *arguments = struct.unpack("<QIIiIQ6Q", asked)
        name = names[which]
        paths = _paths(name, thread, arguments)
        answer = 0
        if any(path == folder or path.startswith(folder + "/") for path in paths):
            decided = decide(Call(name, paths, _creates(name, arguments)))
            if decided == KILL:
                os.kill(pid, signal.SIGKILL)
                return True
            if decided == TERMINATE:
                os.kill(pid, signal.SIGTERM)
            else:
                answer = decided or 0
        passes = answer == 0 and name not in _SYNCS
        try:
            fcntl.ioctl(listener, _SEND, struct.pack("<QqiI", number, 0, -answer, _CONTINUE if passes else 0))
        except OSError as error:
            # A signal ended the call meanwhile.
            if error.errno != errno.ENOENT:
                raise
    return False


def _creates(name: str, arguments: list[int]) -> bool:
    flags = {"open": 1, "openat": 2}.get(name)
    return flags is not None and bool(arguments[flags] & os.O_CREAT)


def _paths(name: str, thread: int, arguments: list[int]) -> tuple[str, ...]:
    found = []
    for place in _CALLS[name][2].split():
        kind, at = place[0], int(place[1])
        if kind == "f":
            found.append(_open_file(thread, arguments[at]))
            continue
        base = "cwd" if kind == "p" else arguments[at]
        path = _text(thread, arguments[at + (kind == "a")])
        if not path.startswith("/"):
            path = f"{_open_file(thread, base)}/{path}"
        found.append(os.path.normpath(path))
    return tuple(found)


def _open_file(thread: int, descriptor: int | str) -> str:
    if isinstance(descriptor, int):
        signed = ctypes.c_int(descriptor & 0xFFFFFFFF).value
        descriptor = "cwd" if signed == -100 else f"fd/{signed}"
    try:
        return str(Path(f"/proc/{thread}/{descriptor}").readlink())
    except OSError:
        return ""


def _text(thread: int, address: int) -> str:
    """The string at an address of the process."""
    if not address:
        return ""
    raw = b""
    try:
        with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
            while b"\0" not in raw:
                memory.seek(address + len(raw))
                raw += memory.read(_PAGE - (address + len(raw)) % _PAGE)
    except OSError:
        return ""
    return os.fsdecode(raw.partition(b"\0")[0])
