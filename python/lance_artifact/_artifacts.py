"""Artifacts as users name them, and where they may be."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from . import _lance_artifact as core
from ._arguments import IndexParams, fixed_size_list
from ._assign import check_assigned
from ._dataset import Handle
from ._lance_artifact import Artifact, IvfPqModel, shown_uri, uri_place
from ._log import LOGGER, log
from .exceptions import (
    ArtifactExistsError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    InvalidInputError,
    LanceArtifactError,
)

MANIFEST, METADATA = "manifest.json", "metadata.lance"
# Of a folder without a manifest, which Lance's own shuffler has written: see docs/FORMAT.md.
_SORTED = re.compile(r"sorted_(0|[1-9][0-9]*)\.lance")


def store_options(handle: Handle, uri: str | Path, storage_options: Any) -> Any:
    """The storage options of an artifact: those given, or for one in the dataset's own store those of its handle, renewed there."""
    if storage_options is not None or not handle.dataset.latest_storage_options():
        return storage_options
    return handle.dataset.latest_storage_options if same_store(handle, uri) else None


def same_store(handle: Handle, uri: str | Path) -> bool:
    """Whether a place is in the dataset's own store, which its credentials are for."""
    return _authority(str(uri)) == _authority(handle.root)


def _authority(uri: str) -> str | None:
    scheme, sign, rest = uri_place(uri).partition("://")
    return f"{scheme}://{rest.split('/')[0]}" if sign and scheme != "file" else None


def open_artifacts(handle: Handle, artifacts: Any, storage_options: Any) -> list[Artifact]:
    several = [artifacts] if isinstance(artifacts, (Artifact, str, Path)) else list(artifacts)
    if not several:
        raise InvalidInputError("artifacts: got none, expected at least one Artifact, path or URI")
    uris = [str(a) for a in several if not isinstance(a, Artifact)]
    there = iter(Artifact._open_all([(uri, store_options(handle, uri, storage_options)) for uri in uris]))
    opened = [a if isinstance(a, Artifact) else next(there) for a in several]
    seen: set[str] = set()
    for artifact in opened:
        if artifact.uri in seen:
            raise InvalidInputError(f"artifacts: {artifact.uri} is given twice")
        seen.add(artifact.uri)
    return opened


def common_version(handle: Handle, artifacts: list[Artifact]) -> int:
    versions = {source["version"]: a.uri for a in artifacts if (source := a._source) is not None}
    if len(versions) > 1:
        raise ArtifactMismatchError(
            f"the artifacts were encoded from different versions of the dataset: {versions}; encode all shards at one version"
        )
    return next(iter(versions), handle.version)


def covered(at: Handle, artifacts: list[Artifact], fragment_ids: list[int] | None) -> list[int]:
    """The fragments that an index of these artifacts is to cover, as far as that is known."""
    if fragment_ids is not None:
        return fragment_ids
    sources = [a._source for a in artifacts]
    known = [source for source in sources if source is not None]
    if len(known) < len(sources):
        return at.fragment_ids()
    return [i for source in known for i in source["fragment_ids"]]


def published_artifact(
    source: core._VectorSource,
    uri: str,
    storage_options: Any,
    asked: IndexParams,
    num_partitions: int,
    model: IvfPqModel | None,
    ivf_centroids: Any,
) -> Artifact | None:
    """The finished artifact of an earlier call that asked for the same, if one is there; anything else there is an error."""
    try:
        artifact = Artifact.open(uri, storage_options)
    except ArtifactNotFoundError:
        return None
    found: dict[str, Any] = dict(artifact._source or {})
    expected: dict[str, Any] = dict(source.describe())
    for said in (found, expected):
        # Where the dataset is may be spelled in several ways: its files tell.
        said.pop("dataset_uri", None)
        said["fragment_ids"] = sorted(said.get("fragment_ids", ()))
    theirs = artifact.model
    if theirs is not None:
        training = theirs.training or {}
        found |= {
            key: getattr(theirs, key) for key in ("metric", "num_partitions", "num_sub_vectors", "num_bits")
        }
        found |= {key: training.get(key) for key in ("sample_rate", "max_iters", "target_partition_size")}
    names = ("metric", "num_sub_vectors", "num_bits", "sample_rate", "max_iters", "target_partition_size")
    expected |= {"num_partitions": num_partitions, **{name: getattr(asked, name) for name in names}}
    if model is not None:
        found["model"], expected["model"] = theirs and theirs.fingerprint, model.fingerprint
    differences = [f"{k}={found.get(k)!r}, now {v!r}" for k, v in expected.items() if found.get(k) != v]
    otherwise = check_assigned(artifact, asked.assign)
    differences += [otherwise] if otherwise else []
    if not differences and model is None and ivf_centroids is not None and theirs is not None:
        given = fixed_size_list("ivf_centroids", ivf_centroids)
        if not given.flatten().equals(theirs.ivf_centroids.flatten()):
            differences.append("other ivf_centroids")
    if differences:
        raise ArtifactExistsError(
            f"{artifact.uri}: an artifact that was encoded otherwise is there: {'; '.join(differences)}. Ask for the same, choose another "
            "artifact_uri, or remove it"
        )
    log(
        "taken",
        "taking the artifact of {rows} rows that is at {artifact}",
        artifact=artifact.uri,
        rows=artifact.num_rows,
        dropped=artifact.manifest.get("rows", {}).get("dropped", {}),
    )
    return artifact


