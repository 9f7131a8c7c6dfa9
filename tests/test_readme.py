"""The README's Python code runs, and public docstrings exist at run time."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la

ROOT = Path(__file__).parent.parent


def test_the_code_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).standard_normal((5000, 64)).astype("float32")
    table = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 64)})
    lance.write_dataset(table, "vectors.lance", max_rows_per_file=2500)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    names = {i.name for i in lance.dataset("vectors.lance").describe_indices()}
    assert names == {"vector_idx", "own_idx", "shards_idx"}


@pytest.mark.parametrize(
    "name", [n for n in la.__all__ if n not in ("__version__", "backends", "exceptions")]
)
def test_public_docstrings(name: str) -> None:
    thing = getattr(la, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing) and thing.__module__.startswith("lance_artifact"):
        for member, value in vars(thing).items():
            if (
                not member.startswith("_")
                and (callable(value) or inspect.isgetsetdescriptor(value))
                and thing.__name__ != "VerifyReport"
            ):
                assert inspect.getdoc(value), f"{name}.{member}"
