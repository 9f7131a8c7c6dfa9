"""Whatever is passed to a public function: a right result, or an error of ours that names the argument and leaves the disk as it was.

`test_wrong_types.py` has wrong types of single arguments of the five functions that build, `test_cli_errors.py` the command line's. Here are the
other functions and methods with anything, and all functions with right arguments of every type together.
``LANCE_ARTIFACT_PROPERTIES=100 pytest tests/test_properties.py`` tries a hundred times as many.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

import lance_artifact as la
from conftest import column, vectors
from lance_artifact.backends.cpu import CpuBackend
from odd_values import PathOf, anything, examples, forms_of_matrix, forms_of_numbers, once

K, M, DIM, ROWS, BAD = 2, 4, 8, 300, 3
SHAPE: dict[str, Any] = {"num_partitions": K, "num_sub_vectors": M, "num_bits": 4, "sample_rate": 8, "max_iters": 2, "backend": "cpu"}  # fmt: skip
Tree = dict[str, bytes | None]


def tree(root: Path) -> Tree:
    """Every file with its content, and every folder."""
    return {str(p.relative_to(root)): None if p.is_dir() else p.read_bytes() for p in sorted(root.rglob("*"))}


class World:
    """A folder in which everything is there: a dataset with an index of two of its three fragments, an artifact, runs of all stages.

    It is always at the same place, and as it was at first before each example.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.kept = root / "here", root / "kept"
        for name in ("current", "temporary"):
            (self.root / name).mkdir(parents=True)
        array = vectors(ROWS, DIM)
        array[[5, 150, 299]] = np.nan
        table = pa.table({"id": pa.array(range(ROWS)), "vector": column(array)})
        ds = lance.write_dataset(table.slice(0, 200), self.uri, max_rows_per_file=100)
        la.create_index(ds, "vector", **SHAPE)
        lance.write_dataset(table.slice(200), self.uri, mode="append")
        ds.checkout_latest()
        self.model = la.IvfPqModel.from_index(ds, "vector_idx")
        la.build_artifact(ds, "vector", self.model, self.path("artifact"), backend="cpu", sync=False)
        plan = la.plan(ds, "vector", name="run_idx", num_shards=2, calibrate=False, **SHAPE)
        self.text = plan.to_json()
        for name, shards in (("new", 0), ("run", 1), ("done", 2)):
            run = la.Run.create(plan, self.path(name))
            for shard in range(shards):
                run.train(ds, backend="cpu")
                run.encode(shard, ds, backend="cpu")
        self.tree = tree(self.root)
        shutil.copytree(self.root, self.kept)

    @property
    def uri(self) -> str:
        return self.path("d.lance")

    def path(self, name: str) -> str:
        return str(self.root / name)

    def ds(self) -> Any:
        return lance.dataset(self.uri)

    def restore(self) -> None:
        """As it was, and relative paths lead into it."""
        if tree(self.root) != self.tree:
            shutil.rmtree(self.root)
            shutil.copytree(self.kept, self.root)
        os.chdir(self.root / "current")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("properties"))
    there, temporary = Path.cwd(), tempfile.tempdir
    tempfile.tempdir = made.path("temporary")
    os.chdir(made.root / "current")
    yield made
    os.chdir(there)
    tempfile.tempdir = temporary


# -- right arguments

flags = st.booleans()
fragments = st.lists(st.sampled_from([0, 1, 2]), min_size=1, unique=True).flatmap(forms_of_numbers)


def wholes(*values: int) -> st.SearchStrategy[Any]:
    return st.sampled_from([kind(v) for v in values for kind in (int, float, np.int64, np.uint8)])


def places(world: World, name: str) -> st.SearchStrategy[Any]:
    return st.sampled_from([world.path(name), Path(world.path(name)), PathOf(world.path(name)), f"../{name}", f"file://{world.path(name)}"])  # fmt: skip


