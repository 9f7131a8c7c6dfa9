"""Runs: plans, what a second try finds, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import stored, vectors
from lance_artifact import _run
from test_extend import DIM, ROWS, K, M, append, segments
from test_merge import check_searches

ASK: dict[str, Any] = {"num_partitions": K, "num_sub_vectors": M, "max_iters": 5, "backend": "cpu"}


def plan(ds: Any, **options: Any) -> la.BuildPlan:
    return la.plan(ds, "vector", **{**ASK, "num_shards": 3, **options})


def build(ds: Any, run: Path, **options: Any) -> Any:
    return la.create_index(ds, "vector", artifact_uri=run, **{**ASK, **options})


# -- plans


def test_a_plan_is_a_value(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    made = plan(ds)
    assert pickle.loads(pickle.dumps(made)) == made
    assert la.BuildPlan.from_json(made.to_json()) == made
    assert made.differences(made) == []
    assert (made.version, made.num_rows, made.num_partitions, made.pq_code_width) == (1, ROWS, K, M)
    assert made.fragment_ids == [0, 1, 2] and [s.num_rows for s in made.shards] == [1000] * 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.num_rows = 3  # type: ignore[misc]
    for text in ("{}", "[]", "no", json.dumps({**json.loads(made.to_json()), "more": 1})):
        with pytest.raises(la.CorruptArtifactError, match="no build plan"):
            la.BuildPlan.from_json(text)


def test_what_a_plan_says(write: Callable[..., Any]) -> None:
    array = vectors(ROWS, 32)
    array[::10] = np.nan
    ds = write(array)
    made = la.plan(ds, "vector", backend="cpu")
    # As pylance: rows / 8192, at least one; as LanceDB: dimension / 16.
    assert (made.num_partitions, made.num_sub_vectors, len(made.shards)) == (1, 2, 1)
    guess = made.estimate
    assert guess is not None and guess.rows_dropped == ROWS // 10
    assert guess.seconds.keys() == {"train", "encode", "finalize"} and min(guess.seconds.values()) >= 0
    text = str(made)
    for expected in (
        "float32[32], 3,000 rows",
        "as LanceDB has it",
        "about 300 rows without a usable vector",
        "time",
        "memory",
    ):
        assert expected in text
    assert la.plan(ds, "vector", backend="cpu", calibrate=False).estimate is not None
    with pytest.raises(la.InvalidInputError, match="num_sub_vectors: got None, and dimension 12"):
        la.plan(write(vectors(300, 12), "odd.lance"), "vector")


def test_shards_are_balanced(write: Callable[..., Any]) -> None:
    ds = write(vectors(3000, 4), max_rows_per_file=100)
    ds.delete("id < 50")
    for num_shards in (1, 7, 29, 30, 500):
        made = plan(ds, num_shards=num_shards, num_sub_vectors=2)
        assert len(made.shards) == min(num_shards, 30)
        assert made.fragment_ids == list(range(30)) and sum(s.num_rows for s in made.shards) == 2950
        if num_shards == 7:
            assert max(s.num_rows for s in made.shards) <= 2 * 2950 / 7


def test_a_thousand_shards_are_planned_at_once(tmp_path: Path) -> None:
    ds = lance.write_dataset(
        pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors(2000, 4).reshape(-1)), 4)}),
        str(tmp_path / "many"),
        max_rows_per_file=2,
    )
    made = plan(ds, num_shards=1000, num_sub_vectors=2, calibrate=False)
    assert len(made.shards) == 1000 and {s.num_rows for s in made.shards} == {2}


def test_what_would_fail_fails_in_the_plan(write: Callable[..., Any]) -> None:
    ds = write(vectors(ROWS, DIM))
    for options, match in (
        ({"num_sub_vectors": 5}, "must be divisible"),
        ({"index_type": "IVF_FLAT"}, "index_type: got 'IVF_FLAT'"),
        ({"index_type": "IVF_HNSW_PQ", "m": 2}, "expected m from 4"),
        ({"fragment_ids": [77]}, "not in"),
        ({"backend": "none"}, "backend: got 'none'"),
    ):
        with pytest.raises(la.InvalidInputError, match=match):
            plan(ds, **options)
    build(ds, Path(f"{ds.uri}-run"), resume=True)
    with pytest.raises(la.IndexExistsError):
        plan(ds)


# -- runs


def test_the_same_index_as_without_a_run(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", name="plain", **ASK)
    build(ds, tmp_path / "run", name="run", resume=True, num_shards=3)
    assert stored(ds, "plain") == stored(ds, "run")
    status = la.Run.open(tmp_path / "run").status()
    assert (
        status.is_trained
        and status.shards == (True,) * 3
        and (status.rows_done, status.rows_left) == (ROWS, 0)
    )
    assert status.committed is not None and status.committed["segment"] in segments(ds, "run")
    assert "shards: 3 of 3, 3,000 rows done" in str(status)


class Stopped(Exception):
    """The process is gone."""


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> Callable[[], None]:
    """Let a run end when so many shards were encoded; the answer lets it go on."""
    encode, done = _run.build_artifact, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if len(done) == shards:
            raise Stopped
        made = encode(*args, **kwargs)
        done.append(made)
        return made

    monkeypatch.setattr(_run, "build_artifact", wrapped)
    return lambda: monkeypatch.setattr(_run, "build_artifact", encode)


def test_what_is_there_is_taken(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = write(vectors(ROWS, DIM))
    run = tmp_path / "run"
    go_on = stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        build(ds, run, resume=True, num_shards=3)
    status = la.Run.open(run).status()
    assert (
        status.is_trained
        and sum(status.shards) == 2
        and status.rows_left == 1000
        and status.committed is None
    )
    go_on()
    trained, encoded = [], []
    monkeypatch.setattr(_run, "train", lambda *a, **k: trained.append(a))
    encode = _run.build_artifact
    monkeypatch.setattr(
        _run, "build_artifact", lambda *a, **k: encoded.append(k["fragment_ids"]) or encode(*a, **k)
    )
    # Rows that came meanwhile are not the run's, and do no harm.
    append(ds, vectors(10, DIM))
    build(lance.dataset(ds.uri), run, num_shards=3)
    assert trained == [] and encoded == [[2]]
    ds = lance.dataset(ds.uri)
    la.create_index(ds.checkout_version(1), "vector", name="plain", **ASK)
    ds.checkout_latest()
    assert stored(ds, "vector_idx") == stored(ds, "plain")


def test_a_commit_that_happened_is_recognised(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    run = tmp_path / "run"
    build(ds, run, resume=True)
    version, before = ds.version, segments(ds)
    for again in (lambda: build(ds, run), lambda: la.resume_run(run), lambda: la.Run.open(run).finalize(ds)):
        again()
        assert (lance.dataset(ds.uri).version, segments(ds)) == (version, before)
    # Also where the process ended between the commit and the note of it.
    (run / "committed.json").unlink()
    build(ds, run)
    assert ds.version == version and (run / "committed.json").exists()
    # And where the index grew since.
    append(ds, vectors(100, DIM))
    la.extend_index(ds, "vector_idx")
    la.merge_segments(ds, "vector_idx")
    version = ds.version
    build(ds, run)
    assert ds.version == version
    ds.drop_index("vector_idx")
    build(ds, run)
    assert segments(ds).keys() != before.keys()
    # Another one of that name is none of it.
    la.create_index(ds, "vector", replace=True, **{**ASK, "seed": 7})
    with pytest.raises(la.IndexExistsError):
        build(ds, run)


def test_another_call_is_refused_with_the_difference(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    run = tmp_path / "run"
    build(ds, run, resume=True)
    for options, what in (
        ({"num_partitions": K + 1}, f"num_partitions={K}, now {K + 1}"),
        ({"metric": "cosine"}, "metric='l2', now 'cosine'"),
        ({"seed": 4}, "seed=0, now 4"),
        ({"name": "other"}, "name=None, now 'other'"),
        ({"fragment_ids": [1]}, r"fragment_ids=None, now \[1\]"),
        ({"replace": True}, "mode='create', now 'replace'"),
    ):
        with pytest.raises(la.ArtifactMismatchError, match=what):
            build(ds, run, **options)
    other = write(vectors(ROWS, DIM, seed=3), "other.lance")
    with pytest.raises(la.ArtifactMismatchError, match="dataset="):
        build(other, run)
    with pytest.raises(la.ArtifactMismatchError, match="it is another dataset"):
        la.resume_run(run, other)


def test_a_dataset_that_was_written_anew(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = write(vectors(ROWS, DIM))
    stop_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        build(ds, tmp_path / "run", resume=True, num_shards=3)
    ds = write(vectors(ROWS, DIM, seed=5), mode="overwrite")
    with pytest.raises(la.CommitConflictError, match="rewritten"):
        monkeypatch.undo()
        build(ds, tmp_path / "run", num_shards=3)


def test_a_folder_of_something_else(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(la.ArtifactExistsError, match="thesis"):
        build(ds, tmp_path / "full", resume=True)
    with pytest.raises(la.ArtifactNotFoundError, match="no run here"):
        la.Run.open(tmp_path / "none")
    for place in (f"{ds.uri}/run", ds.uri, str(Path(ds.uri).parent)):
        with pytest.raises(la.InvalidInputError, match="inside it or around it"):
            la.Run.create(plan(ds), place)
    with pytest.raises(la.InvalidInputError, match="needs artifact_uri"):
        la.create_index(ds, "vector", resume=True, **ASK)
    with pytest.raises(la.InvalidInputError, match="needs resume=True"):
        build(ds, tmp_path / "new", num_shards=2)
    for damage in (b"", b"{}", b'{"format": "x", "format_version": 1, "run_id": "", "plan": {}}'):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "plan.json").write_bytes(damage)
        with pytest.raises(la.CorruptArtifactError):
            la.Run.open(tmp_path / "bad")


def test_steps_by_hand(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    assert pickle.loads(pickle.dumps(run)) == run == la.Run.open(tmp_path / "run")
    with pytest.raises(la.InvalidInputError, match="no model yet"):
        run.encode(0)
    with pytest.raises(la.ArtifactNotFoundError, match="no model yet"):
        run.finalize(ds)
    model = run.train(backend="cpu")
    assert run.model() == model and run.train() == model and run.model().training == model.training
    first = run.encode(1, backend="cpu")
    assert run.encode(1).manifest == first.manifest
    with pytest.raises(la.ArtifactNotFoundError, match=r"shards \[0, 2\] of 3"):
        run.finalize(ds)
    with pytest.raises(la.InvalidInputError, match="shard: got 3, expected 0 to 2"):
        run.encode(3)
    for shard in range(3):
        run.encode(shard, backend="cpu")
    assert run.finalize(ds) is ds
    check_searches(ds)
    # What a process that was killed while it wrote the plan or the model leaves.
    (tmp_path / "run" / ".lance-artifact-0123abcd-x1Y2z3").write_bytes(b"half")
    la.clean_run(run.uri, everything=True)
    assert not (tmp_path / "run").exists()


def test_a_shard_of_another_run_is_refused(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    run.train(backend="cpu")
    other = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, seed=3, max_iters=2, backend="cpu")
    la.build_artifact(ds, "vector", other, run.shard_uri(0), fragment_ids=[0], backend="cpu")
    with pytest.raises(la.ArtifactMismatchError, match="is not shard 0 of this run"):
        run.encode(0)


def test_a_callers_model(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, max_iters=5, backend="cpu")
    run = la.Run.create(plan(ds, model=model, num_partitions=None, num_sub_vectors=None), tmp_path / "run")
    with pytest.raises(la.InvalidInputError, match="pass them"):
        run.train()
    other = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, seed=3, max_iters=2, backend="cpu")
    with pytest.raises(la.ArtifactMismatchError, match="was planned with model"):
        run.train(model=other)
    assert run.train(model=model) == run.model() == model
    given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}
    build(ds, tmp_path / "again", name="a", resume=True, num_shards=2, **given)
    build(ds, tmp_path / "centroids", name="b", resume=True, ivf_centroids=model.ivf_centroids)
    assert la.IvfPqModel.from_index(ds, "a") == model
    assert la.IvfPqModel.from_index(ds, "b").ivf_centroids == model.ivf_centroids


def test_two_tries_at_once(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(build(lance.dataset(ds.uri), tmp_path / "run", resume=True, num_shards=3))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r for r in results if isinstance(r, BaseException)] == []
    ds = lance.dataset(ds.uri)
    assert len(segments(ds)) == 1
    la.create_index(ds.checkout_version(1), "vector", name="plain", **ASK)
    ds.checkout_latest()
    assert stored(ds, "vector_idx") == stored(ds, "plain")
    for handle in results:
        assert len(segments(handle)) == 1


def test_a_run_is_not_kept_where_nobody_wants_it(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds, tmp_path / "run", resume=True, keep_artifact=False, num_shards=2)
    assert not (tmp_path / "run").exists() and len(segments(ds)) == 1


# -- repeated calls without a run


def test_a_plain_repeat(write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lance_artifact import _create_index

    ds = write(vectors(ROWS, DIM))
    build(ds, tmp_path / "a", name="first")
    with monkeypatch.context() as patch:
        patch.setattr(_create_index, "train_handle", lambda *a, **k: pytest.fail("trained again"))
        patch.setattr(_create_index, "build_artifact", lambda *a, **k: pytest.fail("encoded again"))
        ds = ds.checkout_version(1)
        build(ds, tmp_path / "a", name="second")
        ds.checkout_latest()
    assert stored(ds, "first") == stored(ds, "second")
    for options, match in (
        ({"num_partitions": K + 1}, f"num_partitions={K}, now {K + 1}"),
        ({"metric": "dot"}, "metric='l2', now 'dot'"),
        ({"max_iters": 6}, "max_iters=5, now 6"),
        ({"fragment_ids": [0]}, "fragment_ids="),
    ):
        with pytest.raises(la.ArtifactExistsError, match=match):
            build(ds.checkout_version(1), tmp_path / "a", name="third", **options)
    with pytest.raises(la.ArtifactExistsError):
        build(ds.checkout_version(1), tmp_path / "a", name="third", resume=False)
    append(ds, vectors(10, DIM))
    with pytest.raises(la.ArtifactExistsError, match="version=1, now"):
        build(lance.dataset(ds.uri), tmp_path / "a", name="third")


def test_centroids_are_those_of_the_plan(write: Callable[..., Any], tmp_path: Path) -> None:
    """In any float type, and no others: a run is of what it was planned with."""
    ds = write(vectors(ROWS, DIM))
    given = vectors(K, DIM, seed=3)
    plan = la.plan(
        ds, "vector", num_sub_vectors=M, ivf_centroids=given.astype("float64"), backend="cpu", calibrate=False
    )
    run = la.Run.create(plan, tmp_path / "run")
    with pytest.raises(la.ArtifactMismatchError, match="other centroids"):
        run.train(ivf_centroids=given + 1, backend="cpu")
    assert run.model() is None
    model = run.train(ivf_centroids=given.tolist(), backend="cpu")
    assert model.ivf_centroids.flatten().to_numpy().tolist() == given.reshape(-1).tolist()
    plain = la.Run.create(
        la.plan(ds, "vector", num_partitions=K, num_sub_vectors=M, backend="cpu", calibrate=False),
        tmp_path / "plain",
    )
    with pytest.raises(la.ArtifactMismatchError, match="no centroids"):
        plain.train(ivf_centroids=given, backend="cpu")


def test_what_a_run_has_no_use_for_is_refused(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    with pytest.raises(la.InvalidInputError, match="index_uuid"):
        build(ds, tmp_path / "run", resume=True, index_uuid="6a1b1c64-0a12-4c25-8a3a-3f1d2a0c9f11")
    assert not (tmp_path / "run").exists()


def test_a_plan_of_defaults_is_taken_up_by_create_index(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, 16))
    plan = la.plan(ds, "vector", num_partitions=2, backend="cpu", calibrate=False)
    la.Run.create(plan, tmp_path / "run")
    la.create_index(ds, "vector", num_partitions=2, artifact_uri=tmp_path / "run", resume=True, backend="cpu")
    assert ds.describe_indices()[0].num_rows_indexed == ROWS


def test_a_plan_that_cannot_end_well_is_none(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds, tmp_path / "a", fragment_ids=[0])
    with pytest.raises(la.ArtifactMismatchError, match="one trained now would be another"):
        la.plan(
            ds, "vector", mode="append", fragment_ids=[1], num_partitions=K, num_sub_vectors=M, backend="cpu"
        )
    with pytest.raises(la.ArtifactMismatchError, match="one trained now would be another"):
        build(ds, tmp_path / "b", fragment_ids=[1], append=True, resume=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["IVF_FLAT", "empty"])
def test_another_index_in_the_place_of_a_runs(kind: str, write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    build(ds, tmp_path / "run", resume=True, replace=True)
    if kind == "empty":
        ds.create_index("vector", "IVF_PQ", num_partitions=2, num_sub_vectors=M, replace=True, train=False)
    else:
        ds.create_index("vector", kind, num_partitions=2, replace=True, name="vector_idx")
    build(lance.dataset(ds.uri), tmp_path / "run", resume=True, replace=True)
    index = lance.dataset(ds.uri).describe_indices()[0]
    assert (index.index_type, index.num_rows_indexed) == ("IVF_PQ", ROWS)


def test_errors_of_training_pickle(write: Callable[..., Any]) -> None:
    import pickle

    ds = write(vectors(100, DIM))
    with pytest.raises(la.InvalidInputError, match="100 usable vectors") as told:
        la.train(ds, "vector", num_partitions=2, num_sub_vectors=M, backend="cpu")
    assert type(told.value) is la.InvalidInputError
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)
