"""A process whose calls of the system its parent sees before they happen: any of them can fail, come late, be cut short, or be the last.

Linux tells the parent (``seccomp`` notifications), so it makes no difference which library makes a call, or in what language it was written:
Lance's own files are seen like ours.
"""

from __future__ import annotations

import array
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
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker import Worker

ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        317,
        438,
        {
            "read": 0, "write": 1, "open": 2, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "fsync": 74,
            "flock": 73, "fdatasync": 75, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87, "getdents64": 217,
            "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "preadv": 295,
            "pwritev": 296, "renameat2": 316, "copy_file_range": 326, "statx": 332,
        },
    ),
    "aarch64": (
        0xC00000B7,
        277,
        438,
        {
            "flock": 32, "mkdirat": 34, "unlinkat": 35, "linkat": 37, "renameat": 38, "ftruncate": 46, "openat": 56, "getdents64": 61,
            "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69, "pwritev": 70,
            "newfstatat": 79, "fsync": 82, "fdatasync": 83, "renameat2": 276, "copy_file_range": 285, "statx": 291,
        },
    ),
}  # fmt: skip

# Of a call: what it does, and which of its arguments are file descriptors (f), folders with the path behind them (d), or paths (p).
CALLS = {
    "read": ("read", "f"), "pread64": ("read", "f"), "readv": ("read", "f"), "preadv": ("read", "f"),
    "write": ("write", "f"), "pwrite64": ("write", "f"), "writev": ("write", "f"), "pwritev": ("write", "f"),
    "copy_file_range": ("write", "..f"), "ftruncate": ("truncate", "f"), "fsync": ("sync", "f"), "fdatasync": ("sync", "f"),
    "flock": ("lock", "f"),
    "open": ("open", "p"), "openat": ("open", "d"), "getdents64": ("list", "f"), "newfstatat": ("stat", "d"), "statx": ("stat", "d"),
    "mkdir": ("mkdir", "p"), "mkdirat": ("mkdir", "d"), "rmdir": ("rmdir", "p"), "unlink": ("unlink", "p"), "unlinkat": ("unlink", "d"),
    "rename": ("rename", "pp"), "renameat": ("rename", "d.d"), "renameat2": ("rename", "d.d"),
    "link": ("link", "pp"), "linkat": ("link", "d.d"),
}  # fmt: skip

READING = ("open", "read", "stat", "list")
AT_FDCWD, AT_REMOVEDIR = 0xFFFFFF9C, 0x200
RENAME_NOREPLACE = 1

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_USER_NOTIF, _ALLOW = 0x7FC00000, 0x7FFF0000
# A new listener, for all threads, which a signal does not tear out of a call that is being looked at.
_FLAGS = (1 << 3) | (1 << 0) | (1 << 4) | (1 << 5)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Call:
    """One call of the system on a file below the watched folder, before it is made. Paths are relative to that folder."""

    kind: str
    path: str
    to: str = ""
    name: str = ""
    #: Only where the child is recorded: what is written, and where.
    data: bytes = b""
    offset: int = 0
    #: Of an open: how; of a rename: whether it may replace.
    flags: int = 0
    replaces: bool = True


@dataclass(frozen=True)
class Fault:
    """What happens in place of a call.

    ``error``: it fails. ``done``: it happens, and its answer is the error (as of a network disk whose answer was lost). ``short``: half of it
    happens, where it is a read or a write of two bytes or more. ``late``: after `seconds`. ``kill``: the process ends before it.
    """

    how: str
    code: int = errno.EIO
    seconds: float = 0.0


