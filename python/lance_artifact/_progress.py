"""`progress=`: a bar on a terminal, nothing, or a callable that gets pylance's `IndexProgress`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

from lance.progress import IndexProgress

_Event = Literal["start", "progress", "complete"]

Report = Callable[[str, str, int, "int | None", str], None]
"""What the extension calls, on the thread that waits: ``(event, stage, completed, total, unit)``."""


class _Bars:
    """One tqdm bar a stage."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bar: Any = None

    def __call__(self, event: str, stage: str, completed: int, total: int | None, unit: str) -> None:
        if event == "start":
            # tqdm writes to stderr; `unit` is a noun for what is counted.
            self._bar = self._tqdm(total=total, desc=stage, unit=f" {unit}", unit_scale=True, leave=True)
        elif self._bar is not None:
            if event == "complete":
                self._bar.update((self._bar.total or self._bar.n) - self._bar.n)
                self._bar.close()
                self._bar = None
            else:
                self._bar.update(completed - self._bar.n)


class _Told:
    """A caller's own callable. As with pylance, what it raises ends the work, and is raised when that has cleaned up."""

    def __init__(self, callback: Callable[[IndexProgress], Any]) -> None:
        self._callback = callback

    def __call__(self, event: str, stage: str, completed: int, total: int | None, unit: str) -> None:
        self._callback(IndexProgress(cast(_Event, event), stage, completed, total, unit))


def reporter(progress: bool | Callable[[IndexProgress], Any]) -> Report | None:
    """The callable for the extension, or None where nobody looks."""
    if callable(progress):
        return _Told(progress)
    if not progress or not sys.stderr.isatty():
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        warnings.warn(
            'progress=True shows a bar only with tqdm: pip install "lance-artifact[progress]"', stacklevel=3
        )
        return None
    return _Bars(tqdm)
