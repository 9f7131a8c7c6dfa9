"""The types of all public arguments, in one table: what cannot be used is refused by name before anything is done."""

from __future__ import annotations

import functools
import inspect
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import lance
import numpy as np
import pyarrow as pa

from ._lance_artifact import Artifact, IvfPqModel
from .exceptions import InvalidInputError, StorageError

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], Any]

# What the extension counts with; sizes above are no plan but a mistake.
_MOST = 2**31 - 1


def shown(value: Any) -> str:
    """A value in a message: short, and also where its own repr fails."""
    try:
        text = ascii(value)
    except Exception:
        text = "?"
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"


def refuse(what: str, value: Any, expected: str) -> InvalidInputError:
    return InvalidInputError(f"{what}: got {shown(value)}, expected {expected}")


def text(what: str, value: Any, expected: str = "a string") -> str:
    """Text that can be stored and opened: not empty, UTF-8, no NUL."""
    if not isinstance(value, str):
        raise refuse(what, value, expected)
    if not value or "\0" in value:
        raise refuse(what, value, f"{expected} that is not empty and has no NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse(what, value, f"{expected} that is valid Unicode, without lone surrogates") from None
    return str(value)


def path(what: str, value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return text(what, value, "a path or URI (str or os.PathLike)")


def whole(least: int = 0, most: int = _MOST) -> Check:
    def check(what: str, value: Any) -> int:
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        # An int can be too large for a float, and an infinite float is no whole number.
        if not number or (not isinstance(value, (int, np.integer)) and not float(value).is_integer()):
            raise refuse(what, value, "a whole number")
        if not least <= int(value) <= most:
            raise refuse(what, value, f"at least {least}" if int(value) < least else f"at most {most}")
        return int(value)

    return check


def index_uuid(what: str, value: Any) -> str:
    """A UUID as text or as such."""
    try:
        return str(uuid.UUID(str(value)))
    except ValueError:
        raise refuse(what, value, "a UUID") from None


def flag(what: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise refuse(what, value, "True or False")
    return bool(value)


def numbers(expected: str, most: int) -> Check:
    """Whole numbers of any iterable, as a list."""

    def check(what: str, value: Any) -> list[int]:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(
            value, (Iterable, pa.Array, pa.ChunkedArray)
        ):
            raise refuse(what, value, expected)
        if isinstance(value, (pa.Array, pa.ChunkedArray)):
            value = value.to_pylist()
        elif isinstance(value, np.ndarray) and value.ndim != 1:
            raise refuse(what, value, expected)
        found = [whole(0, most)(what, each) for each in value]
        if not found:
            raise refuse(what, found, expected)
        return found

    return check


def options(what: str, value: Any) -> Any:
    """A dict, or a callable that gives one: it is asked when the store is opened, and again when what it gave ends."""
    if callable(value):
        return value
    if not isinstance(value, Mapping):
        raise refuse(what, value, "a dict of strings, or a callable that gives one")
    for key, said in value.items():
        # Values may be secrets: they are not shown.
        if not isinstance(key, str) or not isinstance(said, str):
            raise InvalidInputError(
                f"{what}: got a {type(said).__name__} for {shown(key)}, expected a dict of strings; numbers and booleans as strings too"
            )
        text(f"{what} key", key)
        if "\0" in said or any(0xD800 <= ord(c) < 0xE000 for c in said):
            raise InvalidInputError(f"{what}: the value of {key!r} holds a NUL character or a lone surrogate")
    return dict(value)


def column(what: str, value: Any) -> str:
    """A column's name, or a list of one, as pylance takes it."""
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise InvalidInputError(f"{what}: got {len(value)} columns, expected one")
        value = value[0]
    return text(what, value, "the name of a column")


def instance(kind: type[Any], expected: str) -> Check:
    def check(what: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise refuse(what, value, expected)
        return value

    return check


def progress(what: str, value: Any) -> Any:
    return value if callable(value) else value is not None and flag(what, value)


def backend(what: str, value: Any) -> Any:
    return text(what, value, "the name of a backend") if isinstance(value, str) else value


def artifacts(what: str, value: Any) -> list[Any]:
    """One or several, each an artifact, a path or a URI."""
    expected = "an Artifact, a path, a URI, or several of them"
    if isinstance(value, (Artifact, str, os.PathLike)):
        value = [value]
    elif isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise refuse(what, value, expected)
    found = []
    for each in value:
        if not isinstance(each, (Artifact, str, os.PathLike)):
            raise refuse(what, each, expected)
        found.append(each if isinstance(each, Artifact) else path(what, each))
    return found


def dataset(what: str, value: Any) -> Any:
    """A handle as it is, a path opened. Errors are also those that pylance raises: a missing dataset is a ValueError."""
    if not isinstance(value, (str, os.PathLike)):
        return value
    uri = path(what, value)
    try:
        return lance.dataset(uri)
    except ValueError as error:
        raise InvalidInputError(
            f"{what}: {uri} cannot be opened: expected a Lance dataset that exists. Lance says: {error}"
        ) from error
    except OSError as error:
        raise StorageError(f"{what}: {uri} cannot be opened: {error}") from error


# Where None is an argument's default it stays None.
CHECKS: dict[str, Check] = {
    "dataset": dataset,
    "column": column,
    "name": lambda what, value: text(what, value, "the name of an index"),
    "backend_name": text,
    "replace": flag,
    "overwrite": flag,
    "sync": flag,
    "keep_artifact": flag,
    "measure_fit": flag,
    "index_uuid": index_uuid,
    "k": whole(1, 10_000),
    "num_queries": whole(1, 100_000),
    "verify": flag,
    "calibrate": flag,
    "everything": flag,
    "dry_run": flag,
    "resume": flag,
    "num_shards": whole(1),
    "dataset_storage_options": options,
    "skip_transpose": flag,
    "mode": text,
    "num_indices_to_merge": whole(1),
    "num_partitions": whole(1),
    "num_sub_vectors": whole(1),
    "num_bits": whole(1),
    "sample_rate": whole(2),
    "max_iters": whole(1),
    "seed": whole(0, 2**64 - 1),
    "target_partition_size": whole(1, 2**63 - 1),
    "m": whole(),
    "ef_construction": whole(),
    "batch_rows": whole(1),
    "num_buckets": whole(1),
    "memory_limit": whole(1, 2**63 - 1),
    "fragment_ids": numbers("at least one fragment id, or None for all", 2**32 - 1),
    "devices": numbers("at least one device index, or None for the first visible one", _MOST),
    "storage_options": options,
    "artifact_uri": path,
    "artifacts": artifacts,
    "model": instance(IvfPqModel, "an IvfPqModel"),
    "backend": backend,
    "progress": progress,
}


def check(what: str, value: Any) -> Any:
    """An argument of that name as it is used, None as it is."""
    return value if value is None else CHECKS[what](what, value)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A public function whose arguments are of the types in the table when its body runs."""
    signature = inspect.signature(function)
    required = {
        p.name for p in signature.parameters.values() if p.default is p.empty or p.default is not None
    } & CHECKS.keys()

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for what, value in bound.arguments.items():
            if what in CHECKS and (value is not None or what in required):
                bound.arguments[what] = CHECKS[what](what, value)
        return function(*bound.args, **bound.kwargs)

    return wrapper
