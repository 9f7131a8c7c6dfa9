"""What a release rests on: versions that agree, workflows that are pinned and may do little, and a threat model whose tests exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lance_artifact

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github").glob("workflows/*.yml"))
ACTIONS = [*WORKFLOWS, *sorted((ROOT / ".github/actions").glob("*/action.yml"))]
NOTES = ROOT / "scripts/release-notes"


def loaded(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def notes(version: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(NOTES), version], capture_output=True, text=True, check=False)


def test_every_file_says_the_same_version() -> None:
    """Of another one the notes are refused before anything else is said."""
    other = notes("v99.0.0")
    assert other.returncode == 1
    said = re.findall(r"(\S+) says ([\w.]+)", other.stderr)
    assert {name for name, _ in said} == {"pyproject.toml", "Cargo.toml", "Cargo.lock"}
    assert {version for _, version in said} == {lance_artifact.__version__}


def test_notes_are_of_a_release_with_a_date(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/release-notes").write_text(NOTES.read_text())
    for name in ("pyproject.toml", "Cargo.toml", "Cargo.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    version = lance_artifact.__version__
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.compile(rf"^## \[{re.escape(version)}\] - .*$", re.MULTILINE)
    assert len(heading.findall(text)) == 1
    for date, code in (("2026-12-31", 0), ("unreleased", 1)):
        dated = heading.sub(f"## [{version}] - {date}", text)
        (tmp_path / "CHANGELOG.md").write_text(f"{dated}\n## [0.0.1] - 2020-01-01\n\n- of another one\n")
        command = [sys.executable, str(tmp_path / "scripts/release-notes"), f"v{version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        if code == 0:
            assert done.stdout.startswith("The first release.") or done.stdout.startswith("### ")
            assert "of another one" not in done.stdout and "## [" not in done.stdout


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.parent.name + "/" + path.name)
def test_actions_are_pinned_with_their_version(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"^\s*(?:- )?uses: .*$", text, re.MULTILINE):
        used = line.split("uses: ")[1]
        if used.startswith("./"):
            assert (ROOT / used).exists()
            continue
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), line


def test_one_version_of_each_action() -> None:
    pins: dict[str, set[str]] = {}
    for path in ACTIONS:
        for name, pin in re.findall(
            r"uses: ([\w.-]+/[\w.-]+)[\w./-]*@(\S+ # \S+)", path.read_text(encoding="utf-8")
        ):
            pins.setdefault(name, set()).add(pin)
    assert pins and all(len(found) == 1 for found in pins.values()), pins


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_may_do_little_and_end(path: Path) -> None:
    workflow = loaded(path)
    assert workflow["permissions"] == {} and "concurrency" in workflow
    # YAML takes "on" for a truth value.
    assert "pull_request_target" not in workflow[True]
    for name, job in workflow["jobs"].items():
        granted = job["permissions"]
        written = {what for what, how in granted.items() if how == "write"}
        allowed = {
            "attest": {"id-token", "attestations"},
            "pypi": {"id-token"},
            "github": {"contents"},
            "report": {"issues"},
        }
        assert written == allowed.get(name, set()), (path.name, name)
        assert "uses" in job or 0 < job["timeout-minutes"] <= 360, (path.name, name)
        for step in job.get("steps", ()):
            if str(step.get("uses", "")).startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, (path.name, name)


def test_scripts_that_workflows_run_are_there() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in ACTIONS)
    named = set(re.findall(r"\bscripts/[\w-]+", text))
    assert {"scripts/test", "scripts/matrix", "scripts/peer-tests", "scripts/check-wheel"} <= named
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert not missing, missing


def test_the_threat_model_names_tests_and_code_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    rust = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.rs"))
    python = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "python").rglob("*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 30
    for name in named:
        assert f"def {name}(" in tests, name
    for path in re.findall(r"`((?:src|tests)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`([a-z]\w+(?:_\w+)+)`", text):
        known = (
            f"def {name}(" in tests
            or f"fn {name}" in rust
            or f"def {name}(" in python
            or f"{name}:" in python
        )
        assert known, name
