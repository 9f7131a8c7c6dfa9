"""A build by a run that is killed again and again, at random instants, until it is done.

``python tests/kills.py --kills 100 [--s3]`` is the long form of `test_kills.py`.

What is left is compared with what a build leaves that nobody disturbed, by names, and not by what `clean_run` says of itself: the run's folder, the
dataset's index segments, and the folder for temporary files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
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


# The files of an index segment that is whole. While it is not, or before its commit, there are marks of its builder beside them.
SEGMENT = {"index.idx", "auxiliary.idx"}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass
class Expected:
    """What a build leaves that nobody disturbed."""

    #: Row ids and codes of each partition.
    rows: list[dict[int, bytes]]
    #: Names of files, without what is drawn at random in them: of the run, and of the temporary folder.
    run: Counter[str]
    temporary: Counter[str]


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


def temporary(ds: Any) -> Path:
    """A folder for temporary files, for the builds of this dataset alone."""
    folder = Path(f"{ds.uri}-temporary")
    folder.mkdir(exist_ok=True)
    return folder


def surroundings(ds: Any) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(temporary(ds))}


def listed(place: str, options: dict[str, str]) -> list[str]:
    """Every file below a folder or a prefix, by its path there; of a folder that is empty its own."""
    if not options:
        root = Path(place)
        there = (p for p in root.rglob("*") if not p.is_dir() or not any(p.iterdir()))
        return sorted(str(p.relative_to(root)) for p in there)
    prefix = urlsplit(place).path.strip("/") + "/"
    pages = client(options).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return sorted(o["Key"].removeprefix(prefix) for page in pages for o in page.get("Contents", ()))


def plain(names: list[str]) -> Counter[str]:
    """Names without the tags of attempts, and with one UUID for all."""
    return Counter(re.sub(r"-[0-9a-f]{8}(?=\.lance$)", "", UUID.sub("UUID", name)) for name in names)


def undisturbed(folder: str) -> tuple[Expected, float]:
    """What a build leaves that nobody disturbed, and the seconds that it took."""
    ds, run = dataset(f"{folder}/plain"), f"{folder}/plain-run"
    started = time.monotonic()
    subprocess.run(command(ds, run, {}), check=True, stdout=subprocess.DEVNULL, env=surroundings(ds))
    seconds = time.monotonic() - started
    ds = lance.dataset(ds.uri)
    files = Expected(stored(ds, "vector_idx"), plain(listed(run, {})), plain(listed(str(temporary(ds)), {})))
    assert segments_left(ds) == []
    return files, seconds


def segments_left(ds: Any) -> list[str]:
    """Names of what is in the dataset's folder of segments beside those of its index."""
    named = {str(s.uuid) for i in ds.describe_indices() for s in i.segments}
    there = listed(f"{ds.uri}/_indices", {})
    assert Counter(name for name in there if name.split("/")[0] in named) == Counter(
        f"{uuid}/{file}" for uuid in named for file in SEGMENT
    )
    return [name for name in there if name.split("/")[0] not in named]


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
        child = subprocess.Popen(
            command(ds, run, options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=surroundings(ds),
        )
        # Most of the first part of it are imports.
        instant = rng.uniform(0.2, 0.8) * seconds
        try:
            child.wait(timeout=instant)
        except subprocess.TimeoutExpired:
            child.kill()
        _, error = child.communicate()
        assert child.returncode in (0, -9), error.decode()
        # It may have been done in the same moment.
        done += child.returncode == -9
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
    subprocess.run(command(ds, run, options), check=True, stdout=subprocess.DEVNULL, env=surroundings(ds))
    now = published(run, options)
    assert all(now[shard] == manifest for shard, manifest in before.items())
    assert len(now) == SHARDS
    return {"kills": done, "stages": stages}


def check(ds: Any, run: str, expected: Expected, options: dict[str, str]) -> Counter[str]:
    """The index is that of an undisturbed run, every row is in one published shard, and nothing is left over but what the documentation says.

    Returns
    -------
    Counter
        What was left that may be, by kind.
    """
    ds = lance.dataset(ds.uri, storage_options=options or None)
    segments = [s for i in ds.describe_indices() if i.name == "vector_idx" for s in i.segments]
    assert len(segments) == 1
    assert stored(ds, "vector_idx") == expected.rows
    artifacts = [la.Artifact.open(f"{run}/shards/{n:05}", options or None) for n in range(SHARDS)]
    assert sum(a.num_rows for a in artifacts) == sum(map(len, expected.rows))
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
    return left_over(ds, run, expected, options)


def left_over(ds: Any, run: str, expected: Expected, options: dict[str, str]) -> Counter[str]:
    """What is there after `clean_run` and not after an undisturbed build. What may be is counted; anything else fails."""
    found: Counter[str] = Counter()
    there = listed(run, options)
    # A file of the run's own is written under such a name and then linked: who is killed in between leaves it, and nobody is known to own it.
    own = [name for name in there if re.fullmatch(r"\.lance-artifact-[0-9a-f]{8}-\w{6}", name)]
    found["temporary files of a run"] = len(own)
    now = plain([name for name in there if name not in own])
    assert now == expected.run, (now - expected.run, expected.run - now)
    now = plain(listed(str(temporary(ds)), {}))
    assert now == expected.temporary, (now - expected.temporary, expected.temporary - now)
    # The marks of a segment go right before its commit, so that who is killed in that moment leaves it without: Lance's cleanup takes it.
    left = segments_left(ds)
    whole = {name.split("/")[0] for name in left}
    assert sorted(left) == sorted(f"{uuid}/{file}" for uuid in whole for file in SEGMENT), left
    found["segments killed at their commit"] = len(whole)
    ds.cleanup_old_versions(datetime.timedelta(milliseconds=1), delete_unverified=True)
    assert segments_left(lance.dataset(ds.uri)) == []
    return +found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    args = parser.parse_args()
    total: dict[str, int] = {}
    left: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, s3_server() if args.s3 else nullcontext({}) as options:
        expected, seconds = undisturbed(folder)
        killed = round_ = 0
        while killed < args.kills:
            ds = dataset(f"{folder}/ds{round_}")
            run = f"s3://{BUCKET}/run{round_}" if args.s3 else f"{folder}/run{round_}"
            seen = until_done(ds, run, options, args.kills - killed, seconds, args.seed + round_)
            left += check(ds, run, expected, options)
            killed, round_ = killed + seen["kills"], round_ + 1
            for stage, count in seen["stages"].items():
                total[stage] = total.get(stage, 0) + count
    store = "s3" if args.s3 else "local"
    print(json.dumps({"kills": killed, "runs": round_, "stages": total, "store": store, "left": dict(left)}))


if __name__ == "__main__":
    main()