def discard_artifact(artifact: Artifact, uri: str, storage_options: Any) -> None:
    """Delete an artifact of which an index was made, unless another writer's is there now. The index stands either way."""
    try:
        there = Artifact.open(uri, storage_options)
        if there.manifest != artifact.manifest or there.partition_sizes() != artifact.partition_sizes():
            LOGGER.warning("%s was replaced by another writer and is kept", artifact.uri)
            return
        delete_artifact(uri, storage_options)
    except LanceArtifactError as error:
        LOGGER.warning("the index is committed; its artifact could not be deleted: %s", error)


def bare_files(uri: str, storage_options: Any) -> dict[str, float]:
    """The files of an artifact without a manifest, and when each was written; none where there is no such artifact."""
    return _bare(_files(uri, storage_options))


def _files(uri: str, storage_options: Any) -> dict[str, float]:
    return {name: at for name, size, at in core.list_folder(uri, "", storage_options) if size is not None}


def _bare(there: dict[str, float]) -> dict[str, float]:
    if MANIFEST in there or METADATA not in there:
        return {}
    found = [name for name in there if _SORTED.fullmatch(name)]
    # From the last one on: without the first it would be no artifact that can be found again.
    found.sort(key=lambda name: -int(name[len("sorted_") : -len(".lance")]))
    return {name: there[name] for name in (*found, METADATA)} if found else {}


def published_at(uri: str, storage_options: Any) -> float | None:
    """When an artifact was finished, by the store's clock; None where there is none."""
    there = _files(uri, storage_options)
    if MANIFEST in there or "unsorted.lance" in there:
        return there.get(MANIFEST)
    return max(_bare(there).values(), default=None)


def delete_artifact(uri: str, storage_options: Any) -> None:
    """Delete an artifact that can be opened, and nothing else of its folder."""
    bare = list(bare_files(uri, storage_options))
    if not bare:
        core.delete_artifact(uri, storage_options)
        return
    core.delete_files(uri, bare[:-1], [], storage_options)
    core.delete_files(uri, bare[-1:], [""], storage_options)


def absolute(uri: str | Path) -> str:
    """A path as it is meant now, whatever the current directory is later; a URI as it is."""
    if "://" in str(uri):
        return str(uri)
    path = Path(uri)
    # Of a user that there is not, it is the name of a folder.
    with suppress(RuntimeError):
        path = path.expanduser()
    return str(path.absolute())


def check_place(handle: Handle, artifact_uri: str | Path) -> str:
    """An artifact lies neither in the dataset that it is made from, nor around it. Where it is, absolute."""
    return check_apart(handle.root, artifact_uri)


def check_apart(dataset_uri: str, artifact_uri: str | Path) -> str:
    """The same, of a dataset by its URI."""
    where = absolute(artifact_uri)
    artifact, dataset = _place(where), _place(dataset_uri)
    if f"{artifact}/".startswith(f"{dataset}/") or f"{dataset}/".startswith(f"{artifact}/"):
        raise InvalidInputError(
            f"artifact_uri: got {shown_uri(str(artifact_uri))}, which is the dataset {dataset_uri} itself, inside it or around it; choose a folder of its own"
        )
    return where


def _place(uri: str) -> str:
    where = uri_place(uri)
    if where.startswith("file://"):
        where = unquote("/" + where.removeprefix("file://").partition("/")[2])
    elif where.partition("://")[1]:
        return where.rstrip("/")
    return os.path.realpath(where)
