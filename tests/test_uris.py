"""URIs with passwords, signatures and queries: what is shown of them, and that a run with one works."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lance_artifact as la
from conftest import vectors
from lance_artifact import _lance_artifact as core
from lance_artifact import cli
from lance_artifact._artifacts import check_apart
from test_extend import DIM, ROWS, K, M, segments
from test_run import ASK, build, plan

SECRETS = ("pass-word", "signa-ture")


def is_kept(*texts: Any) -> bool:
    """Whether no secret is in any of these texts."""
    return not any(secret in str(text) for secret in SECRETS for text in texts)


@pytest.mark.parametrize(
    ("uri", "joined"),
    [
        ("/a/b", "/a/b/x/y"),
        ("/a/b?c#d/", "/a/b?c#d/x/y"),
        ("s3://b/a/", "s3://b/a/x/y"),
        ("s3://b", "s3://b/x/y"),
        ("s3://b?t=1", "s3://b/x/y?t=1"),
        ("s3://u:p@b/a/?t=1/2#f", "s3://u:p@b/a/x/y?t=1/2#f"),
        ("weird/path://a?b", "weird/path://a?b/x/y"),
    ],
)
def test_what_is_below(uri: str, joined: str) -> None:
    assert core.uri_below(uri, "x/y") == joined


@pytest.mark.parametrize(
    ("uri", "inside"),
    [
        ("s3://user:pass-word@b/t.lance/run", True),
        ("s3://b/t.lance?sig=signa-ture", True),
        ("s3://b?x#t", True),
        ("s3://b/t.lance2", False),
        ("s3://c/t.lance", False),
        ("s3://b@c/t.lance", False),
    ],
)
def test_a_place_is_the_same_whatever_is_said_beside_it(uri: str, inside: bool) -> None:
    for dataset in ("s3://b/t.lance", "s3://user:***@b/t.lance"):
        if not inside:
            assert check_apart(dataset, uri) == uri
            continue
        with pytest.raises(la.InvalidInputError, match="inside it or around it") as told:
            check_apart(dataset, uri)
        assert is_kept(told.value)


def test_a_place_on_a_disk_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    dataset = str(tmp_path / "a b")
    for uri in (f"file://{tmp_path}/a%20b/run", f"file://localhost{tmp_path}/a%20b?x=1", f"{dataset}/run"):
        with pytest.raises(la.InvalidInputError, match="inside it or around it"):
            check_apart(dataset, uri)
    assert check_apart(dataset, f"{dataset}?x=1")


@pytest.mark.parametrize(
    "place", ["memory://user:pass-word@runs{}", "file://{}/run"], ids=["in memory", "on a disk"]
)
def test_a_run_with_credentials_in_its_uri(
    place: str, write: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = write(vectors(ROWS, DIM))
    uri = place.format(tmp_path) + "?sig=signa-ture&ddbTableName=table"
    caplog.set_level(logging.DEBUG)
    run = la.Run.create(plan(ds), uri)
    assert run.uri == uri == pickle.loads(pickle.dumps(run)).uri and pickle.loads(pickle.dumps(run)) == run
    assert "ddbTableName=table" in repr(run) and is_kept(repr(run), run.status(), repr(run.status()))
    for call in (
        lambda: run.encode(0, backend="cpu"),
        lambda: run.finalize(ds),
        lambda: la.Run.create(plan(ds, num_bits=4), uri),
        lambda: la.Run.open(uri.replace("?", "/none?")),
        lambda: run.encode(9),
    ):
        with pytest.raises(la.LanceArtifactError) as told:
            call()
        assert is_kept(told.value)
    run.train(backend="cpu")
    run.encode(0, backend="cpu")
    with la.PartitionArtifactBuilder(run.shard_uri(1), run.model()) as builder:
        with pytest.raises(la.CommitConflictError, match=r"shards \[1\]") as told:
            la.clean_run(uri, everything=True)
        assert is_kept(told.value)
        builder.abort()
    build(ds, uri, num_shards=3)  # type: ignore[arg-type]
    assert len(segments(ds)) == 1 and run.status().shards == (True,) * 3 and is_kept(run.status())
    found = la.clean_run(uri, everything=True)
    assert [each.kind for each in found] == ["artifact"] * 3 + ["run"] and is_kept(found, *found)
    assert is_kept(caplog.text)
    with pytest.raises(la.ArtifactNotFoundError):
        la.Run.open(uri)


def test_credentials_in_a_runs_uri_are_not_printed(
    write: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = write(vectors(ROWS, DIM))
    uri = f"file://{tmp_path}/run?sig=signa-ture"
    ask = ["--num-partitions", K, "--num-sub-vectors", M, "--max-iters", 5, "--backend", "cpu"]
    for command, code in (
        (["plan", ds.uri, "vector", *ask, "--run", uri], 0),
        (["plan", ds.uri, "vector", *ask, "--num-bits", 4, "--run", uri], 6),
        (["run", "finalize", uri], 3),
        (["run", "train", uri, "--backend", "cpu"], 0),
        (["run", "resume", uri, "--backend", "cpu"], 0),
        (["run", "status", uri], 0),
        (["run", "status", f"{uri}&none#x"], 0),
        (["run", "clean", uri, "--all"], 0),
        (["build", f"file://{tmp_path}/none.lance?sig=signa-ture", "vector"], 2),
    ):
        for more in ([], ["--json"]):
            if more and code == 0 and "clean" in command:
                continue
            assert cli.main([*map(str, command), *more]) == code, command
            said = capsys.readouterr()
            assert is_kept(said.out, said.err)


def test_other_uris_with_secrets(write: Callable[..., Any], tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    for call in (
        lambda: la.create_index("nosuch://user:pass-word@host/t.lance?sig=signa-ture", "vector", **ASK),
        lambda: la.create_index(f"file://{tmp_path}/none.lance?sig=signa-ture", "vector", **ASK),
        lambda: la.build_artifact(
            ds, "vector", la.train(ds, "vector", **ASK), f"file://{ds.uri}/a?sig=signa-ture"
        ),
        lambda: la.create_index(
            ds, "vector", ivf_centroids_file="nosuch://user:pass-word@host/a.npy?sig=signa-ture"
        ),
    ):
        with pytest.raises(la.LanceArtifactError) as told:
            call()
        assert is_kept(told.value)
