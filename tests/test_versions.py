"""Which pylance is taken without a word, with a warning, or not at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import lance
import pytest

import lance_artifact as la
from lance_artifact import _tested, _versions

ROOT = Path(__file__).parent.parent


def test_the_one_that_is_here_is_tested() -> None:
    assert lance.__version__ in _tested.PYLANCE


@pytest.mark.parametrize("version", _tested.PYLANCE)
def test_a_tested_release_is_taken_without_a_word(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _versions.check_pylance(version)


@pytest.mark.parametrize(
    "version",
    [
        "14.0.3",
        "14.1",
        "14.2.0",
        "14.1.0b3",
        "14.99.99",
        "14.0.2.post1",
        "14.0.3-dev",
        "10.0.1",
        "13.9.9",
        "14.0.1",
    ],
)
def test_an_untested_release_of_the_series_is_warned_of(version: str) -> None:
    with pytest.warns(la.UntestedVersionWarning, match="not tested") as caught:
        _versions.check_pylance(version)
    text = str(caught[0].message)
    assert version in text and f"pylance=={_tested.PYLANCE[-1]}" in text and len(caught) == 1


@pytest.mark.parametrize(
    "version", ["9.0.1", "10.0.0b1", "9.99.9", "15.0.0", "15.0.0b1", "15", "0.38.2", "", "unknown"]
)
def test_another_release_is_refused(version: str) -> None:
    with pytest.raises(la.UnsupportedVersionError, match="needs pylance >=") as caught:
        _versions.check_pylance(version)
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, la.LanceArtifactError)
    assert f"pylance=={_tested.PYLANCE[-1]}" in str(caught.value)


@pytest.mark.parametrize(
    ("version", "code", "said"),
    [("14.7.0", 0, "UntestedVersionWarning"), ("9.0.0", 1, "UnsupportedVersionError")],
)
def test_it_is_checked_once_and_first_at_import(version: str, code: int, said: str) -> None:
    """Of a release that cannot work nothing else is touched; the warning comes once for all of a program's imports."""
    script = f"import lance, sys; lance.__version__ = {version!r}\n"
    script += "del sys.modules['lance.dataset'].Index\n" if code else ""
    script += (
        "import lance_artifact, lance_artifact.cli, importlib; importlib.import_module('lance_artifact')"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stderr
    assert run.stderr.count(f"{said}: ") == 1, run.stderr


def test_the_table_says_what_is_declared_and_compiled() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"pylance>={_tested.OLDEST},<{_tested.BELOW}" in project["dependencies"]
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())["dependencies"]
    compiled = {
        re.sub("^=", "", d["version"] if isinstance(d, dict) else d)
        for n, d in cargo.items()
        if n.split("-")[0] == "lance"
    }
    assert compiled == {_tested.COMPILED}


def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    for release in _tested.PYLANCE:
        assert f"| {release} |" in text, release
    for release in _tested.LANCEDB:
        assert f"| LanceDB {release} |" in text, release
    assert f"from {_tested.OLDEST} to before {_tested.BELOW}" in text
    assert (
        _tested.LANCEDB[0] == _tested.LANCEDB_OLDEST
        and f"LanceDB is taken from {_tested.LANCEDB_OLDEST}" in text
    )
    for release in _tested.OLDER:
        assert f"| {release} |" in text, release


@pytest.mark.parametrize("version", _tested.OLDER)
def test_a_release_of_the_year_before_is_refused(version: str) -> None:
    with pytest.raises(la.UnsupportedVersionError, match=re.escape(f"pylance {version} is installed")):
        _versions.check_pylance(version)


def test_what_the_matrix_runs(tmp_path: Path) -> None:
    """With the releases that are here, so that it is known to run."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "matrix.py"], capture_output=True, text=True, check=False
    )
    steps = json.loads(run.stdout.splitlines()[-1])["steps"]
    assert run.returncode == 0 and len(steps) == 28 and set(steps.values()) == {"ok"}, run.stdout


def test_what_goes_across_releases(tmp_path: Path) -> None:
    """With the release that is here for both, so that it is known to run, and to see a failure."""

    def steps(verb: str) -> dict[str, str]:
        command = [sys.executable, ROOT / "tests" / "across.py", verb, tmp_path]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])["steps"]
        assert (run.returncode == 0) is (set(found.values()) == {"ok"}), run.stdout
        return found

    assert [len(steps(verb)) for verb in ("make", "use", "take", "read")] == [8, 16, 20, 4]
    for place in tmp_path.iterdir():
        lance.dataset(str(place)).drop_index("vector_idx")
    assert not {"ok"} & set(steps("read").values())
