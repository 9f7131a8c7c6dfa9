"""LanceDB's tables in place of a dataset, of each of its interfaces."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .exceptions import StorageError, UnsupportedError


@dataclass(frozen=True)
class Table:
    """What is needed of a table.

    Attributes
    ----------
    dataset : callable
        Opens its Lance dataset, at the table's version and branch.
    refresh : callable
        Lets the table see the latest version.
    """

    dataset: Callable[[], Any]
    refresh: Callable[[], Any]


def is_remote(table: Any) -> bool:
    """Whether a server builds the indexes of a table."""
    remote = sys.modules.get("lancedb.remote.table")
    return remote is not None and isinstance(table, remote.RemoteTable)


def table_of(value: Any) -> Table | None:
    """A LanceDB table, or None for anything else."""
    if is_remote(value):
        raise UnsupportedError(
            f"dataset: got a remote table ({type(value).__name__}), whose indexes its server builds; open the dataset where it is stored, "
            "with lance.dataset(uri)"
        )
    if not callable(getattr(value, "to_lance", None)):
        return None

    def now(work: Callable[[], Any], what: str) -> Any:
        try:
            made = work()
            return _run(made) if inspect.isawaitable(made) else made
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            if "in memory" in str(error):
                raise UnsupportedError(
                    "dataset: got a LanceDB table in memory, which only the connection that made it can open; write it to a path"
                ) from error
            raise StorageError(f"dataset: the LanceDB table {what}: {error}") from error

    return Table(
        lambda: now(value.to_lance, "cannot be opened as a Lance dataset"),
        lambda: now(value.checkout_latest, "could not be brought to its latest version"),
    )


def _run(awaitable: Any) -> Any:
    """Wait for a method of an asynchronous table on LanceDB's own loop, as its synchronous tables do."""
    from lancedb import background_loop

    loop: Any = background_loop.LOOP
    return loop.run(awaitable)
