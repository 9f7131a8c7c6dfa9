"""Datasets and artifacts in S3, against a local server."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import LINUX, column, content, encoded, vectors
from failing_s3 import proxy
from local_s3 import BUCKET, client, s3_server

K, M, DIM, ROWS = 8, 4, 16, 3000


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as options:
        yield options


def keys(options: dict[str, str], prefix: str) -> list[str]:
    found = client(options).list_objects_v2(Bucket="vectors", Prefix=prefix)
    return sorted(o["Key"] for o in found.get("Contents", []))


def test_dataset_and_artifact_in_s3(s3: dict[str, str]) -> None:
    array = vectors(ROWS, DIM)
    table = pa.table({"id": pa.array(range(ROWS)), "vector": column(array)})
    lance.write_dataset(table, "s3://vectors/t.lance", storage_options=s3, max_rows_per_file=1000)
    ds = lance.dataset("s3://vectors/t.lance", storage_options=s3)
    model = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=8, backend="cpu")
    artifact = la.build_artifact(ds, "vector", model, "s3://vectors/a", backend="cpu", storage_options=s3)
    assert artifact.num_rows == ROWS and artifact.verify().ok
    assert "secret" not in repr(artifact.manifest) + repr(artifact)
    la.finalize(ds, "vector", "s3://vectors/a", storage_options=s3)
    found = ds.to_table(
        nearest={"column": "vector", "q": array[5], "k": 1, "nprobes": K, "refine_factor": 20}
    )
    assert found["id"].to_pylist() == [5]


def test_options_of_a_path_and_of_an_artifact_beside_it(s3: dict[str, str]) -> None:
    """A dataset by its URI is opened with storage_options; an artifact in the dataset's store needs none of its own."""
    ds = lance.write_dataset(
        pa.table({"vector": column(vectors(2000, DIM))}), f"s3://{BUCKET}/options/v.lance", storage_options=s3
    )
    shape: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4, "backend": "cpu"}
    with pytest.raises(la.LanceArtifactError):
        la.create_index(ds.uri, "vector", **shape)
    made = la.create_index(ds.uri, "vector", storage_options=s3, **shape)
    assert [index.name for index in made.describe_indices()] == ["vector_idx"]
    la.create_index(
        ds.uri,
        "vector",
        name="called",
        storage_options=lambda: s3,
        artifact_uri=f"s3://{BUCKET}/options/a",
        **shape,
    )
    assert la.Artifact.open(f"s3://{BUCKET}/options/a", s3).num_rows == 2000
    ds.checkout_latest()
    la.create_index(
        ds, "vector", name="beside", artifact_uri=f"s3://{BUCKET}/options/run", resume=True, **shape
    )
    ds.create_index(
        "vector", "IVF_PQ", name="again", precomputed_partition_artifact_uri=f"s3://{BUCKET}/options/a"
    )
    assert {i.name for i in ds.describe_indices()} == {"vector_idx", "called", "beside", "again"}


def test_multipart_uploads_and_their_memory(s3: dict[str, str]) -> None:
    """A bucket file of several parts; buckets bounded by what their upload buffers take."""
    width, rows = 64, 300_000
    made = la.PartitionArtifactBuilder(
        "s3://vectors/big",
        num_partitions=1000,
        pq_code_width=width,
        memory_limit=128 << 20,
        storage_options=s3,
    )
    assert made.num_buckets == 3
    with pytest.raises(la.InvalidInputError, match="lower num_buckets"):
        la.PartitionArtifactBuilder(
            "s3://vectors/x",
            num_partitions=1000,
            pq_code_width=width,
            memory_limit=128 << 20,
            num_buckets=256,
            storage_options=s3,
        )
    table = encoded(rows, 1000, width)
    with made:
        for start in range(0, rows, 50_000):
            made.append_batch(table.slice(start, 50_000))
    artifact = made.artifact
    assert artifact.verify().ok
    assert all(f["size_bytes"] > 5 << 20 for f in artifact.manifest["files"].values())
    expected = dict(
        zip(
            table["_rowid"].to_pylist(),
            np.array(table["__pq_code"].combine_chunks().flatten()).reshape(-1, width),
            strict=True,
        )
    )
    got = {i: c for part in content(artifact) for i, c in part.items()}
    assert all(got[i] == c.tobytes() for i, c in expected.items()) and len(got) == rows


