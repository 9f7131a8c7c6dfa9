"""The commands of an index's whole life."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import LINUX, column, stored, vectors
from lance_artifact import cli, demo
from test_extend import DIM, ROWS, append, segments

TRAINING = ["--num-partitions", "8", "--num-sub-vectors", "4", "--max-iters", "5", "--backend", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, Any, str]:
    code = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_from_the_plan_to_the_merged_index(
    write: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = write(vectors(ROWS, DIM))
    assert cli.main(["plan", ds.uri, "vector", "--num-partitions", "8", "--backend", "cpu"]) == 0
    assert "as LanceDB has it" in capsys.readouterr().out
    place = tmp_path / "run"
    plan = ["plan", ds.uri, "vector", *TRAINING, "--num-shards", "3", "--run", place]
    code, result, _ = run(capsys, *plan)
    assert code == 0 and len(result["plan"]["shards"]) == 3
    code, result, _ = run(capsys, "run", "status", place)
    assert (code, result["is_trained"], result["rows_left"]) == (0, False, ROWS)
    assert run(capsys, "run", "encode", place, "--shard", 0)[0] == 2
    assert run(capsys, "run", "train", place, "--backend", "cpu")[0] == 0
    assert run(capsys, "run", "encode", place, "--shard", 0, "--shard", 2, "--backend", "cpu")[0] == 0
    code, _, error = run(capsys, "run", "finalize", place)
    assert code == 3 and "shards [1] of 3" in error
    code, result, _ = run(capsys, "run", "resume", place, "--backend", "cpu")
    assert (
        code == 0
        and result["shards"] == [True] * 3
        and result["committed"]["segment"] in segments(lance.dataset(ds.uri))
    )
    assert cli.main(["run", "status", str(place)]) == 0
    assert "3 of 3" in capsys.readouterr().out
    # A plan that asks for the same, and a build, find it done.
    code, again, _ = run(capsys, *plan)
    assert (code, again["run"]) == (0, str(place))
    assert cli.main(list(map(str, plan))) == 0
    assert "its index is committed" in capsys.readouterr().out
    assert run(capsys, *plan[:-1], tmp_path / "other")[0] == 9 and not (tmp_path / "other").exists()
    build = ["build", ds.uri, "vector", *TRAINING, "--artifact", place, "--num-shards", "3"]
    assert run(capsys, *build)[0] == 0
    assert run(capsys, *build, "--seed", 3)[0] == 6

    append(ds, vectors(500, DIM, seed=0))
    code, result, _ = run(capsys, "extend", ds.uri, "vector_idx", "--backend", "cpu")
    assert (code, result["num_rows"], result["num_segments"]) == (0, 500, 2) and result["fit"]["ratio"] < 2
    assert cli.main(["extend", ds.uri, "vector_idx"]) == 0
    assert "nothing was done" in capsys.readouterr().out
    code, result, _ = run(capsys, "merge", ds.uri, "vector_idx")
    assert (code, result["num_segments"], result["num_rows"]) == (0, 1, ROWS + 500)
    assert cli.main(["merge", ds.uri, "vector_idx"]) == 0
    assert "nothing to merge" in capsys.readouterr().out
    assert run(capsys, "extend", ds.uri, "none")[0] == 2

    code, result, _ = run(capsys, "run", "clean", place, "--all", "--dry-run")
    assert code == 0 and [each["kind"] for each in result["would be removed"]] == ["artifact"] * 3 + ["run"]
    assert place.exists()
    assert cli.main(["run", "clean", str(place), "--all"]) == 0
    assert "4 removed" in capsys.readouterr().out and not place.exists()
    assert run(capsys, "run", "status", place)[0] == 3
    assert len(segments(lance.dataset(ds.uri))) == 1


def test_options_of_another_step_are_refused(
    write: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = write(vectors(ROWS, DIM))
    assert run(capsys, "plan", ds.uri, "vector", *TRAINING, "--run", tmp_path / "run")[0] == 0
    for arguments in (
        ["status", "--shard", 1],
        ["resume", "--all"],
        ["resume", "--elsewhere"],
        ["encode"],
        ["train", "--dry-run"],
    ):
        assert run(capsys, "run", arguments[0], tmp_path / "run", *arguments[1:])[0] == 2
    assert run(capsys, "build", ds.uri, "vector", *TRAINING, "--resume")[0] == 2


@LINUX
def test_what_killed_tries_left(write: Callable[..., Any], tmp_path: Path) -> None:
    """A process that ends in the middle of a shard, and one in the middle of a segment."""
    ds = write(vectors(ROWS, DIM))
    place = tmp_path / "run"
    run = la.Run.create(
        la.plan(ds, "vector", num_partitions=8, num_sub_vectors=4, num_shards=2, backend="cpu"), place
    )
    run.train(backend="cpu")
    code = (
        "import lance_artifact as la, os, sys\n"
        "run = la.Run.open(sys.argv[1])\n"
        "builder = la.PartitionArtifactBuilder(run.shard_uri(1), run.model())\n"
        "handle = run.dataset()\n"
        "for shard in range(2): run.encode(shard, backend='cpu') if sys.argv[2] == 'segment' else None\n"
        "from lance_artifact import _run_commit\n"
        "_run_commit.commit_segment = lambda *a: os._exit(1)\n"
        "run.finalize() if sys.argv[2] == 'segment' else os._exit(1)\n"
    )
    for what in ("attempt", "segment"):
        assert subprocess.run([sys.executable, "-c", code, str(place), what], check=False).returncode == 1
        listed = la.clean_run(place, dry_run=True)
        assert what in {each.kind for each in listed} and all(str(each) for each in listed)
        assert la.clean_run(place, dry_run=True) == listed
    mine = tmp_path / "run" / "shards" / "00001" / "notes.txt"
    mine.write_text("mine")
    la.clean_run(place)
    assert la.clean_run(place) == [] and mine.exists()
    assert not list((Path(ds.uri) / "_indices").iterdir())
    run.finalize(ds)
    assert len(stored(ds, "vector_idx")) == 8
    # Of a process that is alive nothing is taken.
    with la.PartitionArtifactBuilder(f"{place}/shards/00000", run.model(), overwrite=True) as builder:
        assert la.clean_run(place) == []
        with pytest.raises(la.CommitConflictError, match=r"at work on shards \[0\]"):
            la.clean_run(place, everything=True)
        builder.abort()
    la.clean_run(place, everything=True)
    assert [p.name for p in place.rglob("*") if p.is_file()] == ["notes.txt"]


def test_what_is_not_finite_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no Infinity, and no NaN: other languages' readers refuse the whole line."""
    same = column(np.tile(np.arange(DIM, dtype="float32"), (600, 1)))
    ds = lance.write_dataset(pa.table({"vector": same}), str(tmp_path / "d.lance"))
    build = ["build", ds.uri, "vector", *TRAINING[2:], "--num-partitions", "1"]
    assert run(capsys, *build)[0] == 0
    lance.write_dataset(pa.table({"vector": column(vectors(100, DIM))}), ds.uri, mode="append")
    assert cli.main(["extend", ds.uri, "vector_idx", "--backend", "cpu", "--json"]) == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    fit = json.loads(capsys.readouterr().out, parse_constant=refuse)["fit"]
    assert fit["old_error"] == 0 and fit["new_error"] > 0 and fit["ratio"] is None and fit["rebuild"]


def test_every_number_of_a_result_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a command tells, wherever in it."""
    odd = {
        "a": [float("nan"), (float("-inf"), 1.5)],
        "b": {"c": np.float64("inf"), "d": True, "e": 2, "f": "NaN"},
    }
    monkeypatch.setattr(demo, "run", lambda *_, **__: odd)
    monkeypatch.setattr(demo, "describe", str)
    assert run(capsys, "demo", "--output", tmp_path)[:2] == (
        0, {"a": [None, [None, 1.5]], "b": {"c": None, "d": True, "e": 2, "f": "NaN"}},
    )  # fmt: skip
