"""`plan`: everything that a build is going to do, as a value: to be judged, stored, sent to workers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ._arguments import (
    DEFAULT_BITS,
    MAX_DEFAULT_PARTITIONS,
    TARGET_PARTITION_SIZE,
    IndexParams,
    Mode,
    StorageOptions,
    check_asked,
    check_sub_vectors,
    default_partitions,
    default_sub_vectors,
    fragment_list,
    given_centroids,
    index_mode,
    index_type_name,
    metric_name,
    trainable_partitions,
)
from ._artifacts import check_place, store_options
from ._assign import check_assign
from ._calls import awaited
from ._checked import checked
from ._dataset import Handle, vector_column
from ._estimate import Estimate, estimate, page
from ._lance_artifact import IvfPqModel
from ._run_files import is_run
from ._wanted import Wanted, check_latest, default_name
from .backends import Backend, TrainParams, check_resumable, resolve_backend
from .exceptions import ArtifactMismatchError, CorruptArtifactError, InvalidInputError

if TYPE_CHECKING:
    import lance

# A shard is what a worker that dies loses, and the folder, the manifest and the model that each one costs.
SHARD_ROWS = 1_000_000
MOST_SHARDS = 64


@dataclass(frozen=True)
class Shard:
    """A group of fragments that is encoded as one artifact."""

    fragment_ids: tuple[int, ...]
    num_rows: int


@dataclass(frozen=True)
class BuildPlan:
    """What a build is going to do. Frozen, picklable, and JSON by `to_json` and `from_json`; printed as a page.

    Attributes
    ----------
    dataset_uri : str
        Absolute, without credentials.
    version : int
    branch : str or None
        None for main.
    column : str
    field_id : int
    data_files : str
        Fingerprint of the column's files in the fragments to be indexed: the dataset is this one, or is refused.
    num_rows : int
        Live rows of all shards.
    shards : tuple of Shard
    backend : str
    model : str or None
        Fingerprint of the caller's model, or of its centroids alone, where they are not trained here.
    requested : mapping
        What the caller asked for, None where it is left to us: a run is resumed by a call that asks for the same.
    why : mapping of str to str
        Where ``num_partitions``, ``num_sub_vectors`` and the shards come from.
    estimate : Estimate or None
    """

    dataset_uri: str
    version: int
    branch: str | None
    column: str
    field_id: int
    data_files: str
    dtype: str
    dimension: int
    num_rows: int
    name: str
    mode: Mode
    index_type: str
    metric: str
    num_partitions: int
    num_sub_vectors: int
    num_bits: int
    sample_rate: int
    max_iters: int
    seed: int
    target_partition_size: int | None
    m: int
    ef_construction: int
    max_level: int
    skip_transpose: bool
    backend: str
    shards: tuple[Shard, ...]
    model: str | None
    requested: Mapping[str, Any]
    why: Mapping[str, str]
    estimate: Estimate | None
    assign: str = "exact"

    @property
    def pq_code_width(self) -> int:
        """Bytes of one code."""
        return self.num_sub_vectors * self.num_bits // 8

    @property
    def fragment_ids(self) -> list[int]:
        return [fragment for shard in self.shards for fragment in shard.fragment_ids]

    def training_params(self, ivf_centroids: Any = None) -> TrainParams:
        """What a backend's ``train`` gets; ``ivf_centroids`` are the caller's, if they are not trained."""
        given = None if ivf_centroids is None else self.centroids(ivf_centroids)
        return TrainParams(
            self.metric,
            self.num_partitions,
            self.num_sub_vectors,
            self.num_bits,
            self.sample_rate,
            self.max_iters,
            self.seed,
            given,
        )

    def centroids(self, ivf_centroids: Any) -> pa.FixedSizeListArray:
        """The caller's centroids in the column's dtype, which must be those that the plan was made with.

        Raises
        ------
        ArtifactMismatchError
        """
        given = given_centroids(ivf_centroids, self.dtype)
        if _fingerprint(given) != self.model:
            with_what = (
                "no centroids of the caller" if self.model is None else "other centroids, or a whole model"
            )
            raise ArtifactMismatchError(
                f"ivf_centroids: the plan was made with {with_what}; pass what it was made with"
            )
        return given

    def to_json(self) -> str:
        """All of it, as `from_json` takes it."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> BuildPlan:
        """The plan of a text that `to_json` made.

        Raises
        ------
        CorruptArtifactError
            It is no plan, or one of another release.
        """
        try:
            found = json.loads(text)
            shards = tuple(Shard(tuple(s["fragment_ids"]), s["num_rows"]) for s in found["shards"])
            made = found["estimate"]
            guess = None if made is None else Estimate(**made)
            return cls(**{**found, "shards": shards, "estimate": guess})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptArtifactError(f"no build plan, or one of another release: {error}") from error

    def differences(self, other: BuildPlan) -> list[str]:
        """What the caller of another plan asked for otherwise, in words."""
        # Plans of a release that had only one way to assign do not say it.
        asked = {
            "assign": "exact",
            **self.requested,
            "dataset": self.dataset_uri,
            "branch": self.branch,
            "column": self.column,
        }
        now = {
            **other.requested,
            "dataset": other.dataset_uri,
            "branch": other.branch,
            "column": other.column,
        }
        keys = sorted(asked.keys() | now.keys())
        return [f"{k}={asked.get(k)!r}, now {now.get(k)!r}" for k in keys if asked.get(k) != now.get(k)]

    def __str__(self) -> str:
        return page(self)


