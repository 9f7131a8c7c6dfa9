"""The storage options of dataset and run as workers on a Ray cluster get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._arguments import StorageOptions
from ._artifacts import same_store
from ._dataset import Handle
from ._lance_artifact import shown_uri, without_secrets
from ._log import LOGGER
from ._renewed import ENDS, open_dataset, until, vended_of
from .exceptions import InvalidInputError, StorageError


def opened(
    ray: Any, uri: Any, storage_options: StorageOptions | None
) -> tuple[Handle, StorageOptions | None]:
    """The dataset, and with what workers open it: the options given, or the handle's own. Each worker renews those that end."""
    _check_sent(ray, "storage_options", storage_options)
    if isinstance(uri, (str, Path)):
        try:
            uri = open_dataset(str(uri), storage_options)
        except (ValueError, OSError) as error:
            kind = InvalidInputError if isinstance(error, ValueError) else StorageError
            raise kind(
                f"uri: {shown_uri(str(uri))} cannot be opened: {without_secrets(str(error), str(uri))}"
            ) from error
    handle = Handle.of(uri, commits=True)
    if storage_options:
        return handle, storage_options
    now = dict(handle.dataset.latest_storage_options() or {})
    vended = vended_of(handle.dataset)
    if vended is None or ENDS not in now:
        return handle, now or None
    try:
        ray.cloudpickle.dumps(vended)
    except Exception as error:
        LOGGER.warning(
            "workers get the storage options of the dataset as they are now, and have them until %s: its namespace cannot be sent (%s); pass "
            "as storage_options a callable that can",
            until(now),
            error,
        )
        return handle, now
    return handle, vended


def _check_sent(ray: Any, what: str, options: Any) -> None:
    if not callable(options):
        return
    try:
        ray.cloudpickle.dumps(options)
    except Exception as error:
        raise InvalidInputError(
            f"{what}: this callable cannot be sent to the workers, each of which is to ask it ({error}); pass one that can be pickled"
        ) from error


def of_run(
    ray: Any, handle: Handle, place: str, given: StorageOptions | None, of_dataset: StorageOptions | None
) -> StorageOptions | None:
    """The storage options of a run's folder: those given, or the dataset's in its own store."""
    if given is not None:
        _check_sent(ray, "artifact_storage_options", given)
        return given
    return of_dataset if same_store(handle, place) else None