def test_an_abort_leaves_no_object_and_no_upload(s3: dict[str, str]) -> None:
    made = la.PartitionArtifactBuilder(
        "s3://vectors/gone", num_partitions=8, pq_code_width=64, memory_limit=64 << 20, storage_options=s3
    )
    for n in range(10):
        made.append_batch(encoded(100_000, 8, 64, first=n * 100_000))
    made.abort()
    assert keys(s3, "gone") == []
    for _ in range(50):
        uploads = client(s3).list_multipart_uploads(Bucket="vectors").get("Uploads", [])
        if not uploads:
            break
        time.sleep(0.1)
    assert uploads == []


def test_publishing_is_put_if_absent(s3: dict[str, str]) -> None:
    both = [
        la.PartitionArtifactBuilder(
            "s3://vectors/race", num_partitions=8, pq_code_width=4, storage_options=s3
        )
        for _ in range(2)
    ]
    for n, made in enumerate(both):
        made.append_batch(encoded(100, 8, 4, first=n * 100))
    both[0].finish()
    with pytest.raises(la.ArtifactExistsError):
        both[1].finish()
    both[1].abort()
    assert la.Artifact.open("s3://vectors/race", s3).verify().ok


def small(uri: str, seed: int, options: dict[str, str], **more: Any) -> la.PartitionArtifactBuilder:
    made = la.PartitionArtifactBuilder(
        uri, num_partitions=8, pq_code_width=4, storage_options=options, **more
    )
    made.append_batch(encoded(100, 8, 4, seed=seed, first=seed * 1000))
    return made


def holds(uri: str, seed: int, options: dict[str, str]) -> bool:
    artifact = la.Artifact.open(uri, options)
    found = {i for part in content(artifact) for i in part}
    return artifact.verify().ok and found == set(range(seed * 1000, seed * 1000 + 100))


def named(options: dict[str, str], name: str) -> list[str]:
    """The keys of an artifact, as its manifest names them."""
    body = client(options).get_object(Bucket="vectors", Key=f"{name}/manifest.json")["Body"].read()
    return sorted(f"{name}/{file}" for file in ["manifest.json", *json.loads(body)["files"]])


@pytest.mark.parametrize("first", [0, 1])
def test_two_overwriting_writers(first: int, s3: dict[str, str]) -> None:
    name = f"two{first}"
    uri = f"s3://vectors/{name}"
    small(uri, 9, s3).finish()
    both = [small(uri, seed, s3, overwrite=True) for seed in range(2)]
    claims = [key for key in keys(s3, name) if ".lance-artifact-claim-" in key]
    assert len(claims) == 2
    both[first].finish()
    with pytest.raises(la.ArtifactExistsError, match="another writer published"):
        both[1 - first].finish()
    assert holds(uri, first, s3)
    both[1 - first].abort()
    assert holds(uri, first, s3)
    assert keys(s3, name) == named(s3, name)


def test_plain_names_of_a_claim_are_not_anothers(s3: dict[str, str]) -> None:
    """The one that claimed first may finish last, and the other way round."""
    for first in (0, 1):
        uri = f"s3://vectors/fresh{first}"
        both = [small(uri, seed, s3) for seed in range(2)]
        both[first].finish()
        with pytest.raises(la.ArtifactExistsError):
            both[1 - first].finish()
        both[1 - first].abort()
        assert holds(uri, first, s3)
        assert keys(s3, f"fresh{first}") == named(s3, f"fresh{first}")


def test_a_manifest_put_that_fails_is_tried_again(s3: dict[str, str]) -> None:
    puts = []

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        if method == "PUT" and key.endswith("manifest.json"):
            puts.append(key)
            return "500" if len(puts) <= 2 else None
        return None

    with proxy(s3, act) as options:
        small("s3://vectors/again", 1, options).finish()
    assert len(puts) == 3
    assert holds("s3://vectors/again", 1, s3) and keys(s3, "again") == named(s3, "again")