def right(world: World) -> dict[str, st.SearchStrategy[Any]]:
    """For each argument values of every documented type. Not all of them go together."""
    model = world.model
    artifacts = st.sampled_from(
        [
            lambda u: u,
            Path,
            PathOf,
            la.Artifact.open,
            lambda u: [u],
            lambda u: once([u]),
            lambda u: (la.Artifact.open(u),),
        ]
    ).map(lambda form: form(world.path("artifact")))
    nothing = st.none()
    return {
        "dataset": st.sampled_from([lance.dataset, str, Path, PathOf]).map(lambda form: form(world.uri)),
        "column": st.sampled_from(["vector", "VECTOR", ["vector"], ("vector",)]),
        "name": st.sampled_from([None, "vector_idx", "other", "ünïcödé\n🜁 idx", np.str_("x")]),
        "index_type": st.sampled_from(["IVF_PQ", "ivf_pq", "IVF_HNSW_PQ"]),
        "metric": st.sampled_from(["l2", "L2", "euclidean", "cosine", "dot"]),
        "mode": st.sampled_from([None, "create", "replace", "append"]),
        "num_partitions": nothing | wholes(1, 2, 3),
        "num_sub_vectors": nothing | wholes(1, 2, 4, 8),
        "num_bits": wholes(4, 8),
        "sample_rate": wholes(1, 8, 200),
        "max_iters": wholes(1, 3),
        "seed": st.integers(0, 2**64 - 1) | wholes(0, 7),
        "fragment_ids": nothing | fragments,
        "target_partition_size": nothing | wholes(1, 100),
        "m": wholes(4, 8),
        "ef_construction": wholes(8, 30),
        "max_level": wholes(1, 7),
        "backend": st.sampled_from(["cpu", "auto", CpuBackend()]),
        "devices": nothing,
        "device_memory_limit": nothing,
        "assign": st.sampled_from(["exact", "fast"]),
        "artifact_uri": places(world, "made") | places(world, "artifact"),
        "artifacts": artifacts,
        "model": nothing | st.just(model),
        "ivf_centroids": nothing
        | forms_of_matrix(np.stack(model.ivf_centroids.to_numpy(zero_copy_only=False))),
        "pq_codebook": nothing
        | forms_of_matrix(
            np.stack(model.pq_codebook.to_numpy(zero_copy_only=False)).reshape(M, 16, DIM // M)
        ),
        "memory_limit": nothing | st.sampled_from([1000, 64 << 20, 2**40, np.int64(2**30)]),
        "num_buckets": nothing | wholes(1, 2),
        "num_shards": nothing | wholes(1, 2, 5),
        "index_uuid": nothing | st.uuids(version=4) | st.uuids(version=4).map(str),
        "storage_options": nothing | st.sampled_from([{}, {"a": "b"}, dict, lambda: {"a": "b"}]),
        "dataset_storage_options": nothing | st.just({}),
        "progress": flags | st.just(lambda step: None),
        "progress_callback": nothing | st.just(lambda step: None),
        "backend_name": nothing | st.just("mine"),
        "num_indices_to_merge": nothing | wholes(1, 2, 9),
        "k": wholes(1, 10, 200),
        "num_queries": wholes(1, 9),
        "queries": nothing
        | forms_of_matrix(vectors(3, DIM, seed=9)).filter(
            lambda q: not hasattr(q, "__arrow_c_array__") and not isinstance(q, pa.ChunkedArray)
        ),
        "nprobes": nothing | forms_of_numbers([1, 2]),
        "refine_factors": nothing | st.sampled_from([[None, 3], (1,), once([2])]),
        "target_recall": nothing | st.sampled_from([0.5, 1, np.float32(0.25)]),
        "uri": places(world, "run"),
        "accelerator": nothing,
        "batch_rows": nothing,
        "ivf_centroids_file": nothing,
        **dict.fromkeys(
            (
                "replace",
                "overwrite",
                "sync",
                "keep_artifact",
                "resume",
                "verify",
                "calibrate",
                "everything",
                "elsewhere",
                "dry_run",
                "train",
                "append",
                "skip_transpose",
                "measure_fit",
            ),
            flags | st.sampled_from([np.bool_(True), np.bool_(False)]),
        ),
    }


FUNCTIONS: dict[str, dict[str, Any]] = {
    "create_index": {"column": "vector", **SHAPE},
    "train": {"column": "vector", **SHAPE},
    "build_artifact": {"column": "vector", "backend": "cpu"},
    "finalize": {"column": "vector", "name": "made"},
    "build_segment": {"column": "vector", "name": "made"},
    "plan": {"column": "vector", "name": "made", "calibrate": False, **SHAPE},
    "describe_source": {"column": "vector"},
    "prepared_vectors": {"column": "vector", "metric": "l2"},
    "extend_index": {"name": "vector_idx", "backend": "cpu"},
    "merge_segments": {"name": "vector_idx"},
    "evaluate": {"name": "vector_idx", "num_queries": 3, "k": 3},
    "resume_run": {"backend": "cpu"},
    "clean_run": {"dry_run": True},
}
# What each of them needs and that is made anew for each example.
NEEDS = {"build_artifact": ("model", "artifact_uri"), "finalize": ("artifacts",), "build_segment": ("artifacts",), "resume_run": ("uri",), "clean_run": ("uri",)}  # fmt: skip
BUILDING = ("describe_source", "train", "build_artifact", "finalize", "create_index")


def parameters(function: Callable[..., Any]) -> list[str]:
    import inspect

    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]


