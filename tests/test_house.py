"""The import graph: one way, and found out where it is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "house"), "--root", str(root), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src")
    package = tmp_path / "python" / "lance_artifact"
    shutil.copytree(
        ROOT / "python" / "lance_artifact", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_imports_go_one_way() -> None:
    done = check(ROOT, "--check")
    assert done.returncode == 0, done.stderr
    assert "imports go one way" in done.stdout


def test_the_graph_is_shown(house: Path) -> None:
    done = check(house)
    assert done.returncode == 0, done.stderr
    assert "finalize::seam::hnsw -> " in done.stdout and "lance::segment::folder" in done.stdout
    assert "src/artifact/write" in done.stdout


@pytest.mark.parametrize(
    ("file", "breach", "found"),
    [
        ("src/encode/source.rs", "use lance::Dataset as _;", "encode::source names lance"),
        (
            "src/python/storage.rs",
            "fn f() -> lance_core::Result<()> { Ok(()) }",
            "python::storage names lance_core",
        ),
        (
            "src/lance/store.rs",
            "use crate::finalize::Segment as _;",
            "lance::store imports finalize::segment",
        ),
        (
            "src/artifact/read/files.rs",
            "use crate::artifact::PartitionArtifactBuilder as _;",
            "imports artifact::write::builder",
        ),
        ("src/io/uri.rs", "fn f() { crate::sync::locked(&crate::lance::X); }", "io::uri imports lance"),
        ("src/artifact/write/stage.rs", "use super::buckets::Buckets as _;", "a circle: artifact::write::"),
        ("src/io/mod.rs", "pub struct Thing;", "io/mod.rs defines struct Thing"),
        ("src/other.rs", "pub fn f() {}", "other: is in no room"),
        (
            "python/lance_artifact/_dataset.py",
            "def f():\n    from ._commit import commit_segment",
            "a circle: _commit, ",
        ),
    ],
)
def test_a_breach_is_found(house: Path, file: str, breach: str, found: str) -> None:
    path = house / file
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n{breach}\n")
    done = check(house, "--check")
    assert done.returncode == 1
    assert found in done.stderr


def test_tests_comments_and_strings_are_no_imports(house: Path) -> None:
    path = house / "src" / "io" / "uri.rs"
    extra = '// use lance::Dataset;\nconst A: &str = "lance::Dataset";\n#[cfg(test)]\nmod more { use crate::finalize::Segment as _; }\n'
    path.write_text(path.read_text() + extra)
    assert check(house, "--check").returncode == 0
