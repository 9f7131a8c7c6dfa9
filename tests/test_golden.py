"""Artifacts and indexes of every version of the format that was ever written, as they were then: see ``golden/make.py``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_artifact as la
from conftest import content, stored
from golden import make

GOLDEN = Path(make.__file__).resolve().parent
VERSIONS = [1, 2]


def expected(version: int) -> dict[str, Any]:
    wanted: dict[str, Any] = json.loads((GOLDEN / f"expected-v{version}.json").read_text())
    return wanted


@pytest.mark.parametrize("version", VERSIONS)
def test_an_artifact_is_read_and_finalized(version: int, tmp_path: Path) -> None:
    artifact = la.Artifact.open(str(GOLDEN / f"artifact-v{version}"))
    assert artifact.manifest["version"] == version
    report = artifact.verify()
    assert (report.ok, report.num_rows, report.checksums_checked) == (True, make.ROWS, True)
    assert make.as_text(content(artifact)) == expected(version)["partitions"]
    shutil.copytree(GOLDEN / "vectors.lance", tmp_path / "vectors.lance")
    ds = lance.dataset(str(tmp_path / "vectors.lance"))
    la.finalize(ds, "vector", artifact)
    assert make.as_text(stored(ds, "vector_idx")) == expected(version)["stored"]
    assert make.found(ds) == expected(version)["found"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_committed_index_is_searched_and_lives_on(version: int, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / f"indexed-v{version}.lance", tmp_path / "t.lance")
    ds = lance.dataset(str(tmp_path / "t.lance"))
    assert make.as_text(stored(ds, "vector_idx")) == expected(version)["stored"]
    assert make.found(ds) == expected(version)["found"]
    ds.insert(make.table())
    ds.optimize.optimize_indices()
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    la.create_index(
        ds, "vector", num_partitions=4, num_sub_vectors=2, sample_rate=16, replace=True, backend="cpu"
    )
    assert sum(map(len, stored(ds, "vector_idx"))) == 2 * make.ROWS


def test_both_versions_hold_the_same() -> None:
    assert expected(1) == expected(2)