def base(world: World, name: str) -> dict[str, Any]:
    """Arguments that are right together."""
    made = {
        "model": world.model, "artifact_uri": world.path("made"), "artifacts": world.path("artifact"), "uri": world.path("run"),
    }  # fmt: skip
    needed = {what: made[what] for what in NEEDS.get(name, ())}
    dataset = {} if name in ("resume_run", "clean_run") else {"dataset": world.ds()}
    return {**dataset, **FUNCTIONS[name], **needed}


def rows_of(fragment_ids: Any) -> int:
    """Usable rows of fragments: 99 of each hundred."""
    return ROWS - BAD if fragment_ids is None else 99 * len(fragment_ids)


def check_index(world: World, name: str) -> None:
    """The index says the truth of the dataset, and finds every usable row that it covers, once."""
    ds = world.ds()
    statistics = ds.stats.index_stats(name)
    assert statistics["num_indexed_rows"] + statistics["num_unindexed_rows"] == ROWS
    index = next(i for i in ds.describe_indices() if i.name == name)
    if not statistics["num_indexed_rows"] or index.index_type == "IVF_HNSW_PQ":
        return
    parts = {str(s.uuid): set(s.fragment_ids) for s in index.segments}
    metric = index.details["metric_type"].lower()
    nearest = {"column": "vector", "q": vectors(1, DIM)[0], "k": ROWS, "nprobes": 4096, "refine_factor": 2, "metric": metric}  # fmt: skip
    found = ds.scanner(
        columns=["id"], nearest=nearest, fast_search=True, index_segments=list(parts)
    ).to_table()
    covered = set().union(*parts.values())
    expected = {i for i in range(ROWS) if i // 100 in covered and i not in (5, 150, 299)}
    assert sorted(found["id"].to_pylist()) == sorted(expected)


def check_result(world: World, name: str, given: dict[str, Any], result: Any) -> None:
    """A result is what was asked for."""
    ids = given.get("fragment_ids")
    if name in ("create_index", "finalize"):
        assert isinstance(result, lance.LanceDataset)
        check_index(world, str(given.get("name") or "vector_idx"))
    elif name == "train":
        asked = given.get("num_sub_vectors")
        # dimension / 8, and an even number of 4 bits.
        default = 8 // given["num_bits"]
        assert result.dimension == DIM and result.num_sub_vectors == (default if asked is None else asked)
        assert result.num_bits == given["num_bits"] and result.num_partitions >= 1
    elif name == "build_artifact":
        assert result.verify().ok and result.num_rows == rows_of(ids)
    elif name == "build_segment":
        folder = Path(world.uri, "_indices", result.uuid)
        assert {p.name for p in folder.iterdir()} == {"index.idx", "auxiliary.idx"}
        assert set(result.fragment_ids) == {0, 1, 2}
    elif name == "plan":
        assert la.BuildPlan.from_json(result.to_json()) == result
        assert sorted(result.fragment_ids) == ([0, 1, 2] if ids is None else sorted(ids))
        assert str(result)
    elif name == "describe_source":
        assert result["fragment_ids"] == ([0, 1, 2] if ids is None else sorted(ids))
    elif name == "prepared_vectors":
        seen = sum(batch.num_rows for batch in result)
        assert seen == rows_of(ids) and seen + sum(result.dropped.values()) == result.num_rows
    elif name == "extend_index":
        assert result.segment is not None and result.num_rows == 99
        check_index(world, "vector_idx")
    elif name == "merge_segments":
        assert result.num_rows in (0, 198) and result.rows_dropped == 0
        check_index(world, "vector_idx")
    elif name == "evaluate":
        assert result.settings and all(0 <= s.recall <= 1 for s in result.settings)
        assert str(result) and result.to_json()
    elif name == "resume_run":
        check_index(world, "run_idx")
    elif name == "clean_run":
        assert all(left.kind in ("attempt", "artifact", "run") for left in result)


# Words by which messages speak of an argument, beside its own name: a place is named by the same code wherever it is given, and the metric in
# pylance's words.
ALIASES = {"uri": ["artifact_uri"], "metric": ["Metric"]}


def names_one(said: str, names: Iterable[str]) -> bool:
    """Whether a message names one of these arguments, as a word of its own."""
    words = [word for name in names for word in (name, *ALIASES.get(name, ()))]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said) for word in words)


