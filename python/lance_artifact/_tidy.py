"""Tidying up after an error: where that fails too, the first error is the one that is raised."""

from __future__ import annotations

from collections.abc import Callable

from ._log import LOGGER


def tidy_up(error: BaseException, work: Callable[[], object]) -> None:
    """Remove what was written before ``error``, which the caller raises again whatever comes of this."""
    try:
        work()
    except Exception as left:
        not_removed(error, left)


def not_removed(error: BaseException, left: Exception) -> None:
    """Say what is left, in the log and in a note of the error: its type and its words say what went wrong first."""
    LOGGER.warning("what was written before a %s could not be removed: %s", type(error).__name__, left)
    error.add_note(f"What was written before it could not be removed: {left}")
