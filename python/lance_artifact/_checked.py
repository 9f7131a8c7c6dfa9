"""The types of all public arguments, in one table: what cannot be used is refused by name before anything is done."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa

from ._lance_artifact import Artifact, IvfPqModel, shown_uri, without_secrets
from ._renewed import open_dataset
from ._says import lance_says
from .exceptions import InvalidInputError, InvalidTypeError, StorageError, UnsupportedError

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


def refuse_type(what: str, value: Any, expected: str) -> InvalidTypeError:
    return InvalidTypeError(f"{what}: got {shown(value)}, expected {expected}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what was meant, as the end of a message; nothing where nothing is like it."""
    lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(str(word).lower(), lower, 1, 0.7)
    return f"; did you mean {lower[found[0]]!r}?" if found else ""


def text(what: str, value: Any, expected: str = "a string") -> str:
    """Text that can be stored and opened: not empty, UTF-8, no NUL."""
    if not isinstance(value, str):
        raise refuse_type(what, value, expected)
    if not value or "\0" in value:
        raise refuse(what, value, f"{expected} that is not empty and has no NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse(what, value, f"{expected} that is valid Unicode, without lone surrogates") from None
    return str(value)


def path(what: str, value: Any) -> str:
    expected = "a path or URI (str or os.PathLike)"
    if isinstance(value, os.PathLike):
        try:
            value = os.fspath(value)
        except TypeError:
            # Of neither text nor bytes.
            raise refuse_type(what, value, expected) from None
    return text(what, value, expected)


def whole(least: int = 0, most: int = _MOST) -> Check:
    def check(what: str, value: Any) -> int:
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        # An int can be too large for a float, and an infinite float is no whole number.
        if not number:
            raise refuse_type(what, value, "a whole number")
        if not isinstance(value, (int, np.integer)) and not float(value).is_integer():
            raise refuse(what, value, "a whole number")
        if not least <= int(value) <= most:
            raise refuse(what, value, f"at least {least}" if int(value) < least else f"at most {most}")
        return int(value)

    return check


def partitions(what: str, value: Any) -> int:
    """pylance takes a float, and rounds it down with a warning."""
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        warnings.warn(f"{what} is float, converting to int", stacklevel=4)
        value = int(value)
    return int(whole(1)(what, value))


def index_uuid(what: str, value: Any) -> str:
    """A UUID as text or as such."""
    try:
        return str(uuid.UUID(str(value)))
    except ValueError:
        raise refuse(what, value, "a UUID") from None


def flag(what: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise refuse_type(what, value, "True or False")
    return bool(value)


def choice(*names: str) -> Check:
    def check(what: str, value: Any) -> str:
        expected = f"one of {names}"
        if text(what, value, expected) not in names:
            raise refuse(what, value, expected)
        return str(value)

    return check


def numbers(expected: str, most: int) -> Check:
    """Whole numbers of any iterable, as a list."""

    def check(what: str, value: Any) -> list[int]:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(
            value, (Iterable, pa.Array, pa.ChunkedArray)
        ):
            raise refuse_type(what, value, expected)
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
        raise refuse_type(what, value, "a dict of strings, or a callable that gives one")
    for key, said in value.items():
        # Values may be secrets: they are not shown.
        if not isinstance(key, str) or not isinstance(said, str):
            raise InvalidTypeError(
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
            raise UnsupportedError(f"{what}: got {len(value)} columns, expected one")
        value = value[0]
    return text(what, value, "the name of a column")


def instance(kind: type[Any], expected: str) -> Check:
    def check(what: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise refuse_type(what, value, expected)
        return value

    return check


def progress(what: str, value: Any) -> Any:
    return value if callable(value) else value is not None and flag(what, value)


def callback(what: str, value: Any) -> Any:
    if not callable(value):
        raise refuse_type(what, value, "a callable")
    return value


def backend(what: str, value: Any) -> Any:
    return text(what, value, "the name of a backend") if isinstance(value, str) else value


def artifacts(what: str, value: Any) -> list[Any]:
    """One or several, each an artifact, a path or a URI."""
    expected = "an Artifact, a path, a URI, or several of them"
    if isinstance(value, (Artifact, str, os.PathLike)):
        value = [value]
    elif isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise refuse_type(what, value, expected)
    found = []
    for each in value:
        if not isinstance(each, (Artifact, str, os.PathLike)):
            raise refuse_type(what, each, expected)
        found.append(each if isinstance(each, Artifact) else path(what, each))
    return found


def dataset(what: str, value: Any, storage_options: Any = None) -> Any:
    """A handle as it is, a path opened. Errors are also those that pylance raises: a missing dataset is a ValueError."""
    if not isinstance(value, (str, os.PathLike)):
        return value
    uri = path(what, value)
    if storage_options is not None:
        storage_options = options("storage_options", storage_options)
    try:
        return open_dataset(uri, storage_options)
    except ValueError as error:
        raise InvalidInputError(
            f"{what}: {shown_uri(uri)} cannot be opened: expected a Lance dataset that exists. {without_secrets(lance_says(error), uri)}"
        ) from error
    except OSError as error:
        raise StorageError(
            f"{what}: {shown_uri(uri)} cannot be opened: {without_secrets(str(error), uri)}"
        ) from error


def factors(what: str, value: Any) -> list[int | None]:
    expected = "at least one whole number, or None"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refuse_type(what, value, expected)
    found = [None if each is None else whole(1)(what, each) for each in value]
    if not found:
        raise refuse(what, found, expected)
    return found


def share(what: str, value: Any) -> float:
    expected = "more than 0 and at most 1"
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise refuse_type(what, value, expected)
    if not 0 < value <= 1:
        raise refuse(what, value, expected)
    return float(value)


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
    "nprobes": numbers("at least one number of partitions", _MOST),
    "refine_factors": factors,
    "target_recall": share,
    "shard": whole(),
    "verify": flag,
    "calibrate": flag,
    "everything": flag,
    "elsewhere": flag,
    "dry_run": flag,
    "resume": flag,
    "num_shards": whole(1),
    "dataset_storage_options": options,
    "artifact_storage_options": options,
    "skip_transpose": flag,
    "mode": text,
    "num_indices_to_merge": whole(1),
    "num_partitions": partitions,
    "num_sub_vectors": whole(1),
    "num_bits": whole(1),
    "sample_rate": whole(1),
    "max_iters": whole(1),
    "seed": whole(0, 2**64 - 1),
    "target_partition_size": whole(1, 2**63 - 1),
    "m": whole(),
    "ef_construction": whole(),
    "max_level": whole(1, 64),
    "append": flag,
    "train": flag,
    "accelerator": text,
    "assign": choice("exact", "fast"),
    "ivf_centroids_file": path,
    "batch_rows": whole(1),
    "num_buckets": whole(1),
    "memory_limit": whole(1, 2**63 - 1),
    "fragment_ids": numbers("at least one fragment id, or None for all", 2**32 - 1),
    "device_memory_limit": whole(1, 2**63 - 1),
    "devices": numbers("at least one device index, or None for the first visible one", _MOST),
    "storage_options": options,
    "artifact_uri": path,
    "artifacts": artifacts,
    "model": instance(IvfPqModel, "an IvfPqModel"),
    "backend": backend,
    "progress": progress,
    "progress_callback": callback,
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

    def unexpected(kwargs: Mapping[str, Any]) -> str:
        known = signature.parameters.keys()
        return next((nearest(what, known - kwargs.keys()) for what in kwargs if what not in known), "")

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidTypeError(f"{function.__name__}: {error}{unexpected(kwargs)}") from None
        for what, value in bound.arguments.items():
            if what == "dataset":
                bound.arguments[what] = dataset(what, value, bound.arguments.get("storage_options"))
            elif what in CHECKS and (value is not None or what in required):
                bound.arguments[what] = CHECKS[what](what, value)
        return function(*bound.args, **bound.kwargs)

    return wrapper