@LINUX
@pytest.mark.parametrize("plain", [True, False])
def test_what_a_dead_process_left_goes_with_the_next_artifact(plain: bool, s3: dict[str, str]) -> None:
    name = f"dead{plain}"
    uri = f"s3://vectors/{name}"
    if not plain:
        small(uri, 1, s3).finish()
    script = f"""
import os
import lance_artifact as la
made = la.PartitionArtifactBuilder({uri!r}, num_partitions=8, pq_code_width=4, storage_options={s3!r}, overwrite=True)
os._exit(3)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 3
    claims = [key for key in keys(s3, name) if "/.lance-artifact-claim" in key]
    assert len(claims) == 1 and claims[0].endswith("-claim") is plain
    tag = claims[0].split("-claim")[1]
    for left in (f"metadata{tag}.lance", f"partitions/bucket-00003{tag}.lance"):
        client(s3).put_object(Bucket="vectors", Key=f"{name}/{left}", Body=b"left")
    small(uri, 2, s3, overwrite=not plain).finish()
    assert holds(uri, 2, s3) and keys(s3, name) == named(s3, name)


def test_a_store_that_is_away_for_a_moment_loses_nothing(s3: dict[str, str]) -> None:
    """Every request on the way to publishing may fail, and so may the first look at what was published."""
    left = {"armed": 0, "open": 0}

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        if left["armed"] > 0 and method in ("GET", "PUT", "HEAD"):
            left["armed"] -= 1
            return "500"
        if method == "PUT" and key.endswith("manifest.json"):
            left["open"] = 1
        elif left["open"] and method != "POST" and not key.endswith("claim"):
            return "500"
        return None

    with proxy(s3, act) as options:
        made = small("s3://vectors/away", 1, options, num_buckets=1)
        made.append_batch(encoded(1, 8, 4, first=5_000_000))
        left["armed"] = 2
        with pytest.raises(la.StorageError):
            made.finish()
        left["open"] = 0
        assert made.finish().num_rows == 101
    assert keys(s3, "away") == named(s3, "away")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_put_whose_answer_is_lost(overwrite: bool, s3: dict[str, str]) -> None:
    name = f"lost{overwrite}"
    if overwrite:
        small(f"s3://vectors/{name}", 1, s3).finish()
    puts = []

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        if method == "PUT" and key.endswith("manifest.json"):
            puts.append(key)
            return "lost"
        return None

    with proxy(s3, act) as options:
        small(f"s3://vectors/{name}", 2, options, overwrite=overwrite).finish()
    assert len(puts) == 1
    assert holds(f"s3://vectors/{name}", 2, s3) and keys(s3, name) == named(s3, name)


def test_what_cannot_be_deleted_after_publishing_is_told(
    s3: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The artifact is there, so it is no error; without a word nobody would know of the files."""
    small("s3://vectors/kept", 1, s3).finish()
    old = named(s3, "kept")
    silent = threading.Event()

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        if method == "PUT" and key.endswith("manifest.json"):
            silent.set()
        return "403" if silent.is_set() and (method == "DELETE" or "?delete" in key) else None

    with proxy(s3, act) as options, caplog.at_level(logging.WARNING, "lance_artifact"):
        small("s3://vectors/kept", 2, options, overwrite=True).finish()
    assert holds("s3://vectors/kept", 2, s3)
    told = [record for record in caplog.records if "a later overwrite" in record.getMessage()]
    assert [record.name for record in told] == ["lance_artifact"] and "s3://vectors/kept" in caplog.text
    left = set(keys(s3, "kept")) - set(named(s3, "kept"))
    assert left >= set(old) - {"kept/manifest.json"}
    small("s3://vectors/kept", 3, s3, overwrite=True).finish()
    assert holds("s3://vectors/kept", 3, s3)


