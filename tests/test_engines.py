"""The steps of a run under somebody else's engine: the examples, as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_artifact as la
from conftest import stored, vectors
from test_extend import DIM, ROWS, K, M

ROOT = Path(__file__).parent.parent
EXAMPLES, DAFT = ROOT / "examples", ROOT / ".venv" / "daft"


@pytest.mark.parametrize("engine", ["shell", "daft"])
def test_the_same_index_as_in_one_process(write: Callable[..., Any], tmp_path: Path, engine: str) -> None:
    ds = write(vectors(ROWS, DIM))
    run = str(tmp_path / "run")
    if engine == "shell":
        command = [str(EXAMPLES / "shell_loop.sh"), ds.uri, "vector", run, "3"]
        command += ["--num-partitions", str(K), "--num-sub-vectors", str(M)]
    else:
        if not DAFT.exists():
            pytest.skip(
                "Daft is not there; scripts/test installs it, beside the rest, because it wants an older pyarrow"
            )
        command = [
            sys.executable,
            str(EXAMPLES / "daft_build.py"),
            ds.uri,
            "vector",
            run,
            "3",
            str(K),
            str(M),
        ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "DAFT_ANALYTICS_ENABLED": "0"}
    if engine == "daft":
        environment["PYTHONPATH"] = str(DAFT)
    subprocess.run(command, check=True, env=environment)
    assert la.Run.open(run).status().shards == (True,) * 3
    # Again, and nothing happens: the index is the run's own.
    version = lance.dataset(ds.uri).version
    subprocess.run(command, check=True, env=environment)
    assert lance.dataset(ds.uri).version == version
    la.create_index(ds, "vector", name="plain", num_partitions=K, num_sub_vectors=M, backend="cpu")
    ds = lance.dataset(ds.uri)
    assert stored(ds, "vector_idx") == stored(ds, "plain")
