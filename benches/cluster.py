"""What the driver for Ray costs beside a plain call on the same machine, and what a second worker brings.

    benches/cluster.py [--rows 1000000] [--dim 128] [--partitions 1024] [--sub-vectors 16] [--runs 3]

On one machine the workers share its cores: what is measured is the overhead. Cluster and processes are started within the times.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lance
import ray

import lance_artifact as la
import lance_artifact.ray
from _common import dispatch, in_process, report, row, settle
from life import write


def plain(path: str, run: str, **options: Any) -> dict[str, Any]:
    began = time.perf_counter()
    la.create_index(path, "vector", backend="cpu", replace=True, **options)
    return {"seconds": time.perf_counter() - began}


def alone(path: str, run: str, **options: Any) -> dict[str, Any]:
    """A run in this process."""
    began = time.perf_counter()
    la.create_index(
        path, "vector", backend="cpu", artifact_uri=run, resume=True, num_shards=4, replace=True, **options
    )
    return {"seconds": time.perf_counter() - began}


def workers(path: str, run: str, num_workers: int, **options: Any) -> dict[str, Any]:
    began = time.perf_counter()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    started = time.perf_counter()
    lance_artifact.ray.create_index(
        path, "vector", artifact_uri=run, num_workers=num_workers, num_shards=4, **options
    )
    return {"seconds": time.perf_counter() - began, "start": started - began}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--partitions", type=int, default=1024)
    parser.add_argument("--sub-vectors", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(arguments)
    options = {"num_partitions": args.partitions, "num_sub_vectors": args.sub_vectors, "sample_rate": 64}
    seconds: dict[str, list[float]] = {"plain": [], "alone": [], "one": [], "two": []}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        path = str(Path(folder, "rows"))
        write(path, args.rows, args.dim, args.rows // 8)
        assert len(lance.dataset(path).get_fragments()) > 1
        for turn in range(args.runs):
            for who in seconds:
                settle()
                more = {"one": {"num_workers": 1}, "two": {"num_workers": 2}}.get(who, {})
                job = who if who in ("plain", "alone") else "workers"
                found = in_process(
                    __file__, job, path=path, run=f"{folder}/run-{who}-{turn}", **options, **more
                )
                seconds[who].append(found["seconds"])
                print(who, {key: round(value, 2) for key, value in found.items()}, flush=True)
    plain_, alone_, one, two = (median(times) for times in seconds.values())
    rows = [
        row("a run in one process, the plain call", alone_, plain_, alone_ / plain_, "s"),
        row("Ray with one worker, the plain call", one, plain_, one / plain_, "s"),
        row("Ray with two workers, with one", two, one, two / one, "s"),
    ]
    report(rows, Path("bench-cluster.json"))


if __name__ == "__main__":
    dispatch({"plain": plain, "alone": alone, "workers": workers}, main)
