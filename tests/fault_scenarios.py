"""What users do, as pairs of a state before and a call: for tests that let something go wrong in the middle of the call.

Everything here runs in a worker, over a local folder or a store. A scenario is prepared once; before each try its place is as it was then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lance
import pyarrow as pa

import lance_artifact as la
from commits import BUILD
from conftest import column as vector_column
from conftest import content, encoded, stored_in, vectors

DIM, FRAGMENT = 16, 300
ARTIFACT_K, WIDTH = 7, 6


@dataclass(frozen=True)
class Place:
    """A folder: a path, or a URI with its storage options."""

    base: str
    options: dict[str, str] = field(default_factory=dict)

    def at(self, name: str) -> str:
        return f"{self.base}/{name}"

    @property
    def storage(self) -> dict[str, Any]:
        return {"storage_options": self.options} if self.options else {}

    def dataset(self) -> Any:
        return lance.dataset(self.at("ds"), storage_options=self.options or None)


@dataclass(frozen=True)
class Scenario:
    """`prepare` makes the state before. `ready` opens what the call needs, and gives the call. `state` says what is there: equal, or not.

    `only_reads`: the call changes nothing. `durable`: what it made is on the disk when it returns, and is whole when it is there before.
    """

    prepare: Callable[[Place], None]
    ready: Callable[[Place], Callable[[], Any]]
    state: Callable[[Place], Any]
    only_reads: bool = False
    durable: bool = True
    #: The call after one that was stopped, where it is another.
    retry: Callable[[Place], Callable[[], Any]] | None = None
    stores: tuple[str, ...] = ("local", "s3")


def _rows(count: int, seed: int, first: int) -> pa.Table:
    return pa.table(
        {"id": pa.array(range(first, first + count)), "vector": vector_column(vectors(count, DIM, seed=seed))}
    )


def _dataset(place: Place) -> Any:
    return lance.write_dataset(
        _rows(2 * FRAGMENT, 0, 0), place.at("ds"), max_rows_per_file=FRAGMENT, **place.storage
    )


def _append(place: Place) -> None:
    lance.write_dataset(_rows(FRAGMENT, 1, 2 * FRAGMENT), place.at("ds"), mode="append", **place.storage)


# What is there.


def artifact_state(place: Place) -> Any:
    try:
        artifact = la.Artifact.open(place.at("artifact"), place.options or None)
    except la.ArtifactNotFoundError:
        return None
    report = artifact.verify()
    assert report.ok, f"the artifact that is there is damaged: {report}"
    return content(artifact)


def index_state(place: Place) -> Any:
    """For each segment: its fragments, and the codes of its rows."""
    ds = place.dataset()
    assert ds.count_rows() == ds.to_table(columns=["id"]).num_rows
    found = []
    for index in ds.describe_indices():
        for segment in index.segments:
            rows = stored_in(ds, index.name, segment.uuid, place.options or None)
            found.append((index.name, sorted(segment.fragment_ids), rows))
            _searched(ds)
    return sorted(found, key=lambda one: (one[0], one[1]))


def _searched(ds: Any) -> None:
    query = vectors(2 * FRAGMENT, DIM)[7]
    nearest = {"column": "vector", "q": query, "k": 1, "nprobes": 64, "refine_factor": 50}
    (found,) = ds.to_table(nearest=nearest)["id"].to_pylist()
    assert found == 7, f"the nearest row to row 7 is said to be {found}"


# Calls.


def _fill(place: Place, seed: int, **options: Any) -> None:
    made = la.PartitionArtifactBuilder(
        place.at("artifact"), num_partitions=ARTIFACT_K, pq_code_width=WIDTH, **options, **place.storage
    )
    with made:
        for part in range(3):
            made.append_batch(encoded(400, ARTIFACT_K, WIDTH, seed=seed + part, first=400 * part))
        made.finish()


def _upload(place: Place, **options: Any) -> Callable[[], Any]:
    """A file of several parts."""
    batch = encoded(250_000, ARTIFACT_K, 48, seed=1)

    def write() -> None:
        made = la.PartitionArtifactBuilder(
            place.at("artifact"),
            num_partitions=ARTIFACT_K,
            pq_code_width=48,
            num_buckets=1,
            **options,
            **place.storage,
        )
        with made:
            made.append_batch(batch)
            made.finish()

    return write


def _hashed(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _uploaded_state(place: Place) -> Any:
    try:
        artifact = la.Artifact.open(place.at("artifact"), place.options or None)
    except la.ArtifactNotFoundError:
        return None
    report = artifact.verify()
    assert report.ok, f"the artifact that is there is damaged: {report}"
    found = []
    for partition in range(artifact.num_partitions):
        table = artifact.read_partition(partition).read_all()
        codes = table["__pq_code"].combine_chunks().flatten().to_numpy()
        found.append(
            (table.num_rows, _hashed(table["_rowid"].to_numpy().tobytes()), _hashed(codes.tobytes()))
        )
    return found


def _write(place: Place) -> Callable[[], Any]:
    return lambda: _fill(place, 10)


def _overwrite(place: Place) -> Callable[[], Any]:
    return lambda: _fill(place, 20, overwrite=True)


def _write_unsynced(place: Place) -> Callable[[], Any]:
    return lambda: _fill(place, 10, sync=False)


def _verify(place: Place) -> Callable[[], Any]:
    def look() -> None:
        report = la.Artifact.open(place.at("artifact"), place.options or None).verify()
        assert report.ok, f"a sound artifact is said to be damaged: {report}"

    return look


def _read(place: Place) -> Callable[[], Any]:
    expected = artifact_state(place)

    def read() -> None:
        assert content(la.Artifact.open(place.at("artifact"), place.options or None)) == expected, (
            "rows are wrong"
        )

    return read


def _encode(place: Place, **options: Any) -> Callable[[], Any]:
    ds = place.dataset()
    model = la.train(ds, "vector", **BUILD)
    target = place.at("artifact")
    return lambda: la.build_artifact(ds, "vector", model, target, backend="cpu", **options, **place.storage)


def _finalize(place: Place, **options: Any) -> Callable[[], Any]:
    ds = place.dataset()
    return lambda: la.finalize(ds, "vector", place.at("artifact"), sync=True, **options, **place.storage)


def _create(place: Place) -> Callable[[], Any]:
    ds = place.dataset()
    return lambda: la.create_index(ds, "vector", replace=True, seed=3, sync=True, **BUILD)


def _extend(place: Place) -> Callable[[], Any]:
    ds = place.dataset()
    return lambda: la.extend_index(ds, "vector_idx", backend="cpu", sync=True)


def _merge(place: Place) -> Callable[[], Any]:
    ds = place.dataset()
    return lambda: la.merge_segments(ds, "vector_idx", sync=True)


def _resume(place: Place) -> Callable[[], Any]:
    ds = place.dataset()
    run: dict[str, Any] = {
        "artifact_uri": place.at("run"),
        "num_shards": 2,
        "resume": True,
        "sync": True,
        **place.storage,
    }
    return lambda: la.create_index(ds, "vector", **run, **BUILD)


def _extended(place: Place) -> None:
    la.create_index(_dataset(place), "vector", **BUILD)
    _append(place)


def _segments(place: Place) -> None:
    _extended(place)
    la.extend_index(place.dataset(), "vector_idx", backend="cpu")
    place.dataset().delete("id < 5")


def _encoded(place: Place) -> None:
    _dataset(place)
    _encode(place)()


def _plain(place: Place) -> None:
    _dataset(place)


def _half_a_run(place: Place) -> None:
    plan = la.plan(_dataset(place), "vector", num_shards=2, calibrate=False, **BUILD)
    options = place.options or None
    run = la.Run.create(plan, place.at("run"), storage_options=options, dataset_storage_options=options)
    run.train()
    run.encode(0)


def _refilled(place: Place) -> Callable[[], Any]:
    return lambda: _fill(place, 10, overwrite=True)


SCENARIOS = {
    "write": Scenario(lambda place: None, _write, artifact_state, retry=_refilled),
    "write-unsynced": Scenario(
        lambda place: None, _write_unsynced, artifact_state, durable=False, retry=_refilled, stores=("local",)
    ),
    "overwrite": Scenario(lambda place: _fill(place, 10), _overwrite, artifact_state),
    "upload": Scenario(
        lambda place: None,
        _upload,
        _uploaded_state,
        retry=lambda place: _upload(place, overwrite=True),
        stores=("s3",),
    ),
    "verify": Scenario(lambda place: _fill(place, 10), _verify, artifact_state, only_reads=True),
    "read": Scenario(lambda place: _fill(place, 10), _read, artifact_state, only_reads=True),
    "encode": Scenario(_plain, _encode, artifact_state, retry=lambda place: _encode(place, overwrite=True)),
    "finalize": Scenario(
        _encoded, _finalize, index_state, retry=lambda place: _finalize(place, replace=True)
    ),
    "create": Scenario(
        lambda place: la.create_index(_dataset(place), "vector", **BUILD), _create, index_state
    ),
    "extend": Scenario(_extended, _extend, index_state),
    "merge": Scenario(_segments, _merge, index_state),
    "resume": Scenario(_half_a_run, _resume, index_state),
}


def of(store: str, changing: bool = False) -> list[str]:
    """The names of a store's scenarios; of those that change something, if so wished."""
    return [
        name for name, one in SCENARIOS.items() if store in one.stores and not (changing and one.only_reads)
    ]


# In the worker.

_ready: dict[str, Callable[[], Any]] = {}


def prepare(name: str, place: Place) -> None:
    SCENARIOS[name].prepare(place)


def ready(name: str, place: Place) -> None:
    _ready["call"] = SCENARIOS[name].ready(place)


def again(name: str, place: Place) -> None:
    """As `ready`, for the call after one that was stopped."""
    _ready["call"] = (SCENARIOS[name].retry or SCENARIOS[name].ready)(place)


def call() -> None:
    _ready.pop("call")()


def state(name: str, place: Place) -> Any:
    return SCENARIOS[name].state(place)


def clean(name: str, place: Place) -> None:
    """Remove what failed tries left, as a user would."""
    if name == "resume":
        la.clean_run(place.at("run"), place.dataset(), **place.storage)