def called(world: World, call: Callable[..., Any], arguments: dict[str, Any], names: Any) -> Any:
    """The result of a call, or None where it was refused as it should be."""
    world.restore()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(**arguments)
    except ZeroDivisionError as error:
        # What a caller's own object raises is the caller's.
        assert str(error) == "asked of a value that fails"
        assert tree(world.root) == world.tree
        return None
    except la.LanceArtifactError as error:
        said = str(error)
        note(f"{type(error).__name__}: {said}")
        assert type(error) is not la.LanceArtifactError, said
        assert said.strip() and len(said) < 4000
        if isinstance(error, la.InvalidInputError):
            assert names_one(said, names), (list(names), said)
        now = tree(world.root)
        assert now == world.tree, sorted(k for k in now.keys() | world.tree.keys() if now.get(k, 0) != world.tree.get(k, 0))  # fmt: skip
        return None
    except TypeError as error:
        # The caller's too: what a callable raises that should give the options.
        assert arguments.get("storage_options") is len and "len() takes exactly one" in str(error)
        assert tree(world.root) == world.tree
        return None


def test_every_function_is_here() -> None:
    functions = {n for n in la.__all__ if callable(getattr(la, n)) and not isinstance(getattr(la, n), type)}
    elsewhere = {"available_backends", "cancel_on", "in_thread", "register", "unregister"}
    assert functions - elsewhere == FUNCTIONS.keys()


@examples(100)
@given(name=st.sampled_from(sorted(FUNCTIONS)), data=st.data())
def test_right_arguments_in_any_combination(name: str, data: st.DataObject, world: World) -> None:
    function, kinds, arguments = getattr(la, name), right(world), base(world, name)
    chosen = data.draw(
        st.lists(st.sampled_from(sorted(kinds.keys() & set(parameters(function)))), max_size=4, unique=True)
    )
    world.restore()
    for what in chosen:
        arguments[what] = data.draw(kinds[what], label=what)
    ids = arguments.get("fragment_ids")
    if isinstance(ids, Iterator):
        # So that it is known afterwards what it was.
        arguments["fragment_ids"] = ids = list(ids)
    result = called(world, function, arguments, arguments)
    if result is not None:
        known = ids.to_pylist() if isinstance(ids, (pa.Array, pa.ChunkedArray)) else ids
        check_result(world, name, {**arguments, "fragment_ids": known}, result)


@examples(180)
@given(name=st.sampled_from(sorted(FUNCTIONS.keys() - set(BUILDING))), data=st.data())
def test_anything_where_it_does_not_belong(name: str, data: st.DataObject, world: World) -> None:
    function, kinds, arguments = getattr(la, name), right(world), base(world, name)
    # A callable is right there, whatever it does.
    there = [p for p in parameters(function) if p not in ("progress", "progress_callback")]
    chosen = data.draw(st.lists(st.sampled_from(there), min_size=1, max_size=2, unique=True))
    world.restore()
    for what in chosen:
        arguments[what] = data.draw(anything, label=what)
    if data.draw(st.booleans()) and (rest := sorted(kinds.keys() & set(there) - set(chosen))):
        other = data.draw(st.sampled_from(rest))
        arguments[other] = data.draw(kinds[other], label=other)
        chosen.append(other)
    result = called(world, function, arguments, chosen)
    if result is not None and not isinstance(result, la.PreparedVectors):
        note(str(result)[:200])


# -- classes and their methods