def supported() -> str:
    """Empty, or why calls cannot be watched on this machine."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return f"calls of the system are watched on Linux ({', '.join(ARCHITECTURES)}) only"
    try:
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text()
    except OSError:
        return "this system has no seccomp"
    return (
        ""
        if "user_notif" in actions.split()
        else "this kernel does not tell of system calls (5.19 or later does)"
    )


# In the child.


def _watch(numbers: list[int], arch: int, seccomp: int) -> int:
    """From now on these calls of all threads wait for whoever has the descriptor that is returned."""

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    load, equals, answer = 0x20, 0x15, 0x06
    count = len(numbers)
    program = step(load, 4) + step(equals, arch, 0, count + 1) + step(load, 0)
    for index, number in enumerate(numbers):
        program += step(equals, number, count - index, 0)
    program += step(answer, _ALLOW) + step(answer, _USER_NOTIF)
    kept = ctypes.create_string_buffer(program)
    given = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(kept)))
    if _libc.prctl(38, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    listener: int = _libc.syscall(seccomp, 1, _FLAGS, given)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def watch_me(connection: socket.socket) -> None:
    """From now on calls of this process wait for the other end of the connection."""
    arch, seccomp, _, numbers = ARCHITECTURES[platform.machine()]
    rights = array.array("i", [_watch(list(numbers.values()), arch, seccomp)]).tobytes()
    connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


# In the parent.


class Watched(Worker):
    """A worker whose calls below `root` go through `policy`, which gets each `Call` before it is made and gives a `Fault`, or None to let
    it happen, in a thread of this process. With `record` a call says what it writes."""

    def __init__(
        self, root: Path, modules: list[str], record: bool = False, env: dict[str, str] | None = None
    ) -> None:
        self.root = str(root.resolve())
        self.policy: Callable[[Call], Fault | None] | None = None
        #: Called where what `policy` gave cannot be done to a call, which happens as it is then.
        self.undone: Callable[[], None] | None = None
        self.record = record
        super().__init__(modules, watched=True, env=env)
        _, rights, _, _ = self.connection.recvmsg(1, socket.CMSG_SPACE(4))
        if not rights:
            raise RuntimeError(f"the child ended before it began: exit code {self.process.wait()}")
        self._listener = array.array("i", rights[0][2])[0]
        self._pidfd = os.pidfd_open(self.process.pid)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        super().close()
        self._thread.join()
        os.close(self._listener)
        os.close(self._pidfd)

    def _loop(self) -> None:
        _, _, self._getfd, numbers = ARCHITECTURES[platform.machine()]
        names = {number: name for name, number in numbers.items()}
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while True:
            (_, events), *_ = poll.poll()
            if not events & select.POLLIN:
                return
            request = bytearray(80)
            try:
                fcntl.ioctl(self._listener, _RECEIVE, request, True)
            except OSError as error:
                # The thread is gone since.
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                raise
            id_, pid, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", request)
            value, code = 0, None
            try:
                value, code = self._decide(pid, names[number], arguments)
            except (ProcessLookupError, FileNotFoundError):
                pass
            except BaseException as error:
                self.failed = error
            flags = 1 if code is None else 0
            answer = struct.pack("=QqiI", id_, value, -(code or 0), flags)
            try:
                fcntl.ioctl(self._listener, _SEND, answer)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise

    def _decide(self, pid: int, name: str, arguments: list[int]) -> tuple[int, int | None]:
        """The answer of a call, and its error; None lets the call happen."""
        if self.policy is None:
            return 0, None
        call = self._call(pid, name, arguments)
        if call is None:
            return 0, None
        fault = self.policy(call)
        if fault is None:
            return 0, None
        if fault.how == "late":
            time.sleep(fault.seconds)
            return 0, None
        if fault.how == "kill":
            os.kill(self.process.pid, signal.SIGKILL)
            return 0, fault.code
        if fault.how == "short":
            done = self._half(pid, name, arguments)
            if done is not None:
                return done, 0
            if self.undone is not None:
                self.undone()
            return 0, None
        if fault.how == "done":
            try:
                self._do(pid, call, name, arguments)
            except OSError as error:
                return 0, error.errno
        return 0, fault.code

    def _call(self, pid: int, name: str, arguments: list[int]) -> Call | None:
        kind, places = CALLS[name]
        paths: list[str] = []
        for index, place in enumerate(places):
            if place == "f":
                paths.append(os.readlink(f"/proc/{pid}/fd/{arguments[index]}"))
            elif place == "p":
                paths.append(self._path(pid, AT_FDCWD, arguments[index]))
            elif place == "d":
                paths.append(self._path(pid, arguments[index], arguments[index + 1]))
        if not any(path == self.root or path.startswith(self.root + "/") for path in paths):
            return None
        shown = [path.removeprefix(self.root).lstrip("/") for path in paths]
        flags = arguments[2 if places == "d" else 1] if kind == "open" else 0
        if flags & os.O_CREAT:
            kind = "create"
        if name == "unlinkat" and arguments[2] & AT_REMOVEDIR:
            kind = "rmdir"
        replaces = not (name == "renameat2" and arguments[4] & RENAME_NOREPLACE)
        data, offset = b"", 0
        if self.record and kind in ("write", "truncate"):
            data, offset = self._data(pid, name, arguments)
        return Call(kind, shown[0], shown[1] if len(shown) > 1 else "", name, data, offset, flags, replaces)

    def _path(self, pid: int, folder: int, pointer: int) -> str:
        if pointer == 0:
            return os.readlink(f"/proc/{pid}/fd/{folder}")
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(pointer)
            # To the end of the page at first: what is behind it may not be there.
            text = memory.read(4096 - pointer % 4096)
            if b"\0" not in text:
                text += memory.read(4096)
        path = os.fsdecode(text.split(b"\0", 1)[0])
        if path.startswith("/"):
            return os.path.normpath(path)
        base = os.readlink(
            f"/proc/{pid}/cwd" if folder & 0xFFFFFFFF == AT_FDCWD else f"/proc/{pid}/fd/{folder}"
        )
        return os.path.normpath(os.path.join(base, path)) if path else base

    def _memory(self, pid: int, pointer: int, count: int) -> bytes:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(pointer)
            got = b""
            while len(got) < count:
                got += memory.read(count - len(got))
        return got

    def _data(self, pid: int, name: str, arguments: list[int]) -> tuple[bytes, int]:
        """What a call writes, and where."""
        if name == "ftruncate":
            return b"", arguments[1]
        if name in ("write", "pwrite64"):
            data = self._memory(pid, arguments[1], arguments[2])
        elif name in ("writev", "pwritev"):
            data = b"".join(self._memory(pid, *buffer) for buffer in self._buffers(pid, arguments))
        else:
            raise NotImplementedError(f"{name} is not recorded")
        if name in ("pwrite64", "pwritev"):
            return data, arguments[3]
        info = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/fdinfo/{arguments[0]}").read_text().splitlines()
        )
        if int(info["flags"], 8) & os.O_APPEND:
            return data, os.stat(f"/proc/{pid}/fd/{arguments[0]}").st_size
        return data, int(info["pos"])

    def _own(self, descriptor: int) -> int:
        """The child's open file, with the position that it shares."""
        own: int = _libc.syscall(self._getfd, self._pidfd, descriptor, 0)
        if own < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return own

    def _half(self, pid: int, name: str, arguments: list[int]) -> int | None:
        """Half of a read or a write; None where there is no half of it."""
        if name == "copy_file_range":
            return self._half_a_copy(arguments)
        at = arguments[3] if name in ("pread64", "preadv", "pwrite64", "pwritev") else None
        buffers = [(arguments[1], arguments[2])]
        if name in ("readv", "preadv", "writev", "pwritev"):
            buffers = self._buffers(pid, arguments)
        left = sum(count for _, count in buffers) // 2
        if left == 0:
            return None
        own = self._own(arguments[0])
        try:
            if "write" in name:
                data = b"".join(self._memory(pid, *buffer) for buffer in buffers)[:left]
                return os.write(own, data) if at is None else os.pwrite(own, data, at)
            data = os.read(own, left) if at is None else os.pread(own, left, at)
        finally:
            os.close(own)
        done = len(data)
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            for pointer, count in buffers:
                memory.seek(pointer)
                memory.write(data[:count])
                data = data[count:]
        return done

    def _half_a_copy(self, arguments: list[int]) -> int | None:
        source, source_at, target, target_at, count, _ = arguments
        # Positions of the caller's own would have to be moved on.
        if count < 2 or source_at or target_at:
            return None
        from_, to = self._own(source), self._own(target)
        try:
            return os.copy_file_range(from_, to, count // 2)
        finally:
            os.close(from_)
            os.close(to)

    def _buffers(self, pid: int, arguments: list[int]) -> list[tuple[int, int]]:
        """Address and bytes of each buffer of a call that has several."""
        pieces = self._memory(pid, arguments[1], 16 * arguments[2])
        return [struct.unpack_from("=QQ", pieces, 16 * n) for n in range(arguments[2])]

    def _do(self, pid: int, call: Call, name: str, arguments: list[int]) -> None:
        """In place of the child."""
        path, to = os.path.join(self.root, call.path), os.path.join(self.root, call.to)
        if call.kind == "rename":
            if not call.replaces and os.path.lexists(to):
                raise FileExistsError(errno.EEXIST, to)
            os.rename(path, to)
        elif call.kind == "link":
            os.link(path, to, follow_symlinks=False)
        elif call.kind == "unlink":
            os.unlink(path)
        elif call.kind == "rmdir":
            os.rmdir(path)
        elif call.kind == "mkdir":
            os.mkdir(path)
        elif call.kind == "create":
            os.close(os.open(path, call.flags, 0o666))
        elif call.kind == "write" and name in ("write", "pwrite64"):
            own = self._own(arguments[0])
            data = self._memory(pid, arguments[1], arguments[2])
            os.write(own, data) if name == "write" else os.pwrite(own, data, arguments[3])
            os.close(own)