def test_an_abort_does_not_destroy_what_was_published_unheard(s3: dict[str, str]) -> None:
    """The manifest was put, and from then on nobody answered: its files stay until it is known whether it is there."""
    silent = threading.Event()

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        if silent.is_set():
            return "500"
        if method == "PUT" and key.endswith("manifest.json"):
            silent.set()
            return "lost"
        return None

    with proxy(s3, act) as options:
        made = small("s3://vectors/unheard", 1, options)
        with pytest.raises(la.StorageError, match="not known whether"):
            made.finish()
        with pytest.raises(la.StorageError, match="files are kept"):
            made.abort()
        silent.clear()
        made.abort()
    assert holds("s3://vectors/unheard", 1, s3) and keys(s3, "unheard") == named(s3, "unheard")


def test_an_abort_that_could_not_delete_is_called_again(s3: dict[str, str]) -> None:
    refused = {"publish", "delete"}

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        what = "delete" if method == "DELETE" or "?delete" in key else method
        if method == "PUT" and key.endswith("manifest.json"):
            what = "publish"
        return "403" if what in refused else None

    with proxy(s3, act) as options:
        made = small("s3://vectors/refused", 1, options)
        with pytest.raises(la.StorageError):
            made.finish()
        with pytest.raises(la.StorageError, match=r"abort\(\) again"):
            made.abort()
        # Whose the files are stays written down, for as long as there are any.
        claims = [key for key in keys(s3, "refused") if "-claim" in key]
        assert len(claims) == 1 and len(keys(s3, "refused")) > 1
        refused.clear()
        with pytest.raises(la.InvalidInputError, match="aborted"):
            made.finish()
        made.abort()
        assert keys(s3, "refused") == []


