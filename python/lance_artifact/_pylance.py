"""pylance's own `create_index`, and what of its arguments ours has another use for, or none."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import lance
import numpy as np
from lance.dataset import LanceDataset

from ._checked import nearest
from ._lance_artifact import shown_uri, without_secrets
from ._log import LOGGER
from .exceptions import InvalidInputError, InvalidTypeError, UnsupportedError

# Where a function of ours keeps itself and the one that was there before. Others' wrappers of ours have it too: `functools.wraps` copies it.
MARK = "__lance_artifact_original__"

# Whether ours do anything, or call what they replaced: what others have wrapped stays where it is when all is undone.
_state = {"registered": False}


def set_registered(registered: bool) -> None:
    _state["registered"] = registered


def is_registered() -> bool:
    return _state["registered"]


def put_over(original: Any, function: Any) -> Any:
    """Mark a function as ours that replaces another."""
    setattr(function, MARK, (function, original))
    return function


def replaced_by(function: Any) -> Any:
    """What was there before, where this very function is ours; else None."""
    ours, original = getattr(function, MARK, (None, None))
    return original if ours is function else None


class PylanceArguments(TypedDict, total=False):
    """Arguments of pylance's create_index that are taken so that a call of it works as it is."""

    # Of how Lance shuffles, caches and filters: the index is the same without.
    index_cache_size: int | None
    shuffle_partition_batches: int | None
    shuffle_partition_concurrency: int | None
    filter_nan: bool
    # "V3" is what is written.
    index_file_version: str
    # Refused: they change what is built.
    precomputed_partition_dataset: str | None
    streaming_sample_rate: int | None
    streaming_coreset_rate: int | None
    streaming_refine_passes: int | None


_WITHOUT_EFFECT = {
    "index_cache_size": None,
    "shuffle_partition_batches": None,
    "shuffle_partition_concurrency": None,
    "filter_nan": True,
}
_REFUSED = {
    "precomputed_partition_dataset": "rows are assigned here; leave it out",
    "streaming_sample_rate": "training streams what memory_limit does not hold by itself; leave it out",
    "streaming_coreset_rate": "training streams what memory_limit does not hold by itself; leave it out",
    "streaming_refine_passes": "training streams what memory_limit does not hold by itself; leave it out",
}


def check_pylance_arguments(
    extra: Mapping[str, Any], known: Iterable[str], function: str = "create_index"
) -> None:
    """Take what has no effect here, and refuse what has another one, or is no argument at all; ``known`` are those that are named."""
    for what, value in extra.items():
        if what in _WITHOUT_EFFECT:
            # Not compared: an array has no one truth value.
            if value is not _WITHOUT_EFFECT[what]:
                LOGGER.info("%s has no effect: it tunes Lance's own builder", what)
            if what == "index_cache_size" and value is not None:
                warnings.warn(
                    "index_cache_size is ignored, as by pylance: the cache is sized on the dataset",
                    DeprecationWarning,
                    stacklevel=6,
                )
        elif what == "index_file_version":
            if not isinstance(value, str) or value.upper() != "V3":
                raise UnsupportedError(f'index_file_version: got {value!r}, expected "V3"')
        elif what in _REFUSED:
            if value is not None:
                raise UnsupportedError(f"{what}: not supported; {_REFUSED[what]}")
        else:
            taken = [*known, *_WITHOUT_EFFECT, *_REFUSED, "index_file_version"]
            raise InvalidTypeError(
                f"{function}: got an unexpected argument {what!r}{nearest(what, taken) or f'; known are {sorted(known)}'}"
            )


def stock_create_index(dataset: lance.LanceDataset, *args: Any, **kwargs: Any) -> Any:
    """pylance's own, whoever has replaced it."""
    return stock(LanceDataset.create_index)(dataset, *args, **kwargs)


def stock(function: Any) -> Any:
    """What a function did before ours was put over it, also where others have wrapped ours since."""
    found = inspect.unwrap(function, stop=lambda each: replaced_by(each) is not None)
    return replaced_by(found) or function


def centroids_of_file(uri: str) -> Any:
    """The array that pylance's ``ivf_centroids_file`` names: a .npy file by URI, or by path."""
    from pyarrow.fs import FileSystem

    try:
        if "://" in uri:
            fs, path = FileSystem.from_uri(uri)
            with fs.open_input_file(path) as file:
                return np.load(file, allow_pickle=False)
        return np.load(uri, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"ivf_centroids_file: {shown_uri(uri)} cannot be read: {without_secrets(str(error), uri)}; expected a .npy file of (num_partitions, dimension)"
        ) from error


def commit_empty_index(
    dataset: lance.LanceDataset, column: str, index_type: str, name: str, replace: bool, **parameters: Any
) -> None:
    """pylance's index without rows: its parameters are kept, and ``optimize_indices`` trains it when there are vectors enough."""
    stock_create_index(
        dataset,
        column,
        index_type,
        name=name,
        replace=replace,
        train=False,
        **parameters,
    )


def asks_for_cuvs(accelerator: Any) -> bool:
    """Whether an accelerator is ours. One that is nearly so is an error: pylance would say of it only that torch has no such device."""
    if not isinstance(accelerator, str):
        return False
    if accelerator == "cuvs" or accelerator.startswith("cuvs:"):
        return True
    near = accelerator.strip().lower().replace("-", "").replace("_", "").split(":")[0]
    if near in ("cuvs", "cuv", "cuvss", "cvus", "cusv", "raft", "rapids", "cuml"):
        raise InvalidInputError(f"accelerator: got {accelerator!r}, expected 'cuvs' or 'cuvs:N'")
    return False
