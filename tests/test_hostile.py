"""What somebody made to do harm: an artifact, a run, a folder. Each ends in a typed error, in a process that is still there."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lance.file import LanceFileWriter

import lance_artifact as la
from conftest import LINUX, leftovers, vectors
from lance_artifact import _lance_artifact as core
from lance_artifact import cli
from lance_artifact._artifacts import store_options
from lance_artifact._run_files import MODEL, PLAN, read_model, written_model
from lance_artifact.backends import _registry
from lance_artifact.backends.cpu import CpuBackend
from test_artifact import WIDTH, K, artifact, edit, model  # noqa: F401

# Of memory; of a file, on the disks that there are.
HUGE, SPARSE = 1 << 45, 1 << 42

OPENED = """
import resource, sys
import lance, lance_artifact as la
# Of what a claim makes somebody ask for, a machine of any size gives nothing.
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30),) * 2)
try:
    opened = la.Artifact.open(sys.argv[1])
    for partition in range(opened.num_partitions):
        opened.read_partition(partition).read_all()
    print("read")
except la.CorruptArtifactError as error:
    print("refused:", error)
"""


def said_of(place: Path) -> str:
    """What a process of its own says of an artifact: a claim that is believed may end it, or keep it waiting."""
    done = subprocess.run(
        [sys.executable, "-c", OPENED, str(place)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def foreign(folder: Path, rows: int = 4000) -> tuple[Path, Path]:
    """An artifact of another writer, of the required keys and an encoded file that Lance decodes; and that file."""
    (folder / "partitions").mkdir(parents=True)
    file = folder / "partitions/b.lance"
    codes = np.random.default_rng(0).integers(0, 256, rows * WIDTH, dtype=np.uint8)
    kind = pa.list_(pa.field("item", pa.uint8()), WIDTH)
    columns = {
        "_rowid": pa.array(range(rows), pa.uint64()),
        "__pq_code": pa.FixedSizeListArray.from_arrays(pa.array(codes), type=kind),
    }
    table = pa.table(columns)
    with LanceFileWriter(str(file), table.schema, version="2.1") as writer:
        writer.write_batch(table)
    partition = {"path": "partitions/b.lance", "num_rows": rows, "ranges": [{"offset": 0, "num_rows": rows}]}
    (folder / "manifest.json").write_text(
        json.dumps({"version": 1, "num_partitions": 1, "partitions": [partition]})
    )
    return folder, file


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def fields(message: bytes) -> list[tuple[int, Any]]:
    """Number and value of the fields of a protobuf message, of numbers and bytes."""

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    found: list[tuple[int, Any]] = []
    at = 0
    while at < len(message):
        key = number()
        if key & 7 == 0:
            found.append((key >> 3, number()))
            continue
        assert key & 7 == 2
        size = number()
        found.append((key >> 3, message[at : at + size]))
        at += size
    return found


def message(parts: list[tuple[int, Any]]) -> bytes:
    out = b""
    for number, value in parts:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def forge_column(file: Path, change: Callable[[list[tuple[int, Any]]], list[tuple[int, Any]]]) -> None:
    """Change what the metadata of a Lance file says of the pages of its first column; the file stays one in all else."""
    data = file.read_bytes()
    first, offsets, globals_, num_globals, num_columns = struct.unpack("<QQQII", data[-40:-8])
    table = [struct.unpack_from("<QQ", data, offsets + 16 * n) for n in range(num_columns)]
    at, size = table[0]
    column = fields(data[at : at + size])
    changed = message(
        [(number, message(change(fields(value))) if number == 2 else value) for number, value in column]
    )
    table[0] = (offsets, len(changed))
    out = data[:offsets] + changed
    new_offsets = len(out)
    out += b"".join(struct.pack("<QQ", *entry) for entry in table)
    new_globals = len(out)
    out += data[globals_ : globals_ + 16 * num_globals]
    out += struct.pack("<QQQII", first, new_offsets, new_globals, num_globals, num_columns) + data[-8:]
    file.write_bytes(out)


def test_the_forger_changes_nothing_else(tmp_path: Path) -> None:
    """The cases below would prove nothing of files that nobody can read."""
    folder, file = foreign(tmp_path / "a")
    before = la.Artifact.open(str(folder)).read_partition(0).read_all()
    forge_column(file, lambda page: page)
    assert la.Artifact.open(str(folder)).read_partition(0).read_all() == before


def sizes(page: list[tuple[int, Any]], new: int) -> list[tuple[int, Any]]:
    """A page whose first buffer has another size."""
    return [(n, varint(new) + message_rest(value) if n == 2 else value) for n, value in page]


def message_rest(packed: bytes) -> bytes:
    """Packed numbers without the first."""
    end = next(n for n, byte in enumerate(packed) if byte < 0x80) + 1
    return packed[end:]


@LINUX
@pytest.mark.parametrize("size", [1 << 60, (1 << 64) - 1, HUGE], ids=["most of all", "all", "much"])
def test_a_page_larger_than_its_file(size: int, tmp_path: Path) -> None:
    folder, file = foreign(tmp_path / "a")
    forge_column(file, lambda page: sizes(page, size))
    said = said_of(folder)
    assert said.startswith("refused:") and f"has {size} bytes at" in said, said


@pytest.mark.parametrize(
    ("good", "bad", "panic"),
    [
        # Field 6 of a page of 2.1, its layers: one of a kind that there is not.
        (b"2\x01\x01", b"2\x01\x09", "UnknownEnumValue"),
        (b"uint64", b"Uint64", "Unsupported logical type: Uint64"),
    ],
    ids=["when a page is decoded", "when the schema is"],
)
def test_a_panic_of_lance_is_an_error(good: bytes, bad: bytes, panic: str, tmp_path: Path) -> None:
    """Of a file without checksums nothing but Lance's decoder says that it is damaged, and it says this by a panic."""
    folder, file = foreign(tmp_path / "a")
    data = file.read_bytes()
    # In the metadata, which come last.
    at = data.rindex(good)
    file.write_bytes(data[:at] + bad + data[at + len(good) :])
    with pytest.raises(la.CorruptArtifactError, match=rf"cannot be decoded \(.*{panic}"):
        la.Artifact.open(str(folder)).read_partition(0).read_all()


