"""The index that a segment is for, and what must hold of the one of that name: before a build, and right before the commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lance

from . import _lance_artifact as core
from ._arguments import Mode
from ._dataset import Handle, readable
from .exceptions import ArtifactMismatchError, CommitConflictError, IndexExistsError, InvalidInputError


def same_name(dataset: lance.LanceDataset, name: str) -> list[Any]:
    with readable("the dataset's indexes"):
        return [index for index in dataset.describe_indices() if index.name == name]


def default_name(handle: Handle, path: str) -> str:
    """pylance's name of a column's index that nobody named: with a number where indexes of other columns have it."""
    field = handle.field_id(path)
    with readable("the dataset's indexes"):
        others = {i.name for i in handle.latest().describe_indices() if list(i.fields) != [field]}
    numbered = (f"{path}_idx{number}" for number in ("", *(f"_{n}" for n in range(2, len(others) + 3))))
    return next(name for name in numbered if name not in others)


def covering_fields(segment: Any) -> list[int]:
    """Columns of the table that a segment carries; pylance before 13 has no such segments."""
    return list(getattr(segment, "covering_fields", ()))


@dataclass(frozen=True)
class Known:
    """The index that is extended or merged, as it was when that began: its segments, and the fragments of those that ours is made of."""

    segments: frozenset[str]
    merged: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """The index that is to be written."""

    name: str
    mode: Mode
    field_id: int
    path: str
    index_type: str
    # None where only the artifacts know.
    metric: str | None
    # Its fingerprint, and the segments that were found to have the same; None where it is not known yet.
    model: str | None = None
    of_model: set[str] = dataclasses.field(default_factory=set)
    # Of a run, whose index is committed once.
    run_id: str | None = None
    # Where it is about an index that is there: no other one is made, nor replaced.
    known: Known | None = None


def check_name(
    dataset: lance.LanceDataset,
    wanted: Wanted,
    fragment_ids: list[int],
    may_lose: frozenset[int],
    *,
    trains: bool = False,
) -> set[str]:
    """Whether the index can be written over these fragments.

    Of an index of that name the segments over these fragments are replaced, and those over others stay; with ``mode="append"`` it gets
    one more segment, and must cover none of them. Fragments of ``may_lose`` may lose their index. ``trains``: the model is to be
    trained, so that nothing can stay beside it.

    Returns
    -------
    set of str
        The segments that have to go and that Lance would let stand: those that reach further, and those that cover nothing any more.
    """
    name = wanted.name
    same = same_name(dataset, name)
    if wanted.known is not None and not same:
        raise CommitConflictError(
            f"index {name!r} is not there any more: it was dropped, or an older version was restored; build it anew with create_index"
        )
    for index in same:
        if list(index.fields) != [wanted.field_id]:
            raise InvalidInputError(
                f"name: index {name!r} is on {list(index.field_names)}, not on {wanted.path!r}; choose another name"
            )
    if same and wanted.mode == "create":
        raise IndexExistsError(
            f"Index name '{name}' already exists, please specify a different name or use replace=True"
        )
    with readable("the dataset's fragments"):
        there = {f.fragment_id for f in dataset.get_fragments()}
    intended = set(fragment_ids)
    losing: set[int] = set()
    staying: dict[int, tuple[Any, Any]] = {}
    gone: set[str] = set()
    since: set[str] = set()
    replaced: set[str] = set()
    idle: set[str] = set()
    for index in same:
        for segment in index.segments:
            covered = set(segment.fragment_ids) & there
            if covered & intended:
                replaced.add(str(segment.uuid))
                losing |= covered - intended
                if covered - intended:
                    gone.add(str(segment.uuid))
            elif covered:
                staying |= dict.fromkeys(covered, (index, segment))
                if covered <= may_lose:
                    since.add(str(segment.uuid))
            else:
                idle.add(str(segment.uuid))
                if wanted.mode == "replace" or not segment.fragment_ids:
                    gone.add(str(segment.uuid))
            if covered & intended and wanted.mode == "append":
                raise CommitConflictError(
                    f"index {name!r} covers fragments {few(covered & intended)} already; a segment that is appended must cover others"
                )
    if staying and not replaced and wanted.mode == "replace" and staying.keys() <= may_lose:
        raise CommitConflictError(
            f"index {name!r} covers fragments {few(staying)}, all of which came since the version that is to be indexed: its fragments were "
            "compacted or written anew; open the dataset again and build from the latest version"
        )
    if staying and not replaced and wanted.mode == "replace":
        raise InvalidInputError(
            f"replace: index {name!r} covers fragments {few(staying)}, none of which is built, and would not be replaced; to add a "
            'segment to it pass append=True (mode="append" to finalize), or call extend_index'
        )
    if losing - may_lose:
        raise InvalidInputError(
            f"fragment_ids: index {name!r} also covers fragments {few(losing - may_lose)}, which would lose their index; build all "
            "of its fragments, or choose another name"
        )
    if wanted.known is not None:
        now = {str(segment.uuid) for index in same for segment in index.segments}
        _check_known(name, wanted.known, now, replaced, idle, there)
    for index, segment in {str(s.uuid): (i, s) for i, s in staying.values()}.values():
        try:
            _check_fits(dataset, index, segment, wanted, trains)
        except (InvalidInputError, ArtifactMismatchError):
            # Others indexed rows that came while this one was built anew, with the old model: those go back to being scanned.
            if not replaced or wanted.mode != "replace" or str(segment.uuid) not in since:
                raise
            gone.add(str(segment.uuid))
    return gone


def _check_known(
    name: str, known: Known, now: set[str], replaced: set[str], idle: set[str], there: set[int]
) -> None:
    """Whether what would be replaced, or covers nothing, is of the index that was worked on. Others may have built what has its name now.

    A segment of the same model that is another one is refused too: nobody can tell whether it holds the same rows.
    """
    strange = (replaced - known.merged.keys()) | (idle - known.segments)
    # Lance takes a segment out when all of its rows are deleted.
    lost = [uuid for uuid, fragments in known.merged.items() if uuid not in now and there & set(fragments)]
    if strange or lost:
        raise CommitConflictError(
            f"index {name!r} is another one by now: "
            + (f"its segments {few(strange)} came meanwhile and would be replaced" if strange else "")
            + ("; " if strange and lost else "")
            + (f"its segments {few(lost)} are gone" if lost else "")
            + "; it stays as it is now. Repeat the call, if it is still wanted"
        )


def _check_fits(dataset: lance.LanceDataset, index: Any, segment: Any, wanted: Wanted, trains: bool) -> None:
    """A segment that stays beside ours: queries are planned for both at once."""
    theirs = (index.index_type, str(index.details.get("metric_type", "")).lower() or None)
    ours = (wanted.index_type, wanted.metric or theirs[1])
    if theirs[1] is None:
        ours = (ours[0], None)
    if theirs != ours or covering_fields(segment):
        raise InvalidInputError(
            f"name: index {wanted.name!r} has a segment over fragments {few(segment.fragment_ids)} that would stay, of type "
            f"{theirs[0]} and metric {theirs[1]}; one of {ours[0]} and {ours[1]} cannot be put beside it. Build all of its fragments, or "
            "choose another name"
        )
    if trains and wanted.model is None:
        raise ArtifactMismatchError(
            f"index {wanted.name!r} has a segment over fragments {few(segment.fragment_ids)} that would stay, and segments of one index "
            f"must be of one model; one trained now would be another. Call extend_index(dataset, {wanted.name!r}), pass the ivf_centroids "
            f"and pq_codebook of IvfPqModel.from_index(dataset, {wanted.name!r}), or build all of its fragments"
        )
    theirs_uuid = str(segment.uuid)
    if wanted.model is None or theirs_uuid in wanted.of_model:
        return
    model = core.model_of_index(Handle.of(dataset).core, wanted.name, [theirs_uuid])
    if model.fingerprint != wanted.model:
        raise ArtifactMismatchError(
            f"index {wanted.name!r} has a segment over fragments {few(segment.fragment_ids)} that would stay, of another model "
            f"({model.num_partitions} partitions, {model.num_sub_vectors} sub-vectors); segments of one index must be of one model: encode "
            f"with IvfPqModel.from_index(dataset, {wanted.name!r}), build all of its fragments, or choose another name"
        )
    wanted.of_model.add(theirs_uuid)


def check_latest(
    handle: Handle, at: Handle, wanted: Wanted, fragment_ids: list[int], *, trains: bool = False
) -> None:
    """`check_name` before a build: in the latest version, where fragments that came since that of ``at`` may lose their index.

    Both are of one look at the dataset: what came between two would be taken for something that was there all along.
    """
    latest = handle.latest()
    check_name(latest, wanted, fragment_ids, at.fragments_since(latest), trains=trains)


def check_again(
    base: lance.LanceDataset, wanted: Wanted, fragment_ids: list[int], may_lose: frozenset[int]
) -> set[str]:
    """`check_name` right before the commit. The index fitted when the call began: what does not fit now came meanwhile."""
    try:
        return check_name(base, wanted, fragment_ids, may_lose)
    except (InvalidInputError, ArtifactMismatchError) as error:
        raise CommitConflictError(
            f"index {wanted.name!r} changed while this segment of it was built; repeat the call. Now {error}"
        ) from error


def few(ids: Any) -> str:
    listed = sorted(ids)
    return f"{listed[:10]}" + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
