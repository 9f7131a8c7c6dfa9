"""The fuzz targets find what is planted for them, and nothing by the inputs that are kept, nor by some new ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "fuzz" / "corpus"

without_compiler = not (shutil.which("c++") or shutil.which("g++"))
pytestmark = [
    pytest.mark.skipif(without_compiler, reason="libFuzzer needs a C++ compiler"),
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("fuzz"),
]


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "fuzz"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_planted_bugs_are_found() -> None:
    done = fuzz("--planted")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[::2] == ["panic", "caught", "memory", "hang", "outside"]


def test_every_target_has_inputs_and_all_are_small() -> None:
    done = fuzz("--list")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(folder.name for folder in CORPUS.iterdir())
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sizes and sum(sizes) < 1 << 20


@pytest.mark.parametrize("target", sorted(folder.name for folder in CORPUS.iterdir()))
def test_a_short_run_finds_nothing(target: str) -> None:
    """The inputs that reach most of the readers, those that once found something, and a thousand made of them from a fixed seed."""
    done = fuzz(target, "--check")
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]


def test_an_input_that_finds_something_is_an_error(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.write_text("panic")
    good.write_text("nothing")
    assert fuzz("planted", "--input", str(good)).returncode == 0
    done = fuzz("planted", "--input", str(good), str(bad))
    assert done.returncode == 1 and "planted" in done.stdout
