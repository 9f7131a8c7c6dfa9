"""The commit of a segment through the user's pylance handle, and what must hold before and after it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

import lance
from lance.dataset import Index

from . import _lance_artifact as core
from ._dataset import Handle
from .exceptions import CommitConflictError, IndexExistsError, InvalidInputError, LanceArtifactError


def check_name(handle: Handle, name: str, replace: bool, path: str) -> None:
    same = [index for index in handle.dataset.describe_indices() if index.name == name]
    for index in same:
        if list(index.field_names) != [path]:
            raise InvalidInputError(
                f"name: index {name!r} is on {list(index.field_names)}, not on {path!r}; choose another name"
            )
    if same and not replace:
        raise IndexExistsError(
            f"Index name '{name}' already exists, please specify a different name or use replace=True"
        )


def commit_segment(
    handle: Handle, at: Handle, name: str, path: str, replace: bool, segment: dict[str, Any]
) -> None:
    """Commit through the user's handle, then look at what came of it.

    Lance would commit a segment whose fragments were rewritten meanwhile, with less coverage or none and without a word. So
    the latest version is compared with the rows' version first, and is what the commit is based on: a rewrite after the
    comparison makes Lance refuse.
    """
    intended = set(segment["fragment_ids"])
    index = Index(
        uuid=segment["uuid"],
        name=name,
        fields=[segment["field_id"]],
        dataset_version=segment["dataset_version"],
        fragment_ids=cast(Any, intended),  # pylance turns a set into its bitmap
        index_version=segment["index_version"],
        index_details=(segment["details_type_url"], segment["details"]),
    )
    try:
        base = handle.dataset
        if at.version != base.latest_version or base.version != at.version:
            base = base.checkout_version(base.latest_version)
            _check_unchanged(at, base, segment, name)
            check_name(Handle.of(base), name, replace, path)
        base.commit_existing_index_segments(name, path, [index])
    except BaseException as error:
        # An answer that got lost may hide a commit that happened: files of a committed index must stay.
        discard_uncommitted(handle, at, segment["uuid"])
        if isinstance(error, (OSError, RuntimeError, ValueError)) and not isinstance(
            error, LanceArtifactError
        ):
            text = str(error).lower()
            if "conflict" in text or "incompatible" in text or "concurrent" in text:
                raise CommitConflictError(
                    f"index {name!r} was not committed: another change of the dataset came first; build again from the latest "
                    f"version. Lance says: {error}"
                ) from error
        raise
    if base is not handle.dataset:
        cast(Any, handle.dataset).checkout_latest()
    committed = _coverage(handle.dataset, segment["uuid"])
    if committed is None or not intended <= committed:
        lost = sorted(intended - (committed or set()))
        raise CommitConflictError(
            f"index {name!r} was committed, but does not cover fragments {lost}: they were rewritten since version "
            f"{at.version}; searches scan them without the index. Build again."
        )


def discard_uncommitted(handle: Handle, at: Handle, segment_uuid: str) -> None:
    """Delete the files of a segment, unless it is committed, or that cannot be known. Again does no harm."""
    if not _is_committed(handle, segment_uuid):
        core.discard_segment(at.uri, at.version, segment_uuid, storage_options=at.storage_options)


def _column_files(dataset: lance.LanceDataset, field_id: int) -> dict[int, set[str]]:
    """For each fragment the data files that hold the column."""
    return {
        f.fragment_id: {file.path for file in f.metadata.files if field_id in file.fields}
        for f in dataset.get_fragments()
    }


def _check_unchanged(at: Handle, latest: lance.LanceDataset, segment: dict[str, Any], name: str) -> None:
    """The column's files of every fragment to be covered are still those that were read."""
    then, now = (_column_files(d, segment["field_id"]) for d in (at.dataset, latest))
    lost = sorted(i for i in segment["fragment_ids"] if now.get(i) != then.get(i))
    if lost:
        shown = f"{lost[:10]}" + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        raise CommitConflictError(
            f"index {name!r} was not committed: fragments {shown} of version {at.version}, from which the rows were encoded, were "
            f"rewritten by version {latest.version} (a compaction, an overwrite, or an update of the column in place); build "
            "again from the latest version"
        )


def _coverage(dataset: lance.LanceDataset, segment_uuid: str) -> set[int] | None:
    for index in dataset.describe_indices():
        for segment in index.segments:
            if str(segment.uuid) == segment_uuid:
                return set(segment.fragment_ids)
    return None


def _is_committed(handle: Handle, segment_uuid: str) -> bool:
    with suppress(Exception):
        latest = handle.dataset.checkout_version(handle.dataset.latest_version)
        return _coverage(latest, segment_uuid) is not None
    return True  # not known: keep the files
