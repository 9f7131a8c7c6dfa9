"""LanceDB's tables in place of a dataset, of each of its interfaces."""

from __future__ import annotations

import inspect
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._versions import check_lancedb, lancedb_version
from .exceptions import InvalidInputError, StorageError, UnsupportedError

MANAGED = (
    "dataset: its namespace manages the versions, and it cannot be opened by URI; open it by URI with lance.dataset(uri) where that is "
    "allowed"
)


@dataclass(frozen=True)
class Table:
    """What is needed of a table.

    Attributes
    ----------
    dataset : callable
        Opens its Lance dataset, at the table's version and branch.
    refresh : callable
        Lets the table see the latest version.
    check_follows : callable
        Refuses a table that was told to stay at a version.
    """

    dataset: Callable[[], Any]
    refresh: Callable[[], Any]
    check_follows: Callable[[], None]


def is_remote(table: Any) -> bool:
    """Whether a server builds the indexes of a table."""
    remote = sys.modules.get("lancedb.remote.table")
    # In a release that names it otherwise it is known by what it cannot do.
    return isinstance(table, getattr(remote, "RemoteTable", ()))


def table_of(value: Any) -> Table | None:
    """A LanceDB table, or None for anything else."""
    if is_remote(value):
        raise UnsupportedError(
            f"dataset: got a remote table ({type(value).__name__}), whose indexes its server builds; open the dataset where it is stored, "
            "with lance.dataset(uri)"
        )
    if not callable(getattr(value, "to_lance", None)):
        return None
    is_lancedb = any(base.__module__.split(".")[0] == "lancedb" for base in type(value).__mro__)
    if is_lancedb:
        check_lancedb(lancedb_version())
    if inspect.iscoroutinefunction(value.to_lance):
        _check_versions(value)

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

    def check_follows() -> None:
        if not (is_lancedb and _stays(value)):
            return
        version = value.version() if inspect.iscoroutinefunction(value.to_lance) else value.version
        version = _run(version) if inspect.isawaitable(version) else version
        raise InvalidInputError(
            f"dataset: the LanceDB table {value.name!r} is checked out at version {version}, where nothing can be committed; checkout_latest() "
            "lets it follow the latest version, restore() makes this one the latest"
        )

    return Table(
        lambda: now(value.to_lance, "cannot be opened as a Lance dataset"),
        lambda: now(value.checkout_latest, "could not be brought to its latest version"),
        check_follows,
    )


def _stays(table: Any) -> bool:
    """Whether a version, or a tag, of a table was checked out, which LanceDB says only where something is to be changed."""
    # It looks at that before it looks for the index, and of this name there is none.
    name = f"lance_artifact {uuid.uuid4()}"
    answer: object = "no error"
    try:
        made = table.drop_index(name)
        if inspect.isawaitable(made):
            _run(made)
    except Exception as error:
        answer = error
        if "version is checked out" in str(error):
            return True
        if name in str(error):
            return False
    # Taken for one that follows, it would be indexed at another version than the caller sees.
    raise StorageError(
        f"dataset: the LanceDB table {table.name!r} does not say whether a version of it is checked out: {answer}; open its dataset with "
        "lance.dataset(uri)"
    ) from (answer if isinstance(answer, Exception) else None)


def _check_versions(table: Any) -> None:
    """Refuse an asynchronous table whose namespace manages its versions: its own `to_lance` opens it by its URI all the same."""
    client = getattr(table, "_namespace_client", None)
    if client is None:
        # Of a client that LanceDB keeps to itself.
        if getattr(table, "_route_pushdown_to_rust", False):
            raise UnsupportedError(
                "dataset: got an asynchronous table of a namespace, of which it cannot be known here whether it manages the table's versions; "
                "open the table by lancedb.connect_namespace, or its dataset with lance.dataset(uri) where that is allowed"
            )
        return
    from lance_namespace import DescribeTableRequest

    name = [*(getattr(table, "_namespace_path", None) or []), table.name]
    try:
        described = client.describe_table(DescribeTableRequest(id=name))
    except Exception as error:
        raise StorageError(
            f"dataset: the namespace of the LanceDB table {table.name!r} did not say whether it manages its versions: {error}"
        ) from error
    if getattr(described, "managed_versioning", None):
        raise InvalidInputError(MANAGED)


def _run(awaitable: Any) -> Any:
    """Wait for a method of an asynchronous table on LanceDB's own loop, as its synchronous tables do."""
    from lancedb import background_loop

    loop: Any = background_loop.LOOP
    return loop.run(awaitable)
