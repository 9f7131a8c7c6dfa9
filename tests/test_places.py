"""The place an artifact is written to: what is refused there, whose model lies there, and where it is."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, leftovers, vectors
from targets import (
    TAG,
    a_model,
    attempt_of_another_machine,
    builder,
    filled,
    ids,
    is_artifact_of,
    named,
    table,
    tree,
)

# What is no place for an artifact.


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    rows = pa.table({"vector": column(vectors(300, 8))})
    return lance.write_dataset(rows, str(tmp_path / "data.lance"))


REFUSED = {
    "a file": ("notes.txt", "is a file"),
    "a dataset": ("data.lance", "is the Lance dataset"),
    "in a dataset": ("data.lance/artifact", r"Lance dataset .*data\.lance, or lies inside"),
    "deep in a dataset": ("data.lance/data/x/y", r"Lance dataset .*data\.lance, or lies inside"),
    "in a dataset by a link": ("link/artifact", r"Lance dataset .*link, or lies inside"),
    "deeper in a dataset by a link": ("deep/x", r"Lance dataset .*data\.lance, or lies inside"),
    "a folder with a file": ("full", r"notes\.txt"),
    "a folder with a folder": ("folders", "mine/"),
    "a folder that contains itself": ("loop", "self"),
    "files like ours": ("like", r"metadata2024\.lance.*partitions/bucket-7\.lance"),
    "another program's manifest": ("web", "not of an artifact"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("form", ["path", "uri", "relative"])
@pytest.mark.usefixtures("dataset")
def test_places_that_are_refused(
    case: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, message = REFUSED[case]
    for file in (
        "notes.txt",
        "full/notes.txt",
        "folders/mine/x",
        "like/metadata2024.lance",
        "web/manifest.json",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "like/partitions").mkdir()
    (tmp_path / "like/partitions/bucket-7.lance").write_text("mine")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/self").symlink_to(".")
    (tmp_path / "link").symlink_to("data.lance")
    (tmp_path / "deep").symlink_to("data.lance/data")
    monkeypatch.chdir(tmp_path)
    uri = {"path": str(tmp_path / name), "uri": f"file://{tmp_path}/{name}", "relative": name}[form]
    before = tree(tmp_path)
    with pytest.raises(la.InvalidInputError, match=message):
        builder(uri, overwrite=True)
    assert tree(tmp_path) == before


def test_a_refusal_names_some_of_what_is_there(tmp_path: Path) -> None:
    for n in range(9):
        (tmp_path / f"file{n}").touch()
    with pytest.raises(la.InvalidInputError, match=r"file0, .*file4 and 4 more.*new or empty folder"):
        builder(tmp_path)


def test_create_index_refuses_the_dataset_as_a_target(dataset: Any, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for uri in (dataset.uri, f"{dataset.uri}/artifact"):
        with pytest.raises(la.InvalidInputError, match="is the dataset"):
            la.create_index(dataset, "vector", num_partitions=2, num_sub_vectors=2, artifact_uri=uri)
    assert tree(tmp_path) == before


def test_a_folder_in_memory_with_other_things() -> None:
    with builder("memory://refused/a/b") as made:
        made.append_batch(table(1))
    with pytest.raises(la.InvalidInputError, match="b/"):
        builder("memory://refused/a")
    assert la.Artifact.open("memory://refused/a/b").verify().ok


@pytest.mark.parametrize("how", ["new", "empty", "nested", "leftovers", "here"])
def test_places_that_are_fine(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x/y/a" if how == "nested" else tmp_path / "a"
    if how in ("empty", "here"):
        path.mkdir()
    elif how == "leftovers":
        attempt_of_another_machine(path, TAG)
    monkeypatch.chdir(path if how == "here" else tmp_path)
    filled("." if how == "here" else path, 1).finish()
    assert is_artifact_of(path, 1)


def test_files_that_appear_meanwhile_are_never_touched(tmp_path: Path) -> None:
    mine = [
        "notes.txt",
        "metadata2024.lance",
        "metadata-mine.lance",
        "partitions/bucket-7.lance",
        "x/bucket-00001.lance",
    ]
    for end in ("finish", "abort", "overwrite"):
        path = tmp_path / end
        if end == "overwrite":
            filled(path, 2).finish()
        made = filled(path, 1, overwrite=end == "overwrite")
        for name in mine:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("mine")
        (path / "self").symlink_to(".")
        getattr(made, "abort" if end == "abort" else "finish")()
        assert all((path / name).read_text() == "mine" for name in mine)
        (path / "self").unlink()
        assert set(leftovers(path)) == {*mine, *([] if end == "abort" else named(path))}


def test_a_store_without_conditional_writes(tmp_path: Path) -> None:
    """It can take a new artifact (put-if-absent), but replacing one could destroy another writer's: refused at the start."""
    uri = f"file-object-store://{tmp_path}/a"
    filled(uri, 1).finish()
    before = tree(tmp_path)
    with pytest.raises(la.InvalidInputError, match=r"overwrite=True.*conditional"):
        builder(uri, overwrite=True)
    assert tree(tmp_path) == before
    assert la.Artifact.open(uri).verify().ok


# Whose model it is.


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_of_another_artifact_is_not_adopted(when: str, tmp_path: Path) -> None:
    model = a_model()
    other = la.PartitionArtifactBuilder(tmp_path / "other", model)
    other.finish()
    path = tmp_path / "a"
    if when == "before":
        path.mkdir()
        shutil.copy(tmp_path / "other/metadata.lance", path)
    made = filled(path, 1)
    made.finish()
    if when == "after":
        shutil.copy(tmp_path / "other/metadata.lance", path)
    assert (path / "metadata.lance").exists()
    artifact = la.Artifact.open(path)
    assert artifact.manifest["metadata_file"] is None and artifact.model is None
    assert artifact.verify().ok


