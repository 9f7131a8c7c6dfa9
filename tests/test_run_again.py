"""A run that is committed, and asked for again when others have changed the index: it is there in full, made again, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_artifact as la
from commits import before_commit, folders
from conftest import vectors
from lance_artifact import _run, _run_commit, cli
from test_extend import DIM, ROWS, K, M, append, segments
from test_merge import check_searches
from test_run import ASK, build, plan


def test_an_index_of_a_part_is_not_the_runs(write: Callable[..., Any], tmp_path: Path) -> None:
    """Dropped, and of the same model somebody built less: that is not what was committed."""
    ds = write(vectors(ROWS, DIM))
    run = tmp_path / "run"
    build(ds, run, resume=True, replace=True)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook, "num_sub_vectors": M}

    def less(*fragments: int) -> None:
        ds.checkout_latest()
        ds.drop_index("vector_idx")
        la.create_index(ds, "vector", fragment_ids=list(fragments), backend="cpu", **given)

    again = (
        lambda: build(ds, run, replace=True),
        lambda: la.resume_run(run, ds),
        lambda: la.Run.open(run).finalize(ds),
    )
    for call in again:
        less(0)
        call()
        assert list(segments(ds).values()) == [{0, 1, 2}]
        check_searches(ds)
    # A run that may replace nothing says so.
    build(ds, tmp_path / "create", name="other", resume=True)
    model = la.IvfPqModel.from_index(ds, "other")
    given |= {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}
    ds.drop_index("other")
    la.create_index(ds, "vector", name="other", fragment_ids=[0], backend="cpu", **given)
    with pytest.raises(la.IndexExistsError):
        build(ds, tmp_path / "create", name="other")


def test_an_index_of_what_was_compacted_may_be_a_part_of_the_runs(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    """None of the fragments that were planned is there: what has no index may be the run's rows, or new ones."""
    ds = write(vectors(ROWS, DIM))
    run = tmp_path / "run"
    build(ds, run, resume=True, replace=True)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    ds.drop_index("vector_idx")
    ds.delete("id % 2 = 0")
    ds.optimize.compact_files(target_rows_per_fragment=500)
    one, *others = [f.fragment_id for f in ds.get_fragments()]
    assert others and one > 2
    la.create_index(
        ds,
        "vector",
        fragment_ids=[one],
        backend="cpu",
        ivf_centroids=model.ivf_centroids,
        pq_codebook=model.pq_codebook,
        num_sub_vectors=M,
    )
    version = ds.version
    with pytest.raises(la.CommitConflictError, match="cannot be told whether"):
        build(ds, run, replace=True)
    assert lance.dataset(ds.uri).version == version
    la.extend_index(ds, "vector_idx", backend="cpu")
    version = ds.version
    build(ds, run, replace=True)
    assert ds.version == version


def test_what_was_made_of_the_runs_index_is_its_own(write: Callable[..., Any], tmp_path: Path) -> None:
    """Extended, merged, compacted and grown: rows that came since have no index, and that is not the run's business."""
    ds = write(vectors(ROWS, DIM))
    run = tmp_path / "run"
    build(ds, run, resume=True)
    append(ds, vectors(100, DIM))
    la.extend_index(ds, "vector_idx", backend="cpu")
    la.merge_segments(ds, "vector_idx")
    ds.delete("id < 10")
    ds.optimize.compact_files(target_rows_per_fragment=10_000)
    append(ds, vectors(100, DIM), first=ROWS + 100)
    version = lance.dataset(ds.uri).version
    build(ds, run)
    assert ds.version == version


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_run_that_appends_brings_no_dropped_index_back(
    when: str, write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to append to: an index of the new rows alone is not what was asked for."""
    ds = write(vectors(ROWS, DIM))
    la.create_index(ds, "vector", **ASK)
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    append(ds, vectors(100, DIM))
    ds.checkout_latest()
    asked = plan(ds, mode="append", fragment_ids=[3], model=model, num_shards=1)
    run = la.Run.create(asked, tmp_path / "run")
    run.train(model=model, backend="cpu")
    run.encode(0, backend="cpu")
    if when == "before":
        lance.dataset(ds.uri).drop_index("vector_idx")
    else:
        before_commit(monkeypatch, lambda: lance.dataset(ds.uri).drop_index("vector_idx"), _run_commit)
    there = folders(ds)
    with pytest.raises(la.CommitConflictError, match="not there any more"):
        run.finalize(ds)
    now = lance.dataset(ds.uri)
    assert now.describe_indices() == [] and folders(ds) == there


def test_a_committed_run_is_planned_again(write: Callable[..., Any], tmp_path: Path) -> None:
    """The steps by hand, from the first one on: the index that is there is the run's own."""
    ds = write(vectors(ROWS, DIM))

    def steps(folder: str, **options: Any) -> la.Run:
        asked = plan(lance.dataset(ds.uri), artifact_uri=tmp_path / folder, **options)
        run = la.Run.create(asked, tmp_path / folder)
        run.train(backend="cpu")
        for shard in range(len(run.plan.shards)):
            run.encode(shard, backend="cpu")
        run.finalize()
        return run

    steps("run")
    version = lance.dataset(ds.uri).version
    append(lance.dataset(ds.uri), vectors(100, DIM))
    assert steps("run").committed()["version"] == version  # type: ignore[index]
    assert len(segments(lance.dataset(ds.uri))) == 1
    # Of any other run it is not.
    with pytest.raises(la.IndexExistsError):
        steps("other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(la.ArtifactMismatchError, match="num_bits=8, now 4"):
        steps("run", num_bits=4)
    with pytest.raises(la.InvalidInputError, match="inside it or around it"):
        plan(ds, artifact_uri=f"{ds.uri}/run")


@pytest.mark.parametrize("how", ["create_index", "resume_run", "plan"])
def test_another_index_of_the_name_is_found_before_the_work(
    how: str,
    write: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that was begun, and somebody else's index since."""
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    la.create_index(lance.dataset(ds.uri), "vector", **ASK)
    monkeypatch.setattr(_run, "train", lambda *a, **k: pytest.fail("trained"))
    ds.checkout_latest()
    if how == "plan":
        command = ["plan", ds.uri, "vector", "--num-partitions", K, "--num-sub-vectors", M, "--max-iters", 5]
        command += ["--backend", "cpu", "--num-shards", 3, "--run", run.uri]
        assert cli.main([*map(str, command)]) == 9
        assert "already exists" in capsys.readouterr().err
    else:
        with pytest.raises(la.IndexExistsError):
            build(ds, tmp_path / "run", num_shards=3) if how == "create_index" else la.resume_run(run.uri, ds)
    assert run.model() is None
