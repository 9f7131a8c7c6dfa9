"""The doubles against what is published: signatures of cuVS's and pylance-cuvs' wheels, symbols of the driver."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from conftest import DOUBLES

# The newest, and the oldest of those with wheels for every Python from 3.11 on.
CUVS = ("26.10.0", "26.6.0")
MODULES = {
    "cuvs.neighbors.ivf_pq": ("build", "build_precomputed", "transform", "IndexParams"),
    "cuvs.preprocessing.quantize.pq": ("build", "QuantizerParams"),
}
PROPERTIES = {
    ("cuvs.neighbors.ivf_pq", "Index"): ("n_lists", "dim", "pq_dim", "pq_bits", "pq_len", "centers_padded", "pq_centers", "rotation_matrix"),
    ("cuvs.preprocessing.quantize.pq", "Quantizer"): ("pq_codebook", "pq_bits", "pq_dim"),
}  # fmt: skip


def wheel(name: str, release: str, folder: Path, python: str = "3.12") -> zipfile.ZipFile:
    """A published wheel, without what it depends on: a few megabytes at most."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--abi", "abi3", "--abi",
               f"cp{python.replace('.', '')}", "--abi", "none", "-d", str(folder), f"{name}=={release}"]  # fmt: skip
    for platform in platforms:
        command += ["--platform", platform]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} {release} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def signatures(source: str) -> dict[str, list[tuple[str, Any]]]:
    """Parameters and defaults of the functions and constructors of a .pyx file."""
    found = {}
    owner = None
    for match in re.finditer(
        r"^(cdef class (\w+)|( *)def (\w+)\((.*?)\):\n)", source, re.MULTILINE | re.DOTALL
    ):
        if match[2]:
            owner = match[2]
            continue
        name = match[4] if not match[3] else f"{owner}.{match[4]}"
        # Cython writes the type before a name.
        parameters = re.sub(
            r"(?<![\w=.])(?:[A-Za-z_]\w*)\s+(?=[A-Za-z_]\w*\s*(?:[,=]|$))", "", match[5].replace("\n", " ")
        )
        try:
            arguments = ast.parse(f"def f({parameters}): pass").body[0].args  # type: ignore[attr-defined]
        except SyntaxError:
            continue
        names = [a.arg for a in arguments.args]
        defaults = [None] * (len(names) - len(arguments.defaults)) + [
            ast.unparse(d) for d in arguments.defaults
        ]
        keyword = [
            (a.arg, ast.unparse(d) if d else None)
            for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        ]
        found[name] = list(zip(names, defaults, strict=True)) + keyword
    return found


def as_pairs(function: Any) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, None if p.default is inspect.Parameter.empty else repr(p.default)) for p in parameters]


@pytest.mark.parametrize("release", CUVS)
def test_cuvs_is_as_published(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double: Any
) -> None:
    published = wheel("cuvs-cu13", release, tmp_path)
    compared = 0
    for module, names in MODULES.items():
        path = module.replace(".", "/")
        source = published.read(f"{path}/{path.split('/')[-1]}.pyx").decode()
        theirs = signatures(source)
        ours = importlib.import_module(module)
        for name in names:
            is_class = name[0].isupper()
            expected = theirs[f"{name}.__init__" if is_class else name]
            got = as_pairs(getattr(ours, name).__init__ if is_class else getattr(ours, name))
            assert got == expected, f"{module}.{name}"
            compared += len(expected)
        for (owner, cls), properties in PROPERTIES.items():
            for name in properties if owner == module else ():
                assert re.search(rf"@property\s+def {name}\(self\)", source), f"{cls}.{name}"
                assert isinstance(inspect.getattr_static(getattr(ours, cls), name), property)
    assert compared > 30
    dtypes = {name: re.search(rf"{name}\s*=\s*device_ndarray.empty\(.*?dtype=['\"](\w+)['\"]", source_of(published), re.DOTALL)
              for name in ("output_labels", "output_dataset")}  # fmt: skip
    assert {name: m and m[1] for name, m in dtypes.items()} == {
        "output_labels": "uint32",
        "output_dataset": "uint8",
    }
    resources = published.read("cuvs/common/resources.pyx").decode()
    # The crash that the backend goes round: as soon as this fails, the published one may take a stream.
    assert "<cudaStream_t>stream" in resources
    assert "def get_c_obj(self)" in resources
    assert "class CuvsException(Exception)" in published.read("cuvs/common/exceptions.pyx").decode()