def methods(world: World) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Methods, each with arguments that are right."""
    ds = world.ds()
    new, run, done = (la.Run.open(world.path(name)) for name in ("new", "run", "done"))
    artifact = la.Artifact.open(world.path("artifact"))
    backend = {"backend": "cpu"}
    work = {**backend, "devices": None, "device_memory_limit": None, "memory_limit": None}
    return {
        "IvfPqModel.from_index": (la.IvfPqModel.from_index, {"dataset": ds, "name": "vector_idx"}),
        "Artifact.open": (la.Artifact.open, {"uri": artifact.uri, "storage_options": None}),
        "Artifact.read_partition": (artifact.read_partition, {"partition": 0}),
        "BuildPlan.from_json": (la.BuildPlan.from_json, {"text": world.text}),
        "BuildPlan.centroids": (run.plan.centroids, {"ivf_centroids": None}),
        "Run.create": (la.Run.create, {"plan": run.plan, "uri": world.path("run"), "storage_options": None, "dataset_storage_options": None}),
        "Run.open": (la.Run.open, {"uri": world.path("run"), "storage_options": None, "dataset_storage_options": None}),
        "Run.shard_uri": (run.shard_uri, {"shard": 0}),
        "Run.dataset": (run.dataset, {"dataset": ds}),
        "Run.train": (new.train, {"dataset": ds, "model": None, "ivf_centroids": None, "sample": None, **work}),
        "Run.encode": (run.encode, {"shard": 1, "dataset": ds, "model": None, **work}),
        "Run.finalize": (done.finalize, {"dataset": ds, "sync": False, "memory_limit": None}),
        "CpuEncoder": (la.CpuEncoder, {"model": world.model}),
        "CpuEncoder.encode": (la.CpuEncoder(world.model).encode, {"vectors": column(vectors(3, DIM))}),
        "IvfPqModel.with_training": (world.model.with_training, {"sample_rate": 3, "max_iters": 3, "target_partition_size": 3}),
    }  # fmt: skip


@examples(160)
@given(data=st.data())
def test_anything_where_a_method_is_called(data: st.DataObject, world: World) -> None:
    world.restore()
    there = methods(world)
    name = data.draw(st.sampled_from(sorted(there)))
    function, arguments = there[name]
    chosen = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    for what in chosen:
        arguments[what] = data.draw(anything, label=what)
    # Arguments of the one that is there say "artifact_uri" for "uri".
    with suppress(IndexError):  # documented, of read_partition
        called(world, function, arguments, [*chosen, *(["model"] if name == "CpuEncoder" else [])])


@examples(60)
@given(event=anything)
def test_anything_to_cancel_on(event: Any, world: World) -> None:
    asked = getattr(event, "is_set", event)
    try:
        with la.cancel_on(event):
            pass
    except la.InvalidInputError as error:
        assert "event" in str(error) and not callable(asked)
    else:
        assert callable(asked)


def test_calls_in_a_thread_end_as_they_do_here(world: World) -> None:
    world.restore()
    stop = threading.Event()
    found = asyncio.run(la.in_thread(la.describe_source, world.uri, "vector"))
    assert found == la.describe_source(world.uri, "vector")
    with pytest.raises(la.InvalidInputError, match="column"):
        asyncio.run(la.in_thread(la.describe_source, world.uri, 3))
    stop.set()
    with la.cancel_on(stop), pytest.raises(la.CancelledError):
        la.build_artifact(world.uri, "vector", world.model, world.path("made"), backend="cpu")
    assert tree(world.root) == world.tree


# -- arrays


@examples(120)
@given(
    dtype=st.sampled_from(["float16", "float32", "float64"]), bits=st.sampled_from([4, 8]), shape=st.sampled_from([(1, 2), (3, 2), (5, 4)]),
    data=st.data(),
)  # fmt: skip
def test_a_model_is_what_its_arrays_say(
    dtype: str, bits: int, shape: tuple[int, int], data: st.DataObject
) -> None:
    """The same values in any form make the same model, which gives them back and encodes the same vectors alike."""
    partitions, sub_vectors = shape
    centroids = vectors(partitions, 8, dtype)
    codebook = vectors(sub_vectors * 2**bits, 8 // sub_vectors, dtype, seed=1).reshape(
        sub_vectors, 2**bits, -1
    )
    plain = la.IvfPqModel(centroids, codebook)
    forms = [data.draw(forms_of_matrix(array)) for array in (centroids, codebook)]
    # Lists of Python's numbers are float64.
    made = la.IvfPqModel(*forms)
    assert made == plain and hash(made) == hash(plain) and made.fingerprint == plain.fingerprint
    assert (made.num_partitions, made.num_sub_vectors, made.num_bits, made.dtype) == (*shape, bits, dtype)
    back = np.stack(made.ivf_centroids.to_numpy(zero_copy_only=False))
    assert back.tobytes() == centroids.tobytes()
    assert made.pq_codebook.flatten().to_numpy(zero_copy_only=False).tobytes() == codebook.tobytes()
    rows = vectors(7, 8, dtype, seed=2)
    expected = la.CpuEncoder(plain).encode(column(rows))
    found = la.CpuEncoder(made).encode(data.draw(forms_of_matrix(rows)))
    assert all(a.equals(b) for a, b in zip(found, expected, strict=True))
