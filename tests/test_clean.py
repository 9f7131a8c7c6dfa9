"""Removing a run: not under the hands of those who are at work on it, wherever they are."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, encoded, leftovers, vectors
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


DAMAGED: dict[str, Any] = {
    "empty": lambda manifest: b"",
    "cut off": lambda manifest: manifest[: len(manifest) // 2],
    "no text": lambda manifest: b"\xff\x00",
    "no manifest": lambda manifest: b"{}",
    "a list": lambda manifest: b"[]",
}


def with_a_damaged_shard(write: Callable[..., Any], tmp_path: Path, kind: str) -> la.Run:
    run = la.Run.create(plan(write(vectors(ROWS, DIM))), tmp_path / "run")
    run.train(backend="cpu")
    for shard in range(3):
        run.encode(shard, backend="cpu")
    manifest = Path(run.shard_uri(1)) / "manifest.json"
    manifest.write_bytes(DAMAGED[kind](manifest.read_bytes()))
    return run


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_run_with_a_damaged_shard_is_removed(
    kind: str, write: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = with_a_damaged_shard(write, tmp_path, kind)
    before = leftovers(tmp_path)
    # Whose its files are cannot be known, unless all of them are meant.
    with pytest.raises(la.CorruptArtifactError):
        la.clean_run(run.uri)
    listed = la.clean_run(run.uri, everything=True, dry_run=True)
    assert leftovers(tmp_path) == before
    assert [each.kind for each in listed] == ["artifact"] * 3 + ["run"]
    assert listed[0].files == listed[1].files
    caplog.clear()
    assert la.clean_run(run.uri, everything=True) == listed
    assert "00001" in caplog.text and "cannot be read" in caplog.text
    assert not (tmp_path / "run").exists()


def test_an_artifact_with_a_damaged_index_of_its_files_too(write: Callable[..., Any], tmp_path: Path) -> None:
    """Its manifest can be read, and the file that says where rows are not."""
    run = with_a_damaged_shard(write, tmp_path, "empty")
    for shard in (0, 1):
        for file in Path(run.shard_uri(shard)).glob("*.lance"):
            file.write_bytes(b"")
    # Of a format that has no manifest.
    shutil.rmtree(run.shard_uri(2))
    Path(run.shard_uri(2)).mkdir()
    for name in ("metadata.lance", "sorted_0.lance", "sorted_1.lance"):
        Path(run.shard_uri(2), name).write_bytes(b"no file of Lance's")
    la.clean_run(run.uri, everything=True)
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_of_those_at_work_stays(write: Callable[..., Any], tmp_path: Path) -> None:
    run = with_a_damaged_shard(write, tmp_path, "cut off")
    theirs = begun_elsewhere(run.shard_uri(1), tag="-0a1b2c3d")
    for dry_run in (True, False):
        with pytest.raises(
            la.CommitConflictError, match=r"shards \[1\] .*process 4711 on 'node-7'.*elsewhere=True"
        ):
            la.clean_run(run.uri, everything=True, dry_run=dry_run)
    theirs[0].write_bytes(b"of nobody that is known")
    with pytest.raises(la.CommitConflictError, match="without readable marks"):
        la.clean_run(run.uri, everything=True)
    # One that is alive here is not removed, whatever is said of others.
    with la.PartitionArtifactBuilder(tmp_path / "other", run.model()):
        (claim,) = (tmp_path / "other").glob(f"{CLAIM}*")
        theirs[0].write_bytes(claim.read_bytes())
    with pytest.raises(la.CommitConflictError, match=r"at work on shards \[1\]; stop it first"):
        la.clean_run(run.uri, everything=True, elsewhere=True)
    assert run.status().is_trained
    begun_elsewhere(run.shard_uri(1), tag="-0a1b2c3d")
    la.clean_run(run.uri, everything=True, elsewhere=True)
    assert not (tmp_path / "run").exists()


def test_what_is_old_or_over_does_not_keep_a_damaged_shard(write: Callable[..., Any], tmp_path: Path) -> None:
    run = with_a_damaged_shard(write, tmp_path, "cut off")
    begun_elsewhere(run.shard_uri(1), tag="-0a1b2c3d")
    for file in Path(run.shard_uri(1)).rglob("*"):
        os.utime(file, (time.time() - 8 * 86400,) * 2)
    other = Path(run.shard_uri(1)) / "notes.txt"
    other.write_text("somebody's own")
    la.clean_run(run.uri, everything=True)
    # What no build of ours writes is nobody's to remove.
    assert leftovers(tmp_path / "run") == ["shards/00001/notes.txt"]
