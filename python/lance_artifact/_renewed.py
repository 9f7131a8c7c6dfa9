"""Datasets by their paths, with storage options that a callable gives, and gives anew when they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import lance

from .exceptions import InvalidInputError, InvalidTypeError, LanceArtifactError, StorageError

# By which options say that they end.
ENDS = "expires_at_millis"


class Answers:
    """What a callable gives, checked."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask

    def __call__(self) -> dict[str, str]:
        try:
            given = self._ask()
        except LanceArtifactError:
            raise
        except OSError as error:
            raise StorageError(f"storage_options: the callable failed: {error}") from error
        return checked_answer(given)


class Vended:
    """A namespace as a callable that gives the options of a table: what a handle's own are renewed by, for another process."""

    def __init__(self, client: Any, table_id: list[str], options: dict[str, str]) -> None:
        self._client, self._table_id = client, table_id
        # When they end is not said of what comes after them.
        self._options = {what: value for what, value in options.items() if what != ENDS}

    def __call__(self) -> dict[str, str]:
        from lance_namespace import DescribeTableRequest

        try:
            found = self._client.describe_table(DescribeTableRequest(id=self._table_id, version=None))
        except LanceArtifactError:
            raise
        except Exception as error:
            # A client's own, of which only it knows which pass, and which may not survive the way to another process.
            raise StorageError(
                f"storage_options: the namespace of the table did not answer: {type(error).__name__}: {error}"
            ) from error
        return {**self._options, **(found.storage_options or {})}


def checked_answer(given: Any) -> dict[str, str]:
    """What a callable gave. Values may be secrets: they are not shown."""
    if not isinstance(given, Mapping) or any(
        not isinstance(each, str) for pair in given.items() for each in pair
    ):
        raise InvalidTypeError(
            f"storage_options: the callable gave a {type(given).__name__}, expected a dict of strings; numbers and booleans as strings too"
        )
    if any(
        "\0" in each or any(0xD800 <= ord(c) < 0xE000 for c in each)
        for pair in given.items()
        for each in pair
    ):
        raise InvalidInputError(
            "storage_options: what the callable gave holds a NUL character or a lone surrogate"
        )
    return dict(given)


def open_dataset(uri: str, storage_options: Any) -> lance.LanceDataset:
    """A dataset by its path. A callable is asked now, and again when what it gave ends.

    Errors are pylance's own, and the callable's.
    """
    if not callable(storage_options):
        return lance.dataset(uri, storage_options=storage_options)
    given = storage_options()
    if given is not None:
        given = checked_answer(given)
    if not given or ENDS not in given:
        return lance.dataset(uri, storage_options=given)
    # It takes seconds to import.
    from ._asked import Asked

    return lance.dataset(namespace_client=Asked(uri, Answers(storage_options), given), table_id=["asked"])


def vended_of(dataset: lance.LanceDataset) -> Vended | None:
    """What renews the options of a handle; None where it was opened by no namespace."""
    client, table_id = getattr(dataset, "_namespace_client", None), getattr(dataset, "_table_id", None)
    if client is None or table_id is None:
        return None
    return Vended(client, table_id, dict(dataset.latest_storage_options() or {}))


def until(options: Mapping[str, str]) -> str:
    """When options end, for messages."""
    try:
        return datetime.fromtimestamp(int(options[ENDS]) / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return "they end"