@LINUX
@pytest.mark.parametrize("name", ["manifest.json", "metadata.lance", "partitions/bucket-00000.lance"])
def test_a_file_that_seems_to_fill_the_disk(name: str, artifact: Path) -> None:  # noqa: F811
    """Sparse: it takes nothing there, and would take all memory here."""
    os.truncate(artifact / name, SPARSE)
    said = said_of(artifact)
    assert said.startswith("refused:") and str(SPARSE) in said, said
    if name == "manifest.json":
        return
    # Nor where the manifest says nothing of sizes.
    edit(artifact, lambda m: m.pop("files"))
    assert "the footer is not that of a Lance file" in said_of(artifact)


@LINUX
def test_partitions_that_no_model_has(tmp_path: Path) -> None:
    """Of the layout without a manifest the model's file says how many there are."""
    schema = pa.schema([("x", pa.int8())], metadata={"lance:index_build:num_partitions": str(1 << 40)})
    with LanceFileWriter(str(tmp_path / "metadata.lance"), schema, version="2.2") as writer:
        writer.write_batch(pa.table({"x": pa.array([1], pa.int8())}, schema=schema))
    (tmp_path / "sorted_0.lance").write_bytes(b"")
    assert said_of(tmp_path).startswith(
        f"refused: metadata.lance of {tmp_path}: it claims {1 << 40} partitions in"
    )


@LINUX
@pytest.mark.parametrize("name", ["manifest.json", "metadata.lance", "partitions/bucket-00001.lance"])
def test_a_pipe_that_nobody_writes_to(name: str, artifact: Path) -> None:  # noqa: F811
    (artifact / name).unlink()
    os.mkfifo(artifact / name)
    assert "is a pipe" in said_of(artifact)


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"version": 1, "x": ' + b"[" * 200_000, b"\xff\xfe", b"null", b"[]"]
)
def test_json_that_is_no_manifest(content: bytes, artifact: Path) -> None:  # noqa: F811
    (artifact / "manifest.json").write_bytes(content)
    with pytest.raises(la.CorruptArtifactError):
        la.Artifact.open(str(artifact))


@pytest.fixture
def run(write: Callable[..., Any], tmp_path: Path) -> Path:
    ds = write(vectors(2000, 16))
    options: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4, "sample_rate": 16, "max_iters": 2}
    la.create_index(ds, "vector", artifact_uri=tmp_path / "run", resume=True, backend="cpu", **options)
    return tmp_path / "run"


DAMAGED_RUNS: dict[str, tuple[str, bytes]] = {
    "a plan that is deep": (PLAN, b"[" * 200_000),
    "a plan that is none": (PLAN, b"{}"),
    "a plan of bytes": (PLAN, b"\xff"),
    "a plan within that is deep": (
        PLAN,
        b'{"format": "lance-artifact-run", "format_version": 1, "run_id": "", "plan": {"shards": 1}}',
    ),
    "a commit that is none": ("committed.json", b"[1]"),
    "a commit that is deep": ("committed.json", b"[" * 200_000),
    "a commit of nothing": ("committed.json", b"{}"),
    "a model that is none": (MODEL, b"ARROW1"),
    "a model without an end": (MODEL, b""),
}


