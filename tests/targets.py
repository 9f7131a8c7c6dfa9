"""Small artifacts at a place, and what is left of them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import lance_artifact as la
from conftest import column, content, encoded

K, WIDTH = 7, 6
TAG = "0a1b2c3d"
ELSEWHERE = {"host": "another-machine", "pid": 4711, "started": "1"}
EIGHT_DAYS = 8 * 24 * 3600


def builder(path: Any, **options: Any) -> la.PartitionArtifactBuilder:
    defaults: dict[str, Any] = {"num_partitions": K, "pq_code_width": WIDTH}
    return la.PartitionArtifactBuilder(path, **{**defaults, **options})


def table(seed: int, rows: int = 200) -> pa.Table:
    return encoded(rows, K, WIDTH, seed=seed, first=seed * 1_000_000)


def filled(path: Any, seed: int, rows: int = 200, **options: Any) -> la.PartitionArtifactBuilder:
    made = builder(path, **options)
    made.append_batch(table(seed, rows))
    return made


def ids(artifact: la.Artifact) -> set[int]:
    return {i for part in content(artifact) for i in part}


def is_artifact_of(path: Path, seed: int, rows: int = 200) -> bool:
    artifact = la.Artifact.open(path)
    return artifact.verify().ok and ids(artifact) == set(table(seed, rows)["_rowid"].to_pylist())


def named(path: Path) -> list[str]:
    """The files of an artifact, as its manifest names them."""
    manifest = json.loads((path / "manifest.json").read_text())
    return sorted({"manifest.json", *manifest["files"]})


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in root.rglob("*")
    }


def a_model(seed: int = 0, partitions: int = K) -> la.IvfPqModel:
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal((partitions, 12)).astype("float32")
    codebook = rng.standard_normal((WIDTH, 256, 2)).astype("float32")
    return la.IvfPqModel(
        column(centroids), column(codebook.reshape(-1, 2)), metric="l2", num_sub_vectors=WIDTH
    )


def attempt_of_another_machine(path: Path, tag: str | None) -> list[Path]:
    """A claim, closed files and an open one, of a process of which nothing is known here."""
    end = f"-{tag}" if tag else ""
    files = [
        path / f".lance-artifact-claim{end}",
        path / f"metadata{end}.lance",
        path / "partitions" / f"bucket-00003{end}.lance",
        path / "partitions" / f".lance-artifact-{TAG}-aB3xY9",
    ]
    (path / "partitions").mkdir(parents=True, exist_ok=True)
    for file in files:
        file.write_text("theirs")
    files[0].write_text(json.dumps({"attempt": TAG, "owner": ELSEWHERE}))
    return files