def source_of(published: zipfile.ZipFile) -> str:
    return published.read("cuvs/neighbors/ivf_pq/ivf_pq.pyx").decode()


def test_pylibraft_is_as_published(tmp_path: Path, double: Any) -> None:
    published = wheel("pylibraft-cu13", "26.10.0", tmp_path)
    source = published.read("pylibraft/common/device_ndarray.py").decode()
    methods = {
        node.name: [a.arg for a in node.args.args]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }
    ours = importlib.import_module("pylibraft.common").device_ndarray
    for name in ("__init__", "empty", "copy_to_host"):
        function = inspect.getattr_static(ours, name)
        assert list(inspect.signature(getattr(function, "__func__", function)).parameters) == methods[name]
    assert "__cuda_array_interface__" in methods


@pytest.mark.parametrize("release", CUVS)
def test_rmm_is_as_published(release: str, tmp_path: Path, double: Any) -> None:
    published = wheel("rmm-cu13", release, tmp_path)
    tree = ast.parse(published.read("rmm/pylibrmm/memory_resource/_memory_resource.pyi").decode())
    theirs = {
        owner.name: {each.name: [a.arg for a in each.args.args] for each in owner.body if isinstance(each, ast.FunctionDef)}
        for owner in tree.body if isinstance(owner, ast.ClassDef)
    }  # fmt: skip
    ours = importlib.import_module("rmm.mr")
    for name in ("CudaAsyncMemoryResource", "LimitingResourceAdaptor"):
        assert list(inspect.signature(getattr(ours, name).__init__).parameters) == theirs[name]["__init__"]
    # What the backend goes round: as soon as this fails, the memory that a pool holds and nobody uses can be counted as free.
    assert set(theirs["CudaAsyncMemoryResource"]) == {"__init__"}
    assert set(theirs["DeviceMemoryResource"]) <= {"__init__", "allocate", "deallocate"}


@pytest.mark.parametrize("release", ["0.1.0b1", "0.1.0b2"])
def test_lance_cuvs_is_as_published(release: str, tmp_path: Path, double: Any) -> None:
    published = wheel("pylance-cuvs", release, tmp_path)
    source = published.read("lance_cuvs/__init__.py").decode()
    # The loader passes everything on, by name.
    for name in ("train_ivf_pq", "build_ivf_pq_artifact"):
        assert f"def {name}(*args: Any, **kwargs: Any)" in source
        assert hasattr(importlib.import_module("lance_cuvs"), name)


def test_the_bridges_functions_are_as_published(tmp_path: Path, double: Any) -> None:
    # 60 MB; the only published one with the functions themselves.
    published = wheel("pylance-cuvs-cu12", "0.1.0b2", tmp_path)
    tree = ast.parse(published.read("lance_cuvs_backend_cu12/__init__.py").decode())
    theirs = {n.name: ast.unparse(n.args) for n in tree.body if isinstance(n, ast.FunctionDef)}
    double_source = (DOUBLES / "packages/lance_cuvs/__init__.py").read_text()
    ours = {
        n.name: ast.unparse(n.args) for n in ast.parse(double_source).body if isinstance(n, ast.FunctionDef)
    }
    for name in ("train_ivf_pq", "build_ivf_pq_artifact"):
        assert ours[name] == theirs[name]
