"""The one logger of the package, and stages that are logged with their counts and durations."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

LOGGER = logging.getLogger("lance_artifact")
"""Everything goes here, and what Lance logs to loggers below it. INFO: a line when a stage begins and ends; WARNING: what a user should
know; DEBUG: what Lance does. Nothing is configured: as with any library, the program says where it goes."""

EXTRA = "lance_artifact"
"""Attribute of a record that holds its fields: ``{"event": "encoded", "rows": 1000, "seconds": 0.2, ...}``."""


def log(event: str, message: str, **fields: Any) -> None:
    """One line at INFO: ``message`` formatted with the fields, which are its extra too."""
    # A program's own handler that fails does not fail a build, least of all one that is committed.
    with suppress(Exception):
        LOGGER.info(message.format(**fields), extra={EXTRA: {"event": event, **fields}})


@contextmanager
def stage(event: str, beginning: str, end: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Log that a stage begins, and with what is put into the dict meanwhile, and its ``seconds``, that it ended."""
    log(f"{event}.begins", beginning, **fields)
    started = time.perf_counter()
    told: dict[str, Any] = {}
    yield told
    log(event, end, **fields, **told, seconds=round(time.perf_counter() - started, 3))
