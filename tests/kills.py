"""A build by a run that is killed again and again, at random instants, until it is done.

``python tests/kills.py --kills 100 [--s3]`` is the long form of `test_kills.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import lance
import numpy as np
import pyarrow as pa

import lance_artifact as la
from conftest import column, command_line, stored, vectors
from local_s3 import BUCKET, client, s3_server

DIM, K, M, SHARDS, ROWS = 64, 512, 8, 8, 600_000
TRAINING: dict[str, Any] = {
    "num_partitions": K,
    "num_sub_vectors": M,
    "max_iters": 8,
    "sample_rate": 64,
    "backend": "cpu",
}


def dataset(path: str) -> Any:
    array = vectors(ROWS, DIM)
    array[::1000] = np.nan
    table = pa.table({"id": pa.array(range(ROWS)), "vector": column(array)})
    return lance.write_dataset(table, path, max_rows_per_file=ROWS // SHARDS)


def command(ds: Any, run: str, options: dict[str, str]) -> list[str]:
    given = command_line(**TRAINING, artifact=run, num_shards=SHARDS)
    stores = [f"--storage-option={key}={value}" for key, value in options.items()]
    return [
        sys.executable,
        "-m",
        "lance_artifact.cli",
        "build",
        ds.uri,
        "vector",
        "--resume",
        "--no-progress",
        *given,
        *stores,
    ]


def published(run: str, options: dict[str, str]) -> dict[int, bytes]:
    """The manifests of the shards that are published."""
    from lance_artifact import _lance_artifact as core

    found = {
        n: core.read_file(f"{run}/shards/{n:05}", "manifest.json", options or None) for n in range(SHARDS)
    }
    return {n: content for n, content in found.items() if content is not None}


def undisturbed(folder: str) -> tuple[list[dict[int, bytes]], float]:
    """What the index holds that nobody disturbed, and the seconds that it took."""
    ds = dataset(f"{folder}/plain")
    started = time.monotonic()
    subprocess.run(command(ds, f"{folder}/plain-run", {}), check=True, stdout=subprocess.DEVNULL)
    return stored(lance.dataset(ds.uri), "vector_idx"), time.monotonic() - started


def until_done(
    ds: Any,
    run: str,
    options: dict[str, str],
    kills: int,
    seconds: float,
    seed: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Kill as often as was asked, or until it ends by itself, then let it end. What was seen."""
    rng = random.Random(seed)
    before: dict[int, bytes] = {}
    stages = {"training": 0, "encoding": 0, "finalizing": 0, "starting": 0}
    done = 0
    for kill in range(kills):
        started = time.monotonic()
        child = subprocess.Popen(command(ds, run, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Most of the first part of it are imports.
        instant = rng.uniform(0.2, 0.8) * seconds
        try:
            child.wait(timeout=instant)
        except subprocess.TimeoutExpired:
            child.kill()
            done += 1
        _, error = child.communicate()
        assert child.returncode in (0, -9), error.decode()
        now = published(run, options)
        # What is published stays as it is: at most the shard at work is lost.
        assert all(now.get(shard) == manifest for shard, manifest in before.items()), (
            "a published shard was written again"
        )
        try:
            status = la.Run.open(run, storage_options=options or None).status()
            stage = "training" if not status.is_trained else "encoding" if status.rows_left else "finalizing"
        except la.ArtifactNotFoundError:
            stage = "starting"
        stages[stage] += child.returncode == -9
        say(f"kill {kill}: after {time.monotonic() - started:.1f} s, {stage}, {len(now)} shards published")
        before = now
        if child.returncode == 0:
            break
    subprocess.run(command(ds, run, options), check=True, stdout=subprocess.DEVNULL)
    now = published(run, options)
    assert all(now[shard] == manifest for shard, manifest in before.items())
    assert len(now) == SHARDS
    return {"kills": done, "stages": stages}


def check(ds: Any, run: str, expected: list[dict[int, bytes]], options: dict[str, str]) -> None:
    """The index is that of an undisturbed run, every row is in one published shard, and nothing is left over."""
    ds = lance.dataset(ds.uri, storage_options=options or None)
    segments = [s for i in ds.describe_indices() if i.name == "vector_idx" for s in i.segments]
    assert len(segments) == 1
    assert stored(ds, "vector_idx") == expected
    artifacts = [la.Artifact.open(f"{run}/shards/{n:05}", options or None) for n in range(SHARDS)]
    assert sum(a.num_rows for a in artifacts) == sum(map(len, expected))
    fragments = [f for a in artifacts for f in a.manifest["source"]["fragment_ids"]]
    assert sorted(fragments) == list(range(SHARDS))
    left = la.clean_run(run, ds, dry_run=True, storage_options=options or None)
    la.clean_run(run, ds, storage_options=options or None)
    assert la.clean_run(run, ds, dry_run=True, storage_options=options or None) == [], left
    if options:
        open_ = client(options).list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        assert [
            upload["Key"] for upload in open_ if f"/{upload['Key']}".startswith(f"/{urlsplit(run).path[1:]}/")
        ] == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    args = parser.parse_args()
    total: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, s3_server() if args.s3 else nullcontext({}) as options:
        expected, seconds = undisturbed(folder)
        killed = round_ = 0
        while killed < args.kills:
            ds = dataset(f"{folder}/ds{round_}")
            run = f"s3://{BUCKET}/run{round_}" if args.s3 else f"{folder}/run{round_}"
            seen = until_done(ds, run, options, args.kills - killed, seconds, args.seed + round_)
            check(ds, run, expected, options)
            killed, round_ = killed + seen["kills"], round_ + 1
            for stage, count in seen["stages"].items():
                total[stage] = total.get(stage, 0) + count
    print(
        json.dumps({"kills": killed, "runs": round_, "stages": total, "store": "s3" if args.s3 else "local"})
    )


if __name__ == "__main__":
    main()