def test_an_error_stays_the_one_where_nothing_can_be_removed_after_it(
    s3: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for a Ctrl-C, or for an error of the caller's own, does not get one of the store instead."""

    deletes = []

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        if method != "DELETE" and "?delete" not in key:
            return None
        deletes.append(key)
        return "403"

    def stop(step: Any) -> None:
        if (step.event, step.stage) == ("start", "shuffle"):
            raise KeyboardInterrupt("asked")

    ds = lance.write_dataset(
        pa.table({"vector": column(vectors(ROWS, DIM))}), "s3://vectors/asked.lance", storage_options=s3
    )
    model = la.train(ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=8, backend="cpu")

    def built(options: dict[str, str]) -> None:
        with pytest.raises(KeyboardInterrupt, match="asked") as raised:
            la.build_artifact(
                ds,
                "vector",
                model,
                "s3://vectors/asked",
                backend="cpu",
                storage_options=options,
                progress=stop,
            )
        assert "could not be removed" in raised.value.__notes__[0]

    def divided(options: dict[str, str]) -> None:
        with pytest.raises(ZeroDivisionError) as raised, small("s3://vectors/divided", 1, options):
            1 / 0  # noqa: B018
        assert "could not be removed" in raised.value.__notes__[0]
        # At the end of the block, and when the builder goes; a third try held the GIL, so that this process's other threads,
        # of which one answers here, stood still until the client gave up.
        assert len(deletes) == 2

    with proxy(s3, act) as options, caplog.at_level(logging.WARNING, "lance_artifact"):
        built(options)
        deletes.clear()
        divided(options)
    said = " ".join(r.getMessage() for r in caplog.records if "could not be removed" in r.getMessage())
    assert "before a KeyboardInterrupt" in said and "before a ZeroDivisionError" in said


def test_ctrl_c_while_a_block_is_tidied_up_after_is_raised(s3: dict[str, str]) -> None:
    """A loop that catches the block's own error and tries again would never end."""

    def act(method: str, key: str, _: dict[str, str]) -> str | None:
        if method != "DELETE" and "?delete" not in key:
            return None
        if asked.ident is None:
            asked.start()
        return "slow"

    asked = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with (
        proxy(s3, act) as options,
        pytest.raises(KeyboardInterrupt),
        small("s3://vectors/stopped", 1, options),
    ):
        1 / 0  # noqa: B018


@pytest.mark.parametrize("ignored", ["if-none-match", "if-match"])
def test_a_store_that_ignores_conditions_is_refused(ignored: str, s3: dict[str, str]) -> None:
    name = f"ignored-{ignored}"
    small(f"s3://vectors/{name}", 1, s3).finish()

    def act(method: str, _: str, headers: dict[str, str]) -> str | None:
        if method == "PUT":
            for header in [h for h in headers if h.lower() == ignored]:
                del headers[header]
        return None

    before = keys(s3, name)
    with proxy(s3, act) as options, pytest.raises(la.InvalidInputError, match="ignores"):
        small(f"s3://vectors/{name}", 2, options, overwrite=True)
    assert keys(s3, name) == before and holds(f"s3://vectors/{name}", 1, s3)


def test_a_store_with_conditions_switched_off_is_refused(s3: dict[str, str]) -> None:
    with pytest.raises(la.InvalidInputError, match="conditional writes"):
        small("s3://vectors/off", 1, {**s3, "aws_conditional_put": "disabled"})
    assert keys(s3, "off") == []


def test_targets_that_are_refused(s3: dict[str, str]) -> None:
    put = client(s3).put_object
    put(Bucket="vectors", Key="no/file.parquet", Body=b"mine")
    put(Bucket="vectors", Key="no/mixed/notes.txt", Body=b"mine")
    put(Bucket="vectors", Key="no/mixed/metadata2024.lance", Body=b"mine")
    lance.write_dataset(pa.table({"a": [1]}), "s3://vectors/no/data.lance", storage_options=s3)
    before = keys(s3, "no/")
    for name, message in (
        ("no/file.parquet", "is a file"),
        ("no/mixed", r"metadata2024\.lance, notes\.txt"),
        ("no/data.lance", "is a Lance dataset"),
        ("no", "data.lance/"),
        ("", "other things"),
    ):
        with pytest.raises(la.InvalidInputError, match=message):
            small(f"s3://vectors/{name}", 1, s3, overwrite=True)
    assert keys(s3, "no/") == before


def test_a_folder_made_in_a_console_is_empty(s3: dict[str, str]) -> None:
    for key in ("made/", "made/partitions/"):
        client(s3).put_object(Bucket="vectors", Key=key, Body=b"")
    small("s3://vectors/made", 1, s3).finish()
    assert holds("s3://vectors/made", 1, s3)


def test_a_pickle_keeps_the_true_uri(s3: dict[str, str]) -> None:
    uri = "s3://vectors/pickled?ddbTableName=t&token=to-ken"
    artifact = small(uri, 1, s3).finish()
    assert artifact.uri == "s3://vectors/pickled?ddbTableName=t&token=***"
    assert artifact.__reduce__()[1] == (uri, s3)
    assert pickle.loads(pickle.dumps(artifact)).num_rows == 100


def test_errors_name_the_place_and_keep_the_secret(s3: dict[str, str]) -> None:
    with pytest.raises(la.ArtifactNotFoundError, match="s3://vectors/nowhere"):
        la.Artifact.open("s3://vectors/nowhere", s3)
    wrong = {
        **s3,
        "aws_endpoint": "http://127.0.0.1:9",
        "client_max_retries": "0",
        "client_retry_timeout": "1",
    }
    with pytest.raises(la.StorageError, match="s3://vectors/a") as caught:
        la.Artifact.open("s3://vectors/a", wrong)
    assert "very-secret" not in str(caught.value)


def dataset_in(s3: dict[str, str], name: str) -> Any:
    table = pa.table({"id": pa.array(range(ROWS)), "vector": column(vectors(ROWS, DIM))})
    return lance.write_dataset(table, f"s3://vectors/{name}", storage_options=s3, max_rows_per_file=1000)


# The second is named in what the store says, and is no conflict for that.
@pytest.mark.parametrize("folder", ["manifest", "concurrent-conflict"])
@pytest.mark.parametrize("how", ["500", "lost", "late"])
def test_the_datasets_manifest_and_a_store_that_fails(how: str, folder: str, s3: dict[str, str]) -> None:
    """The put of the new version fails, happens and says that it failed, or happens after it said so."""
    name = f"{folder}-{how}.lance"
    dataset_in(s3, name)
    failing: list[str] = []

    def act(method: str, key: str, headers: dict[str, str]) -> str | None:
        if method == "PUT" and f"{name}/_versions/" in key and key.endswith(".manifest") and not failing:
            failing.append(key)
            return how
        return None

    with proxy(s3, act) as options:
        ds = lance.dataset(f"s3://vectors/{name}", storage_options=options)
        build = {
            "num_partitions": K,
            "num_sub_vectors": M,
            "sample_rate": 8,
            "max_iters": 2,
            "backend": "cpu",
        }
        if how == "lost":
            la.create_index(ds, "vector", **build)
        else:
            with pytest.raises(la.StorageError, match=r"not committed.*may still happen"):
                la.create_index(ds, "vector", **build)
    assert failing
    time.sleep(2 if how == "late" else 0)
    latest = lance.dataset(f"s3://vectors/{name}", storage_options=s3)
    indices = latest.describe_indices()
    assert len(indices) == (how != "500")
    # The files stay in each case, because a store may have taken what it did not answer.
    segments = {key.split("/")[2] for key in keys(s3, f"{name}/_indices")}
    assert len(segments) == 1 and segments >= {s.uuid for i in indices for s in i.segments}
    found = latest.to_table(nearest={"column": "vector", "q": vectors(ROWS, DIM)[7], "k": 1, "nprobes": K})
    assert found.num_rows == 1


def away_at_the_end(method: str, key: str, headers: dict[str, str]) -> str | None:
    """A store that takes all of an artifact but its manifest."""
    return "500" if method == "PUT" and key.endswith("manifest.json") else None


def model_of_dataset(s3: dict[str, str], name: str) -> tuple[Any, la.IvfPqModel]:
    ds = dataset_in(s3, name)
    return ds, la.train(
        ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=8, max_iters=2, backend="cpu"
    )


def test_a_store_that_is_away_for_minutes_costs_no_build(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of an encoded table cannot be put for longer than the builder itself tries."""
    from lance_artifact import _encode

    ds, model = model_of_dataset(s3, "away.lance")
    waits: list[float] = []
    monkeypatch.setattr(_encode, "wait", waits.append)
    act = lambda *request: away_at_the_end(*request) if not waits else None  # noqa: E731
    with proxy(s3, act) as options:
        artifact = la.build_artifact(
            ds, "vector", model, "s3://vectors/away-for-minutes", backend="cpu", storage_options=options
        )
    assert waits == [_encode.PATIENCE[0]]
    assert artifact.num_rows == ROWS and la.Artifact.open("s3://vectors/away-for-minutes", s3).verify().ok


def test_waiting_for_a_store_can_be_cancelled(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lance_artifact import _encode

    ds, model = model_of_dataset(s3, "away-cancelled.lance")
    monkeypatch.setattr(_encode, "PATIENCE", (3600,))
    with (
        proxy(s3, away_at_the_end) as options,
        la.cancel_on(lambda: "trying again in 3600 s" in caplog.text),
        pytest.raises(la.CancelledError),
    ):
        la.build_artifact(
            ds, "vector", model, "s3://vectors/away-cancelled", backend="cpu", storage_options=options
        )
    assert keys(s3, "away-cancelled/") == []


def test_a_run_lives_in_the_store(s3: dict[str, str]) -> None:
    array = vectors(3000, 16)
    ds = lance.write_dataset(
        pa.table({"vector": column(array)}),
        f"s3://{BUCKET}/runs.lance",
        storage_options=s3,
        max_rows_per_file=1000,
    )
    ask: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4, "max_iters": 3, "backend": "cpu"}
    place = f"s3://{BUCKET}/runs/one"
    # The store's options are the dataset's own.
    la.create_index(ds, "vector", artifact_uri=place, resume=True, num_shards=3, **ask)
    run = la.Run.open(place, storage_options=s3, dataset_storage_options=s3)
    status = run.status()
    assert status.shards == (True,) * 3 and status.committed is not None
    version = ds.version
    assert la.resume_run(place, storage_options=s3, dataset_storage_options=s3).version == version
    ds = lance.write_dataset(
        pa.table({"vector": column(array[:100])}), ds.uri, mode="append", storage_options=s3
    )
    assert la.extend_index(ds, "vector_idx").num_rows == 100
    merged = la.merge_segments(ds, "vector_idx")
    assert (merged.num_segments, merged.num_rows) == (1, 3100)
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    assert la.clean_run(place, everything=True, storage_options=s3, dataset_storage_options=s3)
    with pytest.raises(la.ArtifactNotFoundError):
        la.Run.open(place, storage_options=s3)


def test_who_may_not_list_uploads_builds_and_cleans_all_the_same(
    s3: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = lance.write_dataset(
        pa.table({"vector": column(vectors(3000, 16))}), str(tmp_path / "t"), max_rows_per_file=1000
    )
    ask: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4, "max_iters": 3, "backend": "cpu"}
    refused: list[str] = []

    def act(method: str, key: str, headers: dict[str, str]) -> str | None:
        if method == "GET" and "uploads" in key.partition("?")[2]:
            refused.append(key)
            return "403"
        return None

    with proxy(s3, act) as options, caplog.at_level(logging.WARNING, "lance_artifact"):
        place = f"s3://{BUCKET}/unlisted/run"
        more = {"artifact_uri": place, "resume": True, "storage_options": options}
        la.create_index(ds, "vector", keep_artifact=False, **more, **ask)
        assert refused and "the store does not list them" in caplog.text
        assert keys(s3, "unlisted/") == []
        ds.checkout_latest()
        assert [index.name for index in ds.describe_indices()] == ["vector_idx"]
        la.create_index(ds, "vector", replace=True, **more, **ask)
        assert la.clean_run(place, ds, everything=True, storage_options=options)
        assert keys(s3, "unlisted/") == []


def test_uploads_that_were_never_completed_are_ended(s3: dict[str, str], tmp_path: Path) -> None:
    ds = lance.write_dataset(
        pa.table({"vector": column(vectors(3000, 16))}), str(tmp_path / "t"), max_rows_per_file=1000
    )
    place = f"s3://{BUCKET}/uploads/run"
    run = la.Run.create(
        la.plan(ds, "vector", num_partitions=4, num_sub_vectors=4, num_shards=3, backend="cpu"),
        place,
        storage_options=s3,
    )
    run.train(backend="cpu")
    run.encode(1, backend="cpu")
    store = client(s3)
    mine = [f"uploads/run/shards/{shard:05}/partitions/bucket-00000.lance" for shard in (0, 1)]
    others = ["uploads/run2/shards/00000/partitions/bucket-00000.lance", "uploads/run/thesis"]
    for key in (*mine, *others):
        store.create_multipart_upload(Bucket=BUCKET, Key=key)

    def there() -> set[str]:
        return {
            u["Key"]
            for u in store.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
            if "uploads/" in u["Key"]
        }

    listed = la.clean_run(place, ds, dry_run=True, storage_options=s3)
    assert [each.uri for each in listed if each.kind == "upload"] == [f"s3://{BUCKET}/{key}" for key in mine]
    assert there() == {*mine, *others}
    # Where a process is at work, nothing is ended.
    with la.PartitionArtifactBuilder(run.shard_uri(0), run.model(), storage_options=s3) as builder:
        found = la.clean_run(place, ds, storage_options=s3)
        assert [each.uri for each in found] == [f"s3://{BUCKET}/{mine[1]}"]
        builder.abort()
    la.clean_run(place, ds, storage_options=s3)
    assert there() == set(others)
    for key in others:
        for upload in store.list_multipart_uploads(Bucket=BUCKET, Prefix=key).get("Uploads", ()):
            store.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload["UploadId"])
