"""What a process leaves behind: nothing where it is told to end, and what a killed one left is removed by the next build."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import _lance_artifact as core
from .exceptions import StorageError


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: everything that cleans up after Ctrl-C cleans up after it."""


@contextmanager
def terminable() -> Iterator[None]:
    """For a long call: a SIGTERM cleans up like Ctrl-C, and then ends the process as it would have without us.

    Only where the signal would end the process at once, without a word: in the main thread, with the default handler. A
    handler of the caller's own stays the one that is asked.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    asked, armed = False, True

    def handler(*_: Any) -> None:
        nonlocal asked
        first, asked = not asked, True
        # A second one does not disturb the cleaning up. Ctrl-C and SIGKILL do.
        if first and armed:
            raise Terminated("terminated by SIGTERM")

    try:
        signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main interpreter
        yield
        return
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if asked:
            signal.raise_signal(signal.SIGTERM)
            # The first process of a container is not ended by a default handler.
            raise SystemExit(128 + signal.SIGTERM)


PREFIX = "lance-artifact-"
_NAME = re.compile(re.escape(PREFIX) + r"[0-9a-f]{32}")
_OWNER = "owner.json"
_ARTIFACT = "artifact"
#: Folders of this process that are done with, and which could not be removed: the process is alive, they are not.
_OVER: set[str] = set()


@contextmanager
def temporary_artifact() -> Iterator[str]:
    """The path for an artifact that is not kept, in a folder of its own that is removed at the end.

    A killed process leaves its folder in the system's temporary folder, with the marks of its owner beside the artifact. It is
    removed by the next one that is made there, by the same user, once it is certain that its owner is gone.

    Raises
    ------
    StorageError
        There is no temporary folder that can be written.
    """
    # The name first: a Ctrl-C between making the folder and knowing of it would leave it.
    name = f"{PREFIX}{uuid.uuid4().hex}"
    folder: Path | None = None
    try:
        try:
            root = Path(tempfile.gettempdir()).absolute()
            remove_abandoned(root)
            folder = root / name
            folder.mkdir(mode=0o700)
            (folder / _OWNER).write_text(core.owner_marks(), encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"no temporary folder for the artifact could be made: {error}; set TMPDIR to a folder that can be written, or pass "
                "artifact_uri"
            ) from error
        yield str(folder / _ARTIFACT)
    finally:
        if folder is not None:
            _remove(folder)


def remove_abandoned(root: Path) -> list[str]:
    """Remove what killed processes left in the temporary folder, and what this one could not remove before; what is removed.

    Of exactly our names, folders of this user with readable marks of a process that is certainly gone, and nothing beside
    what we put there. Everything else stays.
    """
    removed = []
    try:
        with os.scandir(root) as entries:
            ours = [entry for entry in entries if _NAME.fullmatch(entry.name)]
    except OSError:
        return []
    for entry in ours:
        # A folder that somebody else removes meanwhile, or that cannot be read, is none of ours.
        with suppress(OSError, ValueError):
            if _is_abandoned(Path(entry.path)):
                _remove(Path(entry.path))
                removed.append(entry.path)
    return removed


def _is_abandoned(folder: Path) -> bool:
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        return False
    if not {p.name for p in folder.iterdir()} <= {_OWNER, _ARTIFACT}:
        return False
    marks = (folder / _OWNER).lstat()
    if not stat.S_ISREG(marks.st_mode) or marks.st_uid != os.getuid() or marks.st_size > 4096:
        return False
    return str(folder) in _OVER or core.owner_is_gone((folder / _OWNER).read_text(encoding="utf-8"))


def _remove(folder: Path) -> None:
    """Remove a folder of ours; a Ctrl-C meanwhile is raised after. The marks go last, so that it stays known whose it was."""
    try:
        _remove_once(folder)
    except KeyboardInterrupt:
        _remove_once(folder)
        raise


def _remove_once(folder: Path) -> None:
    shutil.rmtree(folder / _ARTIFACT, ignore_errors=True)
    if not (folder / _ARTIFACT).exists():
        shutil.rmtree(folder, ignore_errors=True)
    (_OVER.add if folder.exists() else _OVER.discard)(str(folder))
