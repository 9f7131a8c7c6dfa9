"""How rows are given their partitions: compared with all centroids, or with those of the groups nearest to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._lance_artifact import Artifact
from ._log import LOGGER, log
from .backends.cpu import CpuBackend
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    from .backends import Backend

# Of the rows so many at most may be with another than their nearest centroid.
MOST_MISSED = 0.001
# A count of misses that is likelier than this needs no warning.
_UNLIKELY = 0.01


def check_assign(assign: str, backend: Backend | str) -> None:
    """Only the CPU backend has groups: others compare every row with all centroids, and are not told otherwise."""
    is_cpu = backend == "cpu" or isinstance(backend, CpuBackend)
    if assign != "exact" and not is_cpu:
        name = backend if isinstance(backend, str) else backend.name
        raise InvalidInputError(
            f"assign: got {assign!r}, which is of backend 'cpu', and the backend is {name!r}; leave it out, or pass backend='cpu'"
        )


def check_assigned(artifact: Artifact, assign: str) -> str | None:
    """How an artifact differs from what is asked for. One that does not say how its rows were assigned is taken as it is."""
    method = artifact.manifest.get("assignment", {}).get("method")
    return f"assign={method!r}, now {assign!r}" if assign == "exact" and method == "groups" else None


def tell_assigned(artifact: Artifact, assign: str) -> None:
    """Say what the rows of an artifact were compared with, where that was not asked to be all centroids."""
    found: dict[str, Any] | None = artifact.manifest.get("assignment")
    if found is None or assign == "exact":
        return
    if found["method"] != "groups":
        log(
            "assigned",
            "every row was compared with all {partitions} centroids: it would be no quicker with some, or is not known to be as good",
            **found,
            partitions=artifact.num_partitions,
        )
        return
    log(
        "assigned",
        "rows were compared with the centroids of {looked_at} of {groups} groups; of {checked} rows that were compared with all centroids "
        "{missed} are not with their nearest",
        **found,
    )
    if _likelihood(found["missed"], MOST_MISSED * found["checked"]) < _UNLIKELY:
        LOGGER.warning(
            "%s: %d of %d rows that were checked are not with their nearest centroid, more than %.1f %%: they are not like those that were "
            "sampled. Searches may miss them; assign='exact' misses none",
            artifact.uri,
            found["missed"],
            found["checked"],
            100 * MOST_MISSED,
        )


def _likelihood(count: int, mean: float) -> float:
    """Of as many events or more, where so many are to be expected (Poisson)."""
    if mean > 500:
        return 0.5 * math.erfc((count - 0.5 - mean) / math.sqrt(2 * mean))
    below, term = 0.0, math.exp(-mean)
    for seen in range(count):
        below += term
        term *= mean / (seen + 1)
    return max(0.0, 1.0 - below)
