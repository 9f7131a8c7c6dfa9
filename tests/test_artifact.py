"""Reading and verifying: artifacts of other writers are read, damaged and hostile ones end in a typed error."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lance.file import LanceFileReader, LanceFileWriter

import lance_artifact as la
from conftest import content, encoded

K, WIDTH = 6, 4


def model(metric: str = "l2") -> la.IvfPqModel:
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((K, 8)).astype("float32")
    return la.IvfPqModel(centroids, rng.standard_normal((4, 256, 2)).astype("float32"), metric)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with la.PartitionArtifactBuilder(str(tmp_path / "a"), model(), num_buckets=3) as builder:
        builder.append_batch(encoded(500, K, WIDTH))
    return tmp_path / "a"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_it_says(artifact: Path) -> None:
    opened = la.Artifact.open(str(artifact))
    assert (opened.num_rows, opened.num_partitions, opened.pq_code_width) == (500, K, WIDTH)
    assert opened.model == model()
    assert sum(opened.partition_sizes()) == 500
    assert opened.manifest["num_buckets"] == 3
    assert sorted(p.name for p in (artifact / "partitions").iterdir()) == [
        f"bucket-{b:05}.lance" for b in range(3)
    ]
    report = opened.verify()
    assert (report.ok, report.num_rows, report.num_files) == (True, 500, 3)
    assert report.checksums_checked and report.part_ids_checked
    with pytest.raises(IndexError):
        opened.read_partition(K)
    assert pickle.loads(pickle.dumps(opened)).num_rows == 500
    assert pickle.loads(pickle.dumps(opened.model)) == opened.model


def test_the_manifest_is_what_the_format_says(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert (
        manifest["version"] == 1
        and manifest["metadata_file"] == "metadata.lance"
        and manifest["total_loss"] is None
    )
    assert len(manifest["partitions"]) == K
    for partition, entry in enumerate(manifest["partitions"]):
        assert entry["path"] == f"partitions/bucket-{partition % 3:05}.lance"
        assert sum(r["num_rows"] for r in entry["ranges"]) == entry["num_rows"]
        table = LanceFileReader(str(artifact / entry["path"])).read_all().to_table()
        assert table.schema.names == ["_rowid", "__ivf_part_id", "__pq_code"]
        for r in entry["ranges"]:
            assert set(table["__ivf_part_id"].slice(r["offset"], r["num_rows"]).to_pylist()) == {partition}
    reader = LanceFileReader(str(artifact / "metadata.lance"))
    metadata = {k.decode(): v.decode() for k, v in reader.metadata().schema.metadata.items()}
    assert {k.removeprefix("lance:index_build:"): v for k, v in metadata.items()} == {
        "artifact_version": "1", "distance_type": "l2", "num_partitions": "6", "num_sub_vectors": "4", "num_bits": "8", "dimension": "8",
    }  # fmt: skip


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2"])
@pytest.mark.parametrize("part_ids", [True, False])
def test_other_writers_of_the_format(version: str, part_ids: bool, tmp_path: Path) -> None:
    """Minimal keys, any file version, no partition ids, runs in any order, a non-null inner field."""
    rng = np.random.default_rng(1)
    partitions: list[dict[str, Any]] = [{"num_rows": 0, "ranges": []} for _ in range(K)]
    expected: list[dict[int, bytes]] = [{} for _ in range(K)]
    (tmp_path / "partitions").mkdir()
    next_id = 0
    for bucket in range(2):
        ids: list[int] = []
        parts: list[int] = []
        for partition in [4, 0, 2, 4, 0] if bucket == 0 else [5, 1]:
            rows = int(rng.integers(1, 50))
            entry = partitions[partition]
            entry["path"] = f"partitions/b{bucket}.lance"
            entry["ranges"].append({"offset": len(ids), "num_rows": rows})
            entry["num_rows"] += rows
            ids += range(next_id, next_id + rows)
            parts += [partition] * rows
            next_id += rows
        codes = rng.integers(0, 256, (len(ids), WIDTH), dtype=np.uint8)
        for i, p, c in zip(ids, parts, codes, strict=True):
            expected[p][i] = c.tobytes()
        kind = pa.list_(pa.field("item", pa.uint8(), nullable=version != "2.1"), WIDTH)
        columns = {
            "_rowid": pa.array(ids, pa.uint64()),
            "__pq_code": pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), type=kind),
        }
        if part_ids:
            columns["__ivf_part_id"] = pa.array(parts, pa.uint32())
        table = pa.table(columns)
        with LanceFileWriter(
            str(tmp_path / f"partitions/b{bucket}.lance"), table.schema, version=version
        ) as writer:
            writer.write_batch(table)
    manifest = {"version": 1, "num_partitions": K, "partitions": partitions, "from": "another writer"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    opened = la.Artifact.open(str(tmp_path))
    assert opened.model is None and opened.pq_code_width == WIDTH
    assert content(opened) == expected
    report = opened.verify()
    assert report.ok, report.problems
    assert (report.checksums_checked, report.part_ids_checked) == (False, part_ids)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x40
    path.write_bytes(data)


def change_code(path: Path, bucket: int) -> None:
    """Change one byte of one stored code, wherever the file keeps it."""
    target = path / f"partitions/bucket-{bucket:05}.lance"
    codes = LanceFileReader(str(target)).read_all().to_table()["__pq_code"].combine_chunks()
    stored = codes.flatten().to_numpy().tobytes()
    data = target.read_bytes()
    assert data.count(stored) == 1
    at = data.index(stored) + len(stored) // 2
    target.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def duplicate(m: dict[str, Any]) -> None:
    m["partitions"][0]["ranges"][0]["offset"] = m["partitions"][3]["ranges"][0]["offset"]


def swap(m: dict[str, Any]) -> None:
    # Two partitions of one file exchange their ranges: only the content tells.
    a, b = m["partitions"][0], m["partitions"][3]
    a["ranges"], b["ranges"] = b["ranges"], a["ranges"]
    a["num_rows"], b["num_rows"] = b["num_rows"], a["num_rows"]


REFUSED_AT_OPEN = {
    "not json": lambda p: (p / "manifest.json").write_text("{"),
    "version 2": lambda p: edit(p, lambda m: m.update(version=2)),
    "no partitions": lambda p: edit(p, lambda m: m.pop("partitions")),
    "too few entries": lambda p: edit(p, lambda m: m["partitions"].pop()),
    "rows do not add up": lambda p: edit(p, lambda m: m["partitions"][1].update(num_rows=1)),
    "overlap": lambda p: edit(p, duplicate),
    "overflow": lambda p: edit(p, lambda m: m["partitions"][1]["ranges"][0].update(offset=2**64 - 1)),
    "negative": lambda p: edit(p, lambda m: m["partitions"][1]["ranges"][0].update(offset=-1)),
    "absolute path": lambda p: edit(p, lambda m: m["partitions"][1].update(path="/etc/passwd")),
    "parent path": lambda p: edit(
        p, lambda m: m["partitions"][1].update(path="../a/partitions/bucket-00001.lance")
    ),
    "url": lambda p: edit(p, lambda m: m["partitions"][1].update(path="file:///etc/passwd")),
    "rows without a path": lambda p: edit(p, lambda m: m["partitions"][1].update(path=None)),
    "no model file": lambda p: (p / "metadata.lance").unlink(),
    "model cut": lambda p: truncate(p / "metadata.lance"),
    "other model": lambda p: edit(p, lambda m: m["model"].update(fingerprint="0" * 32)),
    "code width": lambda p: edit(p, lambda m: m.update(pq_code_width=2**31 + 5)),
    "counts that do not add up": lambda p: edit(p, lambda m: m["rows"].update(seen=m["rows"]["seen"] + 5)),
    "no checksum": lambda p: edit(p, lambda m: m["partitions"][1].pop("checksum")),
    "flipped model": lambda p: flip(p / "metadata.lance", 0.3),
    "metadata elsewhere": lambda p: edit(p, lambda m: m.update(metadata_file="../metadata.lance")),
}


@pytest.mark.parametrize("case", REFUSED_AT_OPEN)
def test_a_bad_manifest_or_model_is_refused(case: str, artifact: Path) -> None:
    REFUSED_AT_OPEN[case](artifact)
    with pytest.raises(la.CorruptArtifactError):
        la.Artifact.open(str(artifact))


FOUND_BY_VERIFY = {
    "missing file": lambda p: (p / "partitions/bucket-00001.lance").unlink(),
    "truncated file": lambda p: truncate(p / "partitions/bucket-00001.lance"),
    "empty file": lambda p: (p / "partitions/bucket-00001.lance").write_bytes(b""),
    "flipped row id": lambda p: flip(p / "partitions/bucket-00001.lance", 0.05),
    "changed code": lambda p: change_code(p, 1),
    "swapped ranges": lambda p: edit(p, swap),
    "another bucket's file": lambda p: shutil.copy(p / "partitions/bucket-00000.lance", p / "partitions/bucket-00001.lance"),
    "gap": lambda p: edit(p, lambda m: (m["partitions"][5].update(num_rows=0, ranges=[], path=None), m.pop("rows"))),
    "range past the end": lambda p: edit(p, lambda m: m["partitions"][5]["ranges"][0].update(offset=10**6)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND_BY_VERIFY)
def test_verify_finds(case: str, artifact: Path) -> None:
    FOUND_BY_VERIFY[case](artifact)
    report = la.Artifact.open(str(artifact)).verify()
    assert not report.ok and report.num_problems == len(report.problems) > 0
    assert all(isinstance(p, str) for p in report.problems)


def test_bits_that_flip_end_in_an_answer(artifact: Path) -> None:
    """At 40 places of a file, one at a time: reading gives an error or the rows, never a panic, never other rows."""
    whole = content(la.Artifact.open(str(artifact)))
    target = artifact / "partitions/bucket-00002.lance"
    good = target.read_bytes()
    for at in np.linspace(0, 1, 40, endpoint=False):
        flip(target, float(at))
        with contextlib.suppress(la.CorruptArtifactError):
            assert content(la.Artifact.open(str(artifact))) == whole
        target.write_bytes(good)


def test_a_damaged_footer_does_not_take_the_process(artifact: Path) -> None:
    """A count that asks for more memory than there is could not be caught."""
    for name in ("metadata.lance", "partitions/bucket-00001.lance"):
        target = artifact / name
        good = target.read_bytes()
        for at in range(len(good) - 40, len(good)):
            data = bytearray(good)
            data[at] ^= 0x80
            target.write_bytes(data)
            with pytest.raises(la.CorruptArtifactError):
                la.Artifact.open(str(artifact)).read_partition(1).read_all()
        target.write_bytes(good)


def test_duplicate_row_ids_are_found(tmp_path: Path) -> None:
    with la.PartitionArtifactBuilder(str(tmp_path / "a"), model()) as builder:
        builder.append_batch(encoded(100, K, WIDTH))
        builder.append_batch(encoded(30, K, WIDTH, seed=5, first=70))
    report = made = builder.artifact.verify()
    assert not report.ok and made.duplicate_row_ids == 30


def test_links_out_of_the_artifact_are_refused(artifact: Path, tmp_path: Path) -> None:
    target = artifact / "partitions/bucket-00001.lance"
    shutil.move(target, tmp_path / "elsewhere.lance")
    target.symlink_to(tmp_path / "elsewhere.lance")
    with pytest.raises(la.CorruptArtifactError, match="link"):
        la.Artifact.open(str(artifact)).read_partition(1)


def test_a_partition_that_has_lost_its_ranges_is_not_empty(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["partitions"][1].update(ranges=[], num_rows=0)
    del manifest["rows"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    opened = la.Artifact.open(str(artifact))
    with pytest.raises(la.CorruptArtifactError, match="partition 1 has checksum 0000000000000000"):
        opened.read_partition(1).read_all()
    assert not opened.verify().ok


def test_a_linked_folder_is_not_looked_into(artifact: Path, tmp_path: Path) -> None:
    shutil.move(artifact / "partitions", tmp_path / "elsewhere")
    (artifact / "partitions").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(la.CorruptArtifactError, match="link"):
        la.Artifact.open(str(artifact)).verify()


@pytest.mark.parametrize("name", ["a#b.lance", "büket ~1.lance", "[x] {y}.lance"])
def test_files_may_have_any_name_that_the_format_allows(name: str, artifact: Path) -> None:
    before = content(la.Artifact.open(str(artifact)))
    (artifact / "partitions/bucket-00001.lance").rename(artifact / "partitions" / name)
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text.replace("bucket-00001.lance", name))
    opened = la.Artifact.open(str(artifact))
    assert content(opened) == before and opened.verify().ok


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(la.ArtifactNotFoundError, match=r"manifest\.json does not exist"):
        la.Artifact.open(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        la.Artifact.open(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("centroids", "codebook", "options", "message"),
    [
        (np.zeros((0, 8), "f4"), np.zeros((4, 256, 2), "f4"), {}, "at least one"),
        (np.zeros((6, 8), "f4"), np.zeros((4, 256, 2), "f8"), {}, "float64"),
        (np.zeros((6, 8), "i4"), np.zeros((4, 256, 2), "f4"), {}, "int32"),
        (np.zeros((6, 8), "f4"), np.zeros((4, 100, 2), "f4"), {}, "num_bits"),
        (np.zeros((6, 8), "f4"), np.zeros((256, 8), "f4"), {}, "num_sub_vectors"),
        (np.zeros((6, 8), "f4"), np.zeros((256, 8), "f4"), {"num_sub_vectors": 3}, "divisor"),
        (np.full((6, 8), np.nan, "f4"), np.zeros((4, 256, 2), "f4"), {}, "finite"),
        (np.zeros((6, 8), "f4"), np.zeros((4, 256, 2), "f4"), {"metric": "hamming"}, "metric"),
        (np.zeros((6, 6), "f4"), np.zeros((3, 16, 2), "f4"), {}, "even"),
    ],
)
def test_models_are_checked(centroids: Any, codebook: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(la.InvalidInputError, match=message):
        la.IvfPqModel(centroids, codebook, **options)


def test_a_model_in_every_form_is_the_same() -> None:
    rng = np.random.default_rng(0)
    centroids, codebook = (
        rng.standard_normal((6, 8)).astype("f4"),
        rng.standard_normal((4, 256, 2)).astype("f4"),
    )
    first = la.IvfPqModel(centroids, codebook)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(codebook.reshape(-1)), 8)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(centroids)
    for again in (
        la.IvfPqModel(first.ivf_centroids, first.pq_codebook, num_sub_vectors=4),
        la.IvfPqModel(tensors, flat, "L2", num_sub_vectors=4),
        la.IvfPqModel(np.asfortranarray(centroids), codebook, "euclidean"),
    ):
        assert again == first and hash(again) == hash(first)
    assert la.IvfPqModel(centroids, codebook, "dot") != first
    assert first.pq_code_width == 4 and first.dimension == 8 and first.num_bits == 8


# Version 2: partitions in a file of their own


@pytest.fixture
def tabled(tmp_path: Path) -> Path:
    with la.PartitionArtifactBuilder(
        str(tmp_path / "two"), model(), num_buckets=3, format_version=2, memory_limit=2 << 20
    ) as builder:
        for first in range(0, 120_000, 40_000):
            builder.append_batch(encoded(40_000, K, WIDTH, seed=first, first=first))
    return tmp_path / "two"


def test_version_2_holds_what_version_1_holds(tabled: Path, tmp_path: Path) -> None:
    with la.PartitionArtifactBuilder(
        str(tmp_path / "one"), model(), num_buckets=3, memory_limit=2 << 20
    ) as builder:
        for first in range(0, 120_000, 40_000):
            builder.append_batch(encoded(40_000, K, WIDTH, seed=first, first=first))
    one, two = builder.artifact, la.Artifact.open(str(tabled))
    assert (one.manifest["version"], two.manifest["version"]) == (1, 2)
    assert "partitions" not in json.loads((tabled / "manifest.json").read_text())
    assert min(two.partition_range_counts()) > 1
    assert one.partition_range_counts() == two.partition_range_counts()
    assert content(one) == content(two)
    report = two.verify()
    assert (report.ok, report.num_rows, report.num_ranges) == (
        True,
        120_000,
        sum(two.partition_range_counts()),
    )


def test_many_ranges_are_no_matter_for_a_manifest(tmp_path: Path) -> None:
    """A quarter of a million ranges: version 2 by itself, and a manifest of a few kilobytes."""
    partitions = 60_000
    with la.PartitionArtifactBuilder(
        str(tmp_path / "a"), num_partitions=partitions, pq_code_width=1, num_buckets=4, memory_limit=24 << 20
    ) as builder:
        for first in range(0, 2_000_000, 250_000):
            builder.append_batch(encoded(250_000, partitions, 1, seed=first, first=first))
    artifact = builder.artifact
    assert sum(artifact.partition_range_counts()) > 200_000
    assert artifact.manifest["version"] == 2
    assert (tmp_path / "a" / "manifest.json").stat().st_size < 5000
    assert artifact.verify().ok


def test_version_2_is_replaced_and_deleted_like_any_other(tabled: Path) -> None:
    from lance_artifact import _lance_artifact as core

    with la.PartitionArtifactBuilder(str(tabled), model(), overwrite=True) as builder:
        builder.append_batch(encoded(500, K, WIDTH))
    assert builder.artifact.num_rows == 500
    names = [path.name for path in tabled.rglob("*.lance")]
    assert not any(name in ("partitions.lance", "metadata.lance") for name in names), names
    with la.PartitionArtifactBuilder(str(tabled), model(), overwrite=True, format_version=2) as builder:
        builder.append_batch(encoded(600, K, WIDTH))
    assert builder.artifact.num_rows == 600
    core.delete_artifact(str(tabled))
    assert not tabled.exists()


def move_a_row(manifest: dict[str, Any]) -> None:
    manifest["bucket_files"] = manifest["bucket_files"][::-1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "partitions.lance").unlink(),
        lambda path: (path / "partitions.lance").write_bytes((path / "partitions.lance").read_bytes()[:-100]),
        lambda path: (path / "partitions.lance").write_bytes((path / "metadata.lance").read_bytes()),
        lambda path: edit(path, lambda m: m.update(version=1)),
        lambda path: edit(path, lambda m: m.update(version=3)),
        lambda path: edit(path, lambda m: m.pop("partitions_file")),
        lambda path: edit(path, lambda m: m.update(partitions_file="../two/partitions.lance")),
        lambda path: edit(path, lambda m: m.update(bucket_files=m["bucket_files"][:1])),
        lambda path: edit(path, lambda m: m.update(bucket_files=["/etc/passwd"] * 3)),
        lambda path: edit(path, lambda m: m.update(num_partitions=K + 1)),
        lambda path: edit(path, lambda m: m["rows"].update(seen=1, written=1)),
        lambda path: edit(path, lambda m: m.update(partitions=[{"num_rows": 0}] * K)),
    ],
)
def test_damaged_partitions_are_refused(damage: Callable[[Path], Any], tabled: Path) -> None:
    damage(tabled)
    with pytest.raises(la.CorruptArtifactError):
        la.Artifact.open(str(tabled))


def test_partitions_in_the_wrong_files_are_found(tabled: Path) -> None:
    edit(tabled, move_a_row)
    assert not la.Artifact.open(str(tabled)).verify().ok


@pytest.mark.parametrize("version", [0, 3, "2", 1.5, True])
def test_format_versions_that_there_are_not(version: Any, tmp_path: Path) -> None:
    with pytest.raises(la.InvalidInputError, match="format_version"):
        la.PartitionArtifactBuilder(str(tmp_path / "a"), model(), format_version=version)
    assert not (tmp_path / "a").exists()