@awaited
@checked
def plan(
    dataset: lance.LanceDataset | str | Path,
    column: str | list[str],
    index_type: str = "IVF_PQ",
    name: str | None = None,
    metric: str = "L2",
    replace: bool = False,
    num_partitions: int | None = None,
    num_sub_vectors: int | None = None,
    *,
    mode: str | None = None,
    num_bits: int | None = None,
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    fragment_ids: Sequence[int] | None = None,
    target_partition_size: int | None = None,
    m: int = 20,
    ef_construction: int = 150,
    max_level: int = 7,
    skip_transpose: bool = False,
    model: IvfPqModel | None = None,
    ivf_centroids: Any = None,
    backend: str | Backend = "auto",
    devices: Sequence[int] | None = None,
    device_memory_limit: int | None = None,
    assign: str = "exact",
    num_shards: int | None = None,
    calibrate: bool = True,
    artifact_uri: str | Path | None = None,
    storage_options: StorageOptions | None = None,
) -> BuildPlan:
    """Say what a build would do, and about how long it takes, without doing it.

    Parameters
    ----------
    dataset, column, index_type, name, metric, replace, num_partitions, num_bits, sample_rate, max_iters, seed, fragment_ids, \
target_partition_size, m, ef_construction, max_level, skip_transpose, ivf_centroids, backend, devices, device_memory_limit, assign
        As in `create_index`; mode as in `finalize`.
    num_sub_vectors : int, optional
        Default as in LanceDB: dimension / 16, else dimension / 8, where that divides it.
    model : IvfPqModel, optional
        Nothing is trained: rows are encoded with this one.
    num_shards : int, optional
        Artifacts in which the rows are encoded: a million rows each and at most 64 by default, never more than there are fragments.
    calibrate : bool, default True
        Read and encode some thousand rows, for some seconds at most, to say how long the whole takes.
    artifact_uri : str or path, optional
        Folder of the run that is to be made of the plan. Where a run is there already, an index of that name is no error: it may be the
        run's own, which `Run.finalize` finds out. `Run.create` compares what was asked for.
    storage_options : dict, or callable that gives one, optional
        Of artifact_uri; as in `create_index`.

    Returns
    -------
    BuildPlan
        ``print(plan)`` shows a page. `Run.create` makes a run of it.

    Raises
    ------
    See `create_index`: what would fail at its start fails here.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    is_there = False
    if artifact_uri is not None:
        check_resumable(backend)
        place = check_place(handle, artifact_uri)
        is_there = is_run(place, store_options(handle, place, storage_options))
    made = planned_build(
        handle,
        path,
        IndexParams(
            index_type_name(index_type),
            metric_name(metric),
            num_partitions,
            num_sub_vectors,
            num_bits,
            sample_rate,
            max_iters,
            seed,
            target_partition_size,
            m,
            ef_construction,
            max_level,
            skip_transpose,
            assign,
        ),
        name=name,
        mode=index_mode(replace, mode),
        fragment_ids=fragment_list(fragment_ids),
        model=model,
        ivf_centroids=ivf_centroids,
        backend=(chosen := resolve_backend(backend, devices, device_memory_limit)),
        num_shards=num_shards,
    )
    wanted = Wanted(
        made.name, made.mode, made.field_id, path, made.index_type, made.metric, model and model.fingerprint
    )
    if not is_there:
        check_latest(handle, handle, wanted, made.fragment_ids, trains=model is None)
    source = handle.vectors(path, made.fragment_ids)
    return dataclasses.replace(made, estimate=estimate(made, source, chosen, calibrate))


def planned_build(
    handle: Handle,
    path: str,
    asked: IndexParams,
    *,
    name: str | None,
    mode: Mode,
    fragment_ids: list[int] | None,
    model: IvfPqModel | None,
    ivf_centroids: Any,
    backend: Backend,
    num_shards: int | None,
) -> BuildPlan:
    """A plan without an estimate, of arguments that were checked one by one."""
    asked.check()
    check_assign(asked.assign, backend)
    source = handle.vectors(path, fragment_ids)
    described = source.describe()
    why: dict[str, str] = {}
    given = None
    if model is not None:
        if ivf_centroids is not None:
            raise InvalidInputError("ivf_centroids: the model has its own; pass one of them")
        shape = (model.metric, model.dtype, model.dimension)
        if shape != (asked.metric, source.dtype, source.dimension):
            raise ArtifactMismatchError(
                f"the model is {shape}, expected (metric, dtype, dimension) = {(asked.metric, source.dtype, source.dimension)}"
            )
        check_asked(model, asked.num_partitions, asked.num_sub_vectors, asked.num_bits)
        partitions, sub_vectors, bits = model.num_partitions, model.num_sub_vectors, model.num_bits
        why["num_partitions"] = why["num_sub_vectors"] = "the model's"
        given = model.fingerprint
    else:
        bits = DEFAULT_BITS if asked.num_bits is None else asked.num_bits
        sub_vectors, why["num_sub_vectors"] = (
            default_sub_vectors(source.dimension, bits)
            if asked.num_sub_vectors is None
            else (asked.num_sub_vectors, "as asked")
        )
        check_sub_vectors(source.dimension, sub_vectors, bits)
        centroids = None if ivf_centroids is None else given_centroids(ivf_centroids, source.dtype)
        partitions, why["num_partitions"] = _partitions(asked, source.count_rows(), centroids, fragment_ids)
        if centroids is not None:
            given = _fingerprint(centroids)
    counts = _rows_of_fragments(handle, described["fragment_ids"])
    shards = _shards(counts, num_shards)
    why["shards"] = (
        "as asked"
        if num_shards
        else f"of about {max(SHARD_ROWS, sum(counts.values()) // MOST_SHARDS):,} rows"
    )
    settled = {
        **dataclasses.asdict(asked),
        "num_partitions": partitions,
        "num_sub_vectors": sub_vectors,
        "num_bits": bits,
    }
    return BuildPlan(
        dataset_uri=handle.root,
        version=handle.version,
        branch=handle.core.branch,
        column=path,
        field_id=handle.field_id(path),
        data_files=described["data_files"],
        dtype=source.dtype,
        dimension=source.dimension,
        num_rows=sum(counts.values()),
        name=name or default_name(handle, path),
        mode=mode,
        **settled,
        backend=backend.name,
        shards=shards,
        model=given,
        requested={
            **dataclasses.asdict(asked),
            # Said or left out, it is the same.
            "num_bits": bits,
            "name": name,
            "mode": mode,
            "fragment_ids": sorted(set(fragment_ids)) if fragment_ids else None,
            "num_shards": num_shards,
            "model": given,
        },
        why=why,
        estimate=None,
    )


def _fingerprint(centroids: pa.FixedSizeListArray) -> str:
    return hashlib.sha256(centroids.flatten().to_numpy(zero_copy_only=False).tobytes()).hexdigest()


def _partitions(
    asked: IndexParams, rows: int, centroids: pa.FixedSizeListArray | None, fragment_ids: list[int] | None
) -> tuple[int, str]:
    """How many partitions there will be, and why."""
    if centroids is not None:
        if asked.num_partitions not in (None, len(centroids)):
            raise InvalidInputError(
                f"Ivf centroids has {len(centroids)} clusters, but num_partitions={asked.num_partitions}"
            )
        return len(centroids), "as many as ivf_centroids"
    if asked.num_partitions is None:
        size = asked.target_partition_size or TARGET_PARTITION_SIZE[asked.index_type]
        made = default_partitions(rows, asked.target_partition_size, asked.index_type)
        return made, f"rows / {size}, between 1 and {MAX_DEFAULT_PARTITIONS}, as pylance has it"
    if fragment_ids is None:
        made = trainable_partitions(asked.num_partitions, rows, asked.sample_rate)
        if made < asked.num_partitions:
            return (
                made,
                f"rows / sample_rate, less than the {asked.num_partitions} asked for, as pylance has it",
            )
    return asked.num_partitions, "as asked"


def _rows_of_fragments(handle: Handle, fragment_ids: Sequence[int]) -> dict[int, int]:
    wanted = set(fragment_ids)
    return {f.fragment_id: f.count_rows() for f in handle.dataset.get_fragments() if f.fragment_id in wanted}


def _shards(counts: Mapping[int, int], num_shards: int | None) -> tuple[Shard, ...]:
    """Consecutive fragments, cut where the rows so far reach the next equal share."""
    rows = sum(counts.values())
    wanted = num_shards or min(MOST_SHARDS, max(1, rows // SHARD_ROWS))
    wanted = min(wanted, max(1, len(counts)))
    shards: list[Shard] = []
    ids: list[int] = []
    held = done = 0
    for place, (fragment, count) in enumerate(counts.items()):
        ids.append(fragment)
        held += count
        left = len(counts) - place - 1
        open_shards = wanted - len(shards)
        # Every shard gets a fragment at least.
        if open_shards > 1 and (
            (done + held) * wanted >= rows * (len(shards) + 1) or left == open_shards - 1
        ):
            shards.append(Shard(tuple(ids), held))
            done += held
            ids, held = [], 0
    if ids:
        shards.append(Shard(tuple(ids), held))
    return tuple(shards)
