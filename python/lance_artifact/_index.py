"""A committed index as it is described: what extends it or merges its segments must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _lance_artifact as core
from ._arguments import INDEX_TYPES
from ._dataset import Handle
from ._lance_artifact import IvfPqModel
from ._wanted import covering_fields, same_name
from .exceptions import InvalidInputError, LanceArtifactError


@dataclass(frozen=True)
class CommittedIndex:
    """An IVF_PQ or IVF_HNSW_PQ index of a version of a dataset.

    Attributes
    ----------
    path : str
        Of its column.
    segments : dict
        UUID to the fragments covered that are there, the oldest segment first.
    metric : str or None
        None where it does not say it.
    m, ef_construction, max_level : int
        Of its graphs, where it has any.
    hints : dict
        What its details say of who built it, and how.
    """

    name: str
    field_id: int
    path: str
    index_type: str
    metric: str | None
    m: int
    ef_construction: int
    max_level: int
    segments: dict[str, list[int]]
    hints: dict[str, str]

    @classmethod
    def of(cls, at: Handle, name: str) -> CommittedIndex:
        found = same_name(at.dataset, name)
        if not found:
            raise InvalidInputError(
                f"name: index {name!r} does not exist in version {at.version} of {at.uri}"
            )
        index = found[0]
        if index.index_type not in INDEX_TYPES or len(index.fields) != 1:
            raise InvalidInputError(
                f"name: index {name!r} is of type {index.index_type} on {list(index.field_names)}, expected one of {INDEX_TYPES} on one column"
            )
        unsaid = core.segments_without_coverage(at.core, name)
        if unsaid:
            raise InvalidInputError(
                f"name: segments {unsaid[:3]} of index {name!r} do not say which fragments they cover; build the index anew"
            )
        carrying = [str(segment.uuid) for segment in index.segments if covering_fields(segment)]
        if carrying:
            raise InvalidInputError(
                f"name: segments {carrying[:3]} of index {name!r} carry columns of the table beside their codes, which would be lost"
            )
        field_id = int(index.fields[0])
        graph: dict[str, Any] = index.details.get("hnsw") or {}
        there = set(at.fragment_ids())
        segments = sorted(index.segments, key=lambda segment: segment.dataset_version_at_last_update)
        return cls(
            name,
            field_id,
            at.path_of(field_id, index.field_names[0]),
            index.index_type,
            str(index.details.get("metric_type", "")).lower() or None,
            int(graph.get("max_connections", 20)),
            int(graph.get("construction_ef", 150)),
            int(graph.get("max_level", 7)),
            {str(s.uuid): sorted(set(s.fragment_ids) & there) for s in segments},
            dict(index.details.get("runtime_hints") or {}),
        )

    def covered(self) -> set[int]:
        return {fragment for fragments in self.segments.values() for fragment in fragments}


def segments_now(handle: Handle, name: str, otherwise: int) -> int:
    """How many segments an index has that was just committed. Others may have added or merged some meanwhile."""
    try:
        return len([s for index in same_name(handle.user, name) for s in index.segments]) or otherwise
    except LanceArtifactError:
        # It is committed, whatever cannot be said of it.
        return otherwise


def model_of(at: Handle, index: CommittedIndex) -> IvfPqModel:
    """The model of its segments.

    Raises
    ------
    InvalidInputError
        It has none: it was committed without rows, to be trained later.
    """
    try:
        return core.model_of_index(at.core, index.name)
    except LanceArtifactError as error:
        if index.covered():
            raise
        raise InvalidInputError(
            f"name: index {index.name!r} has no rows yet, and so no model; build it with create_index(..., replace=True), or let "
            "optimize_indices() train it"
        ) from error
