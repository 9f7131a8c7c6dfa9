"""A wheel in a bare virtual environment with exactly the declared dependencies: README's first example and the command line."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

import lance_artifact

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lance_artifact.__file__).parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirement: str) -> str | None:
    """The name of what a distribution needs without any extra, here."""
    name, _, marker = requirement.partition(";")
    if "extra" in marker:
        return None
    return canonical(re.match(r"[A-Za-z0-9._-]+", name)[0])  # type: ignore[index]


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """The installed distributions that these need, and what those need."""
    found: dict[str, Distribution] = {}
    waiting = list(requirements)
    while waiting:
        name = required(waiting.pop())
        if name is None or name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform; pip says so below if it is not
        waiting += found[name].requires or []
    return found


def make_wheel(folder: Path) -> Path:
    """What `maturin build` puts into a wheel, from the package as it is here: nothing is compiled for a test."""
    given = os.environ.get("LANCE_ARTIFACT_WHEEL")
    if given:
        return Path(given)
    name, version = PROJECT["name"].replace("-", "_"), PROJECT["version"]
    about = f"{name}-{version}.dist-info"
    metadata = [
        "Metadata-Version: 2.3",
        f"Name: {PROJECT['name']}",
        f"Version: {version}",
        f"Requires-Python: {PROJECT['requires-python']}",
    ]
    metadata += [f"Requires-Dist: {d}" for d in PROJECT["dependencies"]]
    for extra, needs in PROJECT["optional-dependencies"].items():
        metadata += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {d}; extra == '{extra}'" for d in needs)]
    points = ["[console_scripts]", *(f"{n} = {v}" for n, v in PROJECT["scripts"].items())]
    for group, entries in PROJECT["entry-points"].items():
        points += [f"[{group}]", *(f"{n} = {v}" for n, v in entries.items())]
    tag = f"cp311-abi3-{'linux' if sys.platform == 'linux' else 'any'}_{os.uname().machine}"
    files: dict[str, bytes] = {
        f"{about}/METADATA": "\n".join(metadata).encode(),
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}".encode(),
        f"{about}/entry_points.txt": "\n".join(points).encode(),
    }
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            files[f"lance_artifact/{path.relative_to(PACKAGE)}"] = path.read_bytes()
    record = [f"{about}/RECORD,,"]
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for inside, data in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{inside},sha256={digest},{len(data)}")
            archive.writestr(inside, data)
        archive.writestr(f"{about}/RECORD", "\n".join(record))
    return wheel


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment with the wheel and what it declares, and not one distribution more."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    # The declared dependencies as they are installed here: linked, so that no registry is needed.
    for known in closure(PROJECT["dependencies"]).values():
        tops = {Path(file).parts[0] for file in known.files or [] if ".." not in Path(file).parts}
        for top in tops - {"__pycache__"}:
            source = Path(str(known.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    wheel = make_wheel(folder)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "venv" / "bin" / "python"),
        "--disable-pip-version-check",
    ]
    # Without an index: pip installs the wheel only if everything that it declares is there.
    subprocess.run([*pip, "install", "--quiet", "--no-index", str(wheel)], check=True)
    yield folder / "venv" / "bin"
    # The extension twice, as it is while it is developed.
    shutil.rmtree(folder)


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_it_is_bare(bare: Path, tmp_path: Path) -> None:
    """The test would prove nothing if an optional package could be seen."""
    script = "import importlib.util as u; print([n for n in ('tqdm', 'sklearn', 'matplotlib', 'pytest') if u.find_spec(n)])"
    assert run([bare / "python", "-c", script], tmp_path).stdout.strip() == "[]"


def test_readmes_first_example(bare: Path, tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    script = f"""
import lance, numpy, pyarrow
v = numpy.random.default_rng(0).standard_normal((5000, 64)).astype("float32")
lance.write_dataset(pyarrow.table({{"vector": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(v.reshape(-1)), 64)}}), "vectors.lance")
{example}
assert [i.name for i in ds.describe_indices()] == ["vector_idx"]
assert ds.to_table(nearest={{"column": "vector", "q": v[7], "k": 1, "nprobes": 16, "refine_factor": 10}}, with_row_id=True)["_rowid"].to_pylist() == [7]
la.unregister()
assert la.register()
model = la.train(ds, "vector", num_partitions=4, num_sub_vectors=8, backend="cpu", progress=True)
print(la.__file__)
"""
    where = run([bare / "python", "-c", script], tmp_path).stdout.strip()
    assert Path(where).is_relative_to(bare.parent), where


def test_the_command_line(bare: Path, tmp_path: Path) -> None:
    command = bare / "lance-artifact"
    assert run([command, "--version"], tmp_path).stdout.strip() == lance_artifact.__version__
    assert "cpu: available" in run([command, "backends"], tmp_path).stdout
    assert "Exit codes" in run([command, "--help"], tmp_path).stdout
