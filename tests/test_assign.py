"""`assign="fast"`: the nearest groups of centroids only, how often that misses, and who says so."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lance_artifact as la
from conftest import content
from lance_artifact._assign import _likelihood, tell_assigned
from lance_artifact._log import EXTRA
from lance_artifact._uncommitted import create_index_uncommitted

ROWS, DIM, K, M = 60_000, 16, 2400, 4


def clustered(rows: int, seed: int) -> np.ndarray:
    """Around 80 middles, as embeddings lie around topics."""
    random = np.random.default_rng(7)
    middles = random.uniform(-1, 1, (80, DIM))
    random = np.random.default_rng(seed)
    return (middles[random.integers(0, 80, rows)] + random.uniform(-0.3, 0.3, (rows, DIM))).astype("f4")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import lance
    import pyarrow as pa

    values = pa.FixedSizeListArray.from_arrays(pa.array(clustered(ROWS, 1).reshape(-1)), DIM)
    where = tmp_path_factory.mktemp("assign") / "t.lance"
    return lance.write_dataset(pa.table({"vector": values}), where, max_rows_per_file=ROWS // 3)


@pytest.fixture(scope="module")
def model(table: Any) -> la.IvfPqModel:
    return la.train(
        table, "vector", num_partitions=K, num_sub_vectors=M, num_bits=4, sample_rate=24, backend="cpu"
    )


def rows_of(artifact: la.Artifact) -> dict[int, tuple[int, bytes]]:
    return {row: (part, code) for part, rows in enumerate(content(artifact)) for row, code in rows.items()}


def test_few_rows_are_elsewhere_and_the_artifact_says_how_many(
    table: Any, model: la.IvfPqModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact = la.build_artifact(table, "vector", model, tmp_path / "exact", backend="cpu")
    assert exact.manifest["assignment"] == {"method": "exact"}
    assert not [r for r in caplog.records if getattr(r, EXTRA, {}).get("event") == "assigned"]
    with caplog.at_level(logging.INFO, "lance_artifact"):
        fast = la.build_artifact(table, "vector", model, tmp_path / "fast", backend="cpu", assign="fast")
    said = fast.manifest["assignment"]
    assert said["method"] == "groups" and 0 < said["looked_at"] < said["groups"] / 2
    assert said["sampled"] == 5000 and said["sampled_missed"] <= 1
    # One of 256 of each block that is encoded at once.
    assert ROWS / 256 <= said["checked"] <= ROWS / 128
    nearest, found = rows_of(exact), rows_of(fast)
    assert nearest.keys() == found.keys()
    missed = [row for row in nearest if nearest[row][0] != found[row][0]]
    assert len(missed) <= ROWS / 1000
    assert said["missed"] <= len(missed)
    assert all(nearest[row] == found[row] for row in nearest.keys() - set(missed))
    records = [r for r in caplog.records if getattr(r, EXTRA, {}).get("event") == "assigned"]
    assert len(records) == 1 and f"{said['looked_at']} of {said['groups']} groups" in records[0].message
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_it_is_the_same_for_any_memory_limit(table: Any, model: la.IvfPqModel, tmp_path: Path) -> None:
    made = [
        la.build_artifact(
            table, "vector", model, tmp_path / str(n), backend="cpu", assign="fast", memory_limit=limit
        )
        for n, limit in enumerate([None, 64 << 20])
    ]
    assert rows_of(made[0]) == rows_of(made[1])


def test_every_door_leads_there(table: Any, model: la.IvfPqModel, tmp_path: Path, write: Any) -> None:
    given = {
        "ivf_centroids": model.ivf_centroids,
        "pq_codebook": model.pq_codebook,
        "num_sub_vectors": M,
        "backend": "cpu",
        "assign": "fast",
    }
    ds = write(clustered(ROWS, 2))
    la.create_index(ds, "vector", **given, artifact_uri=tmp_path / "one")
    assert la.Artifact.open(tmp_path / "one").manifest["assignment"]["method"] == "groups"
    # A run says it in its plan.
    la.create_index(ds, "vector", **given, artifact_uri=tmp_path / "run", resume=True, replace=True)
    run = la.Run.open(tmp_path / "run")
    assert run.plan.assign == "fast"
    assert la.BuildPlan.from_json(run.plan.to_json()).assign == "fast"
    shard = la.Artifact.open(run.shard_uri(0))
    assert shard.manifest["assignment"]["method"] == "groups"
    with pytest.raises(la.LanceArtifactError, match="assign='fast', now 'exact'"):
        la.create_index(
            ds, "vector", **{**given, "assign": "exact"}, artifact_uri=tmp_path / "run", replace=True
        )
    assert "assign='fast'" in str(
        la.plan(ds, "vector", model=model, backend="cpu", assign="fast", replace=True)
    )
    # New rows of an index.
    import lance
    import pyarrow as pa

    values = pa.FixedSizeListArray.from_arrays(pa.array(clustered(ROWS, 3).reshape(-1)), DIM)
    ds = lance.write_dataset(pa.table({"vector": values}), ds.uri, mode="append")
    la.extend_index(ds, "vector_idx", backend="cpu", assign="fast", artifact_uri=tmp_path / "more")
    assert la.Artifact.open(tmp_path / "more").manifest["assignment"]["method"] == "groups"
    fragments = [f.fragment_id for f in ds.get_fragments()]
    index = create_index_uncommitted(ds, "vector", **given, fragment_ids=fragments)
    assert index.fragment_ids == set(fragments)


def test_the_command_line_says_it_too(table: Any, tmp_path: Path) -> None:
    shape = ["--num-partitions", K, "--num-sub-vectors", M, "--num-bits", 4, "--sample-rate", 24]
    where = ["--artifact-only", "--artifact", tmp_path / "a", "--backend", "cpu", "--assign", "fast"]
    call = ["build", "--json", table.uri, "vector", *where, *shape]
    done = subprocess.run(
        [sys.executable, "-m", "lance_artifact.cli", *map(str, call)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["assignment"]
    assert said["method"] == "groups" and said["checked"] > 0


def test_an_exact_call_takes_no_fast_artifact(table: Any, tmp_path: Path) -> None:
    import lance

    def at_first() -> Any:
        return lance.dataset(table.uri, version=1)

    asked = {
        "num_partitions": K,
        "num_sub_vectors": M,
        "num_bits": 4,
        "sample_rate": 24,
        "backend": "cpu",
        "artifact_uri": tmp_path / "a",
        "replace": True,
    }
    la.create_index(at_first(), "vector", **asked, assign="fast")
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    with pytest.raises(la.ArtifactExistsError, match="assign='groups', now 'exact'"):
        la.create_index(at_first(), "vector", **asked)
    la.create_index(at_first(), "vector", **asked, assign="fast")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before


def test_an_exact_run_takes_no_fast_shard(table: Any, model: la.IvfPqModel, tmp_path: Path) -> None:
    import lance

    at_first = lance.dataset(table.uri, version=1)
    planned = la.plan(
        at_first, "vector", model=model, name="run", backend="cpu", num_shards=1, calibrate=False
    )
    run = la.Run.create(planned, tmp_path / "run")
    run.train(at_first, model=model)
    la.build_artifact(at_first, "vector", model, run.shard_uri(0), backend="cpu", assign="fast")
    with pytest.raises(la.ArtifactMismatchError, match="assign='groups', now 'exact'"):
        run.encode(0, at_first, backend="cpu")


def test_of_few_partitions_all_are_compared(
    table: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = la.train(
        table, "vector", num_partitions=64, num_sub_vectors=M, num_bits=4, sample_rate=24, backend="cpu"
    )
    with caplog.at_level(logging.INFO, "lance_artifact"):
        made = la.build_artifact(table, "vector", model, tmp_path / "a", backend="cpu", assign="fast")
    assert made.manifest["assignment"] == {"method": "exact"}
    assert "every row was compared with all 64 centroids" in caplog.text


class Other:
    """A backend of somebody else."""

    name = "other"

    def availability(self) -> la.Availability:
        return la.Availability(True)

    def train(self, sample: Any, params: Any, progress: Any = None) -> Any:
        raise AssertionError("was called")

    def encoder(self, model: Any) -> Any:
        raise AssertionError("was called")


def test_other_backends_refuse_it_before_anything_is_done(
    table: Any, model: la.IvfPqModel, tmp_path: Path
) -> None:
    calls = [
        lambda **a: la.build_artifact(table, "vector", model, tmp_path / "a", **a),
        lambda **a: la.create_index(table, "vector", num_partitions=4, **a),
        lambda **a: create_index_uncommitted(table, "vector", num_partitions=4, fragment_ids=[0], **a),
        lambda **a: la.plan(table, "vector", num_partitions=4, **a),
    ]
    for call in calls:
        with pytest.raises(la.InvalidInputError, match="assign: got 'fast', which is of backend 'cpu'"):
            call(backend=Other(), assign="fast")
        with pytest.raises(la.InvalidInputError, match="assign: got 'quick'"):
            call(assign="quick")
    assert not (tmp_path / "a").exists()


def test_more_misses_than_promised_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    # Whatever a command line that ran before in this process has turned on.
    caplog.set_level("WARNING", logger="lance_artifact")

    def told(missed: int, checked: int) -> str:
        caplog.clear()
        found = {"method": "groups", "groups": 100, "looked_at": 9, "missed": missed, "checked": checked}
        tell_assigned(SimpleNamespace(manifest={"assignment": found}, uri="a", num_partitions=5000), "fast")  # type: ignore[arg-type]
        return caplog.text

    assert "assign='exact' misses none" in told(30, 10_000)
    assert told(12, 10_000) == ""
    assert "more than 0.1 %" in told(1200, 1_000_000)
    assert told(1050, 1_000_000) == ""
    assert _likelihood(0, 5.0) == 1.0
    assert _likelihood(1, 5.0) == pytest.approx(1 - np.exp(-5.0))
    # Where it becomes a normal distribution.
    assert _likelihood(530, 499.999) == pytest.approx(_likelihood(530, 500.001), abs=0.01)
