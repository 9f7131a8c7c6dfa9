"""A process that calls functions for this one, and may end in the middle of it."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Ended(Exception):
    """The child ended in the middle of what it was asked to do."""


class Stuck(Exception):
    """The child did not answer in time."""


@dataclass
class Raised:
    """An exception in the child."""

    name: str
    bases: list[str]
    message: str
    trace: str = field(repr=False, default="")


class Worker:
    """A process that has imported `modules`, with `env` beside this process's environment. With `watched` it gives its calls of the system to
    `syscalls.Watched`."""

    def __init__(self, modules: list[str], watched: bool = False, env: dict[str, str] | None = None) -> None:
        self.failed: BaseException | None = None
        self.connection, theirs = socket.socketpair()
        paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), str(int(watched)), *modules],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **(env or {}), "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        )
        theirs.close()
        self.connection.settimeout(120)

    def call(self, module: str, function: str, *arguments: Any, seconds: float = 120.0) -> Any:
        """What the function gives, or `Raised`."""
        self.connection.settimeout(seconds)
        try:
            _send(self.connection, (module, function, arguments))
            answer = _receive(self.connection)
        except TimeoutError:
            self.process.kill()
            raise Stuck(f"{module}.{function}{arguments}: no answer in {seconds:.0f} s") from None
        except ConnectionError as error:
            raise Ended from error
        if self.failed is not None:
            raise self.failed
        return answer

    def close(self) -> None:
        self.connection.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _receive(connection: socket.socket) -> Any:
    def exactly(count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            piece = connection.recv(count - len(got))
            if not piece:
                raise Ended
            got += piece
        return bytes(got)

    return pickle.loads(exactly(struct.unpack("<Q", exactly(8))[0]))


def _send(connection: socket.socket, value: Any) -> None:
    content = pickle.dumps(value)
    connection.sendall(struct.pack("<Q", len(content)) + content)


def _serve(number: str, watched: str, *modules: str) -> None:
    import importlib
    import traceback

    connection = socket.socket(fileno=int(number))
    loaded = {name: importlib.import_module(name) for name in modules}
    if watched == "1":
        importlib.import_module("syscalls").watch_me(connection)
    while True:
        try:
            module, function, arguments = _receive(connection)
        except (Ended, ConnectionError):
            return
        answer: Any
        try:
            answer = getattr(loaded[module], function)(*arguments)
        except BaseException as error:
            bases = [base.__name__ for base in type(error).__mro__]
            answer = Raised(type(error).__name__, bases, str(error), traceback.format_exc())
        _send(connection, answer)


if __name__ == "__main__":
    # Under its own name, so that what it sends is of the classes that the other side knows.
    from worker import _serve as serve

    serve(*sys.argv[1:])
