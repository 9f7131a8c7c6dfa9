"""The documentation: it builds without a warning, its code runs, its tables are complete, its notebook runs."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from lance_artifact import cli, exceptions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr, run.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    elsewhere = {"__version__", "backends", "exceptions"}
    documented_there = {name for name in la.__all__ if hasattr(exceptions, name)}
    protocols = {"Availability", "DeviceArray", "DeviceSession", "PreparedVectors", "Shard"}
    for name in set(la.__all__) - elsewhere - documented_there - protocols:
        assert re.search(rf'id="lance_artifact\.[\w.]*{name}"', page), name
    assert "bytes" in page and "num_partitions" in page


def test_every_error_is_in_its_table() -> None:
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| (\d+) \|", text, re.M))
    for name in exceptions.__all__:
        kind = getattr(exceptions, name)
        if name in ("LanceArtifactError", "UntestedVersionWarning"):
            continue
        code = next((code for known, code in cli.EXIT_CODES if issubclass(kind, known)), 1)
        assert rows.pop(name) == str(code), name
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        for base in kind.__mro__[1:]:
            if base.__module__ == "builtins" and base not in (
                Exception,
                BaseException,
                object,
                LookupError,
                RuntimeError,
                OSError,
            ):
                assert base.__name__ in line, (name, base)
    assert not rows


def test_every_command_is_in_the_reference(site: Path) -> None:
    from lance_artifact.cli._app import app

    page = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for name, command in app.commands.items():
        assert f'id="lance-artifact-{name}"' in page, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), f"{name} {parameter.name}: no help"
    for text in (path.read_text(encoding="utf-8") for path in [*DOCS.rglob("*.md"), ROOT / "README.md"]):
        for name in re.findall(r"lance-artifact ([a-z]+)", text):
            assert name in app.commands, name


@pytest.mark.parametrize("page", ["choose", "large", "lancedb", "programs", "encoder"])
def test_the_code_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).standard_normal((5000, 64)).astype("float32")
    table = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 64)})
    space: dict[str, Any] = {"la": la, "lance": lance}
    space["ds"] = lance.write_dataset(table, "vectors.lance", max_rows_per_file=2500)
    if page == "lancedb":
        import lancedb

        lancedb.connect("tables").create_table("items", table)
    text = (DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), space)


def test_the_first_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).standard_normal((5000, 64)).astype("float32")
    table = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 64)})
    lance.write_dataset(table, "vectors.lance")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.S)
    for block in blocks:
        exec(compile(block, "index.md", "exec"), {})


def test_the_notebook(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    source = DOCS / "notebooks" / "first_index.ipynb"
    notebook = nbformat.read(source, as_version=4)
    # As it is here, without what its run in the documentation left.
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = json.dumps(notebook.cells)
    assert outputs.count("image/png") == 3 and "recall@10" in outputs
    assert json.dumps(json.loads(source.read_text(encoding="utf-8"))).count("image/png") == 3, (
        "shown without its pictures"
    )


def test_docstrings_name_every_argument() -> None:
    for name in (
        "create_index",
        "train",
        "build_artifact",
        "finalize",
        "plan",
        "extend_index",
        "merge_segments",
        "evaluate",
    ):
        function = getattr(la, name)
        said = inspect.getdoc(function) or ""
        for parameter in inspect.signature(function).parameters:
            assert parameter in said, (name, parameter)
