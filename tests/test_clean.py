"""Removing a run: not under the hands of those who are at work on it, wherever they are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, encoded, vectors
from lance_artifact import _clean, cli
from local_s3 import BUCKET, s3_server
from test_extend import DIM, ROWS, segments
from test_run import build, plan

CLAIM = ".lance-artifact-claim"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as options:
        yield options


def begun_elsewhere(place: str, host: str = "node-7", tag: str = "") -> list[Path]:
    """What an attempt of another machine has in the folder of a shard: its claim, and a file that it writes."""
    folder = Path(place)
    (folder / "partitions").mkdir(parents=True, exist_ok=True)
    owner = {
        "host": f"{host} 2f1a6a4e pid:[4026531836]",
        "pid": 4711,
        "started": "1",
        "at": int(time.time()) - 7200,
    }
    claim, half = folder / f"{CLAIM}{tag}", folder / "partitions" / f"bucket-00000{tag}.lance"
    claim.write_text(json.dumps({"attempt": tag[1:] or "0a1b2c3d", "owner": owner}))
    half.write_bytes(b"half")
    return [claim, half]


def test_a_build_elsewhere_is_not_removed_with_the_run(
    write: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    run.train(backend="cpu")
    run.encode(0, backend="cpu")
    theirs = begun_elsewhere(run.shard_uri(2))
    for dry_run in (True, False):
        with pytest.raises(la.CommitConflictError) as told:
            la.clean_run(run.uri, everything=True, dry_run=dry_run)
        # Which, whose, since when, and what to do.
        for said in (
            run.uri,
            "shards [2]",
            "process 4711 on 'node-7'",
            "since 20",
            "elsewhere=True",
            "--elsewhere",
        ):
            assert said in str(told.value), said
    assert cli.main(["run", "clean", run.uri, "--all"]) == 8
    assert "process 4711 on 'node-7'" in capsys.readouterr().err
    # Nothing is gone, and what is not said to be everything stays too.
    assert la.clean_run(run.uri) == []
    assert all(p.exists() for p in theirs) and run.status().shards == (True, False, False)
    listed = la.clean_run(run.uri, elsewhere=True, dry_run=True)
    assert [(each.kind, each.files) for each in listed] == [("attempt", 2)]
    # Who has stopped them says so.
    assert cli.main(["run", "clean", run.uri, "--all", "--elsewhere"]) == 0
    assert not (tmp_path / "run").exists()


def test_a_run_that_others_may_be_at_work_on_is_kept_after_the_commit(
    write: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    run.train(backend="cpu")
    run.encode(0, backend="cpu")
    for tag in ("-1a1b2c3d", "-2a1b2c3d"):
        begun_elsewhere(run.shard_uri(0), f"host{tag}", tag)
    build(ds, tmp_path / "run", num_shards=3, keep_artifact=False)
    assert len(segments(ds)) == 1
    for said in ("the index is committed", "host-1a1b2c3d", "host-2a1b2c3d", "elsewhere=True"):
        assert said in caplog.text
    assert run.status().shards == (True,) * 3


def test_claims_that_say_nothing_are_named_too(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    said = (b"", b"[]", b'{"owner": {"host": 3, "pid": "x", "at": 1}}', b'{"owner": "' + b"x" * 5000, b"\xff")
    for tag, content in enumerate(said):
        claim, _ = begun_elsewhere(run.shard_uri(0), tag=f"-0a1b2c3{tag}")
        claim.write_bytes(content)
    with pytest.raises(la.CommitConflictError) as told:
        la.clean_run(run.uri, everything=True)
    assert str(told.value).count("without readable marks") == len(said)


def test_the_living_are_named_first(write: Callable[..., Any], tmp_path: Path) -> None:
    """Who is alive here is to be stopped, whatever is said of others."""
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    run.train(backend="cpu")
    begun_elsewhere(run.shard_uri(0))
    with la.PartitionArtifactBuilder(run.shard_uri(1), run.model()) as builder:
        for elsewhere in (False, True):
            with pytest.raises(la.CommitConflictError, match=r"at work on shards \[1\]; stop it first"):
                la.clean_run(run.uri, everything=True, elsewhere=elsewhere)
        builder.abort()
    la.clean_run(run.uri, everything=True, elsewhere=True)
    assert not (tmp_path / "run").exists()


def test_who_begins_while_a_run_is_removed_keeps_it(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = write(vectors(ROWS, DIM))
    run = la.Run.create(plan(ds), tmp_path / "run")
    model = run.train(backend="cpu")
    run.encode(0, backend="cpu")
    begun: list[la.PartitionArtifactBuilder] = []
    delete = _clean.core.delete_artifact

    def deleted(place: str, *rest: Any) -> None:
        delete(place, *rest)
        begun.append(la.PartitionArtifactBuilder(run.shard_uri(2), model))

    monkeypatch.setattr(_clean.core, "delete_artifact", deleted)
    with pytest.raises(la.CommitConflictError, match=r"at work on shards \[2\]"):
        la.clean_run(run.uri, everything=True)
    begun[0].abort()
    assert run.status().is_trained
    build(ds, tmp_path / "run", num_shards=3)
    assert len(segments(ds)) == 1


def test_uploads_of_who_begins_meanwhile_are_not_ended(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = lance.write_dataset(
        pa.table({"vector": column(vectors(ROWS, DIM))}), str(tmp_path / "t"), max_rows_per_file=1000
    )
    run = la.Run.create(plan(ds), f"s3://{BUCKET}/meanwhile/run", storage_options=s3)
    run.train(backend="cpu")
    begun: list[la.PartitionArtifactBuilder] = []
    look = _clean.core.unfinished_files

    def looked(place: str, *rest: Any) -> Any:
        found = look(place, *rest)
        if not begun:
            begun.append(
                la.PartitionArtifactBuilder(
                    place,
                    num_partitions=4,
                    pq_code_width=64,
                    memory_limit=64 << 20,
                    num_buckets=2,
                    storage_options=s3,
                )
            )
            for n in range(8):
                begun[0].append_batch(encoded(100_000, 4, 64, first=n * 100_000))
        return found

    monkeypatch.setattr(_clean.core, "unfinished_files", looked)
    found = la.clean_run(run.uri, ds, storage_options=s3)
    assert [each for each in found if each.kind == "upload"] == []
    assert begun[0].finish().num_rows == 800_000