@pytest.mark.parametrize("case", DAMAGED_RUNS)
def test_a_run_that_cannot_be_read(case: str, run: Path) -> None:
    name, content = DAMAGED_RUNS[case]
    (run / name).write_bytes(content)
    with pytest.raises(la.CorruptArtifactError):
        found = la.Run.open(run)
        found.status()
        found.model()


@pytest.mark.parametrize("end", [1 << 30, -1, 1])
def test_lists_that_end_beyond_their_values(end: int) -> None:
    """Arrow's files say where lists end, and Arrow believes them."""
    content = written_model(model())
    offsets = struct.pack("<ii", 0, K)
    assert content.count(offsets) >= 1
    with pytest.raises(la.CorruptArtifactError):
        read_model(content.replace(offsets, struct.pack("<ii", 0, end)), "here")


def test_a_terminal_is_not_told_what_to_do(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    bad = "\x1b]0;owned\x07\x9b2J\r"
    source = {"dataset_uri": bad, "version": 1, "column": bad, "fragment_ids": [0], "stable_row_ids": False}
    edit(artifact, lambda m: m.update(source=source))
    assert cli.main(["inspect", str(artifact)]) == 0
    shown = capsys.readouterr()
    assert "\\x1b]0;owned\\x07\\x9b2J\\x0d" in shown.out
    assert not set(bad) & set(shown.out) - set("]0;owned2J")
    # As data it is what it is.
    assert cli.main(["inspect", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["column"] == bad


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_a_lock_that_is_no_file(what: str, artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    """It would be waited for, or somebody else's file be opened for writing."""
    (tmp_path / "mine").write_text("mine")
    if what == "link":
        (artifact / ".lance-artifact-lock").symlink_to(tmp_path / "mine")
    else:
        os.mkfifo(artifact / ".lance-artifact-lock")
    script = f"""
import lance_artifact as la
try:
    la.PartitionArtifactBuilder({str(artifact)!r}, num_partitions=2, pq_code_width=4, overwrite=True)
except (la.StorageError, la.InvalidInputError) as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("refused:"), (done.stdout, done.stderr)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_leads_elsewhere_is_no_target(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/partitions").symlink_to(tmp_path / "elsewhere")
    if exists:
        (tmp_path / "elsewhere").mkdir()
    with pytest.raises(la.InvalidInputError, match="partitions"):
        la.PartitionArtifactBuilder(tmp_path / "a", num_partitions=2, pq_code_width=4)
    assert not exists or not list((tmp_path / "elsewhere").iterdir())


def test_an_empty_folder_elsewhere_stays(artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    """The folders of an artifact's files go with them where they are empty then; with a link to another place nothing goes."""
    (tmp_path / "elsewhere/empty").mkdir(parents=True)
    (artifact / "link").symlink_to(tmp_path / "elsewhere")
    (artifact / "mine/empty").mkdir(parents=True)
    named = {name: {"num_rows": 1, "size_bytes": 1} for name in ("link/empty/x.lance", "mine/empty/x.lance")}
    edit(artifact, lambda m: m["files"].update(named))
    before = leftovers(tmp_path)
    with pytest.raises(la.CorruptArtifactError, match="links are refused"):
        core.delete_artifact(str(artifact))
    assert (tmp_path / "elsewhere/empty").is_dir() and leftovers(tmp_path) == before
    (artifact / "link").unlink()
    core.delete_artifact(str(artifact))
    assert (tmp_path / "elsewhere/empty").is_dir()
    assert leftovers(tmp_path) == [] and not (artifact / "mine").exists()


def test_a_package_does_not_take_the_name_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are loaded where they are named, and by nothing else but the list of all."""

    def load() -> Any:
        raise AssertionError("loaded")

    points = [SimpleNamespace(name=name, load=load) for name in ("cpu", "cuvs", "pylance-cuvs", "theirs")]
    monkeypatch.setattr(_registry, "entry_points", lambda group: points)
    assert isinstance(_registry.resolve_backend("cpu"), CpuBackend)
    assert _registry.resolve_backend("auto").name in ("cpu", "cuvs")
    with pytest.raises(AssertionError, match="loaded"):
        _registry.resolve_backend("theirs")


def test_options_of_a_store_stay_in_it() -> None:
    """The dataset's credentials serve an artifact beside it, and no other place that somebody names."""

    def options() -> dict[str, str]:
        return {"aws_secret_access_key": "secret"}

    handle: Any = SimpleNamespace(
        dataset=SimpleNamespace(latest_storage_options=options), root="s3://ours/t.lance"
    )
    assert store_options(handle, "s3://ours/artifacts/a", None) is options
    for other in ("s3://theirs/a", "s3://ours.theirs/a", "gs://ours/a", "/tmp/a", "file:///ours/a"):
        assert store_options(handle, other, None) is None, other
