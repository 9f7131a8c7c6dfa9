"""`scripts/gpu` and its form for a machine without a package registry, over the doubles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

import lance_artifact as la
from conftest import LINUX, real_driver

ROOT = Path(__file__).parent.parent


def script(name: str) -> Any:
    """A script without a suffix, as a module."""
    loader = SourceFileLoader(name.replace("-", "_"), str(ROOT / "scripts" / name))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def rehearsed(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(la.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [str(ROOT / "scripts/gpu"), "--rehearse", "--out", str(out), *arguments],
        env={**os.environ, "LANCE_ARTIFACT_PYTHON": sys.executable, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )


@LINUX
@pytest.mark.skipif(real_driver(), reason="a double of the driver cannot stand beside the real one")
def test_a_rehearsal_makes_the_page(tmp_path: Path) -> None:
    """What cuVS is taken for is so of the double, down to builds on a device that is nearly full."""
    done = rehearsed(tmp_path / "out", "--only", "contract")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "out/gpu-results.md").read_text()
    assert "A rehearsal over doubles" in page
    assert "| contract | ok |" in page
    results = json.loads((tmp_path / "out/gpu-results.json").read_text())
    (part,) = results["parts"]
    assert len(part["found"]["encodings"]) == 2 * 2 * 2 * 4
    assert {look["what"] for look in part["found"]["looks"]} >= {"300 MiB left", "a build after those"}
    # What has no time left is named, and the page still there.
    done = rehearsed(tmp_path / "late", "--only", "contract", "--minutes", "0")
    assert done.returncode == 1
    assert "no time was left" in (tmp_path / "late/gpu-results.md").read_text()


def bundled(folder: Path, sizes: list[int]) -> tuple[Path, list[Path]]:
    bundle = script("gpu-bundle")
    out = folder / "parts"
    out.mkdir()
    wheels = [folder / f"w{n}-1-py3-none-any.whl" for n in range(len(sizes))]
    for wheel, size in zip(wheels, sizes, strict=True):
        wheel.write_bytes(os.urandom(size))
    parts = bundle.Parts(out, 1000)
    index = [parts.add(wheel) for wheel in wheels]
    (out / "index.json").write_text(json.dumps({"python": "3.12", "wheels": index}))
    return out, wheels


def test_parts_are_of_a_size_and_come_together_again(tmp_path: Path) -> None:
    join = script("gpu-join")
    out, wheels = bundled(tmp_path, [1, 999, 2500, 1000, 0, 17])
    assert [p.stat().st_size for p in sorted(out.glob("part-*"))] == [1000, 1000, 1000, 1000, 517]
    told = json.loads((out / "index.json").read_text())
    (tmp_path / "wheels").mkdir()
    for wheel, entry in zip(wheels, told["wheels"], strict=True):
        assert join.joined(out, entry, tmp_path / "wheels").read_bytes() == wheel.read_bytes()
    # A part that was damaged, or cut, on its way.
    for damage in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1]):
        part = out / "part-002"
        whole = part.read_bytes()
        part.write_bytes(damage(whole))
        (tmp_path / "wheels" / wheels[2].name).unlink()
        with pytest.raises(SystemExit, match=r"carry (it|parts \[.*2.*\]) again"):
            join.joined(out, told["wheels"][2], tmp_path / "wheels")
        part.write_bytes(whole)
        join.joined(out, told["wheels"][2], tmp_path / "wheels")


def test_a_bundle_that_is_not_for_this_machine_is_refused(tmp_path: Path) -> None:
    out, _ = bundled(tmp_path, [1500])
    join = [sys.executable, str(ROOT / "scripts/gpu-join")]

    def refused(*arguments: str) -> str:
        done = subprocess.run([*join, *arguments], capture_output=True, text=True)
        assert done.returncode != 0
        return done.stderr

    told = json.loads((out / "index.json").read_text())
    told["python"] = "3.9"
    (out / "index.json").write_text(json.dumps(told))
    assert "of Python 3.9" in refused(str(out))
    told["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    (out / "index.json").write_text(json.dumps(told))
    (out / "part-001").unlink()
    assert "missing in" in refused(str(out))
    assert "index.json" in refused(str(tmp_path / "nowhere"))