def test_a_manifest_that_says_nothing_means_the_usual_model(tmp_path: Path) -> None:
    path = tmp_path / "a"
    model = a_model()
    la.PartitionArtifactBuilder(path, model).finish()
    manifest = json.loads((path / "manifest.json").read_text())
    least = {key: manifest[key] for key in ("version", "num_partitions", "partitions")}
    (path / "manifest.json").write_text(json.dumps(least))
    assert la.Artifact.open(path).model == model
    (path / "manifest.json").write_text(json.dumps({**least, "metadata_file": None}))
    assert la.Artifact.open(path).model is None


def test_a_model_without_a_file_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a"
    la.PartitionArtifactBuilder(path, a_model()).finish()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "metadata_file": None}))
    with pytest.raises(la.CorruptArtifactError, match="metadata_file is null"):
        la.Artifact.open(path)


def test_a_model_of_another_fingerprint_is_corrupt(tmp_path: Path) -> None:
    for seed in range(2):
        la.PartitionArtifactBuilder(tmp_path / f"a{seed}", a_model(seed)).finish()
    shutil.copy(tmp_path / "a0/metadata.lance", tmp_path / "a1")
    with pytest.raises(la.CorruptArtifactError):
        la.Artifact.open(tmp_path / "a1")


# Where it is.


@pytest.mark.parametrize("given", ["rel/a", "./rel/../rel/a/", "rel/ä #1%20?"])
def test_a_relative_path_and_a_changed_directory(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    path = here / "rel" / ("a" if given.endswith(("a", "a/")) else "ä #1%20?")
    made = filled(given, 1)
    assert made.uri == str(path)
    monkeypatch.chdir(there)
    artifact = made.finish()
    assert artifact.uri == str(path) and leftovers(there) == []
    assert is_artifact_of(path, 1)
    monkeypatch.chdir(here)
    opened = la.Artifact.open(given)
    pickled = pickle.dumps(opened)
    monkeypatch.chdir(there)
    assert opened.verify().ok
    assert ids(pickle.loads(pickled)) == ids(artifact)
    again = filled(path, 2, overwrite=True)
    again.abort()
    assert is_artifact_of(path, 1)


@pytest.mark.parametrize("place", ["memory://container:pass-word@shown/a", "file://{}/a"])
def test_the_true_uri_is_kept_and_secrets_are_not_shown(place: str, tmp_path: Path) -> None:
    uri = place.format(tmp_path) + "?sig=signa-ture&ddbTableName=table"
    made = filled(uri, 1)
    artifact = made.finish()
    for shown in (made.uri, repr(made), artifact.uri, repr(artifact), repr(artifact.manifest)):
        assert "pass-word" not in shown and "signa-ture" not in shown
    for shown in (made.uri, artifact.uri):
        assert "ddbTableName=table" in shown and ("container:***@" in shown or "file://" in shown)
    with pytest.raises(la.ArtifactExistsError) as refused:
        builder(uri)
    assert "pass-word" not in str(refused.value) and "signa-ture" not in str(refused.value)
    _, (kept, _options) = artifact.__reduce__()
    assert kept == uri
    assert ids(pickle.loads(pickle.dumps(artifact))) == ids(artifact)


def test_errors_on_the_way_to_a_store_keep_secrets() -> None:
    for uri in (
        "nosuch://user:pass-word@host/a?sig=signa-ture",
        "s3://user:pass-word@/a?sig=signa-ture",
        "s3://user:pass/pass-word@bucket/a?sig=signa-ture",
    ):
        with pytest.raises(la.LanceArtifactError) as failed:
            la.Artifact.open(uri)
        assert "pass-word" not in str(failed.value) and "signa-ture" not in str(failed.value)


def test_what_looks_like_a_uri_and_is_none_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("s3://buck et/a", "s3://bucket:port/a", "az://"):
        with pytest.raises(la.LanceArtifactError, match="artifact_uri"):
            builder(uri)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("when", ["train_ivf", "shuffle"])
def test_a_directory_that_changes_while_an_index_is_built(
    when: str, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative `artifact_uri` is what it was when the call began, and only that one is deleted."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    filled(there / "a", 1).finish()
    before = tree(there)
    build: dict[str, Any] = {"num_partitions": 2, "num_sub_vectors": 2, "sample_rate": 2, "num_bits": 4, "backend": "cpu"}  # fmt: skip
    for keep in (True, False):
        monkeypatch.chdir(here)

        def moved(step: Any) -> None:
            if step.stage == when:
                monkeypatch.chdir(there)

        la.create_index(
            dataset, "vector", artifact_uri="a" if keep else "b", keep_artifact=keep, replace=not keep, progress=moved, **build
        )  # fmt: skip
    assert tree(there) == before
    assert la.Artifact.open(here / "a").verify().ok and not (here / "b").exists()


@pytest.mark.parametrize("place", ["self", "~nosuchuser/x"])
def test_places_that_are_odd(
    place: str, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").symlink_to("self")
    build: dict[str, Any] = {"num_partitions": 2, "num_sub_vectors": 2, "sample_rate": 2, "num_bits": 4, "backend": "cpu"}  # fmt: skip
    if place == "self":
        with pytest.raises(la.LanceArtifactError):
            la.create_index(dataset, "vector", artifact_uri=place, **build)
        return
    la.create_index(dataset, "vector", artifact_uri=place, **build)
    assert la.Artifact.open(tmp_path / place).verify().ok
