"""What a soak left: the table against the log of all processes, the index row by row, and no file that nobody names."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from lance.file import LanceFileReader

import lance_artifact as la
from local_s3 import BUCKET, client
from soak_table import DIM, NAME, Kind, Rows, check_version, expect, has_vector, read, segments

Entry = dict[str, Any]


def entries(logs: Path) -> list[Entry]:
    """All that was logged, in the order of time."""
    found = [
        json.loads(line)
        for path in sorted(logs.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(found, key=lambda entry: entry["at"])


def shown(entry: Entry) -> str:
    """A line of a log for people."""
    clock = datetime.datetime.fromtimestamp(entry["at"]).strftime("%H:%M:%S.%f")[:-3]
    rest = {k: v for k, v in entry.items() if k not in ("at", "role", "step", "op", "outcome", "trace", "content", "begins")}  # fmt: skip
    about = "begins" if entry.get("begins") else f"{entry.get('op')} {entry.get('outcome')}"
    return f"{clock} {entry['role']:<8} {entry['step']:>5} {about} {str(rest)[:400]}"


def replayed(log: Iterable[Entry]) -> dict[int, int]:
    """The rows that the commits in a log leave, id to generation, each commit applied to what the ones before it left.

    Raises
    ------
    SoakError
        Two commits made one version, or one counts other rows than were there for it.
    """
    commits = [e for e in log if "version" in e and e.get("content", True)]
    rows: dict[int, int] = {}
    made: dict[int, Entry] = {}
    for entry in sorted(commits, key=lambda e: e["version"]):
        ids = range(*entry["range"]) if "range" in entry else entry["ids"]
        there = [i for i in ids if i in rows]
        op, version = entry["op"], entry["version"]
        if op == "append":
            expect(not there, f"version {version} appends rows that are there: {there[:8]}")
            rows.update(dict.fromkeys(ids, 0))
        elif op == "delete":
            for i in there:
                del rows[i]
        elif op == "upsert":
            rows.update(dict.fromkeys(ids, entry["generation"]))
            there = list(ids)
        elif op in ("update", "rewrite"):
            rows.update(dict.fromkeys(there, entry["generation"]))
        if "rows" in entry:
            expect(
                entry["rows"] == len(there),
                f"version {version}, {op} of {entry['role']}: Lance counts {entry['rows']} rows, the log of all processes {len(there)}",
            )
        if op == "append" or there:
            other = made.setdefault(version, entry)
            expect(other is entry, f"version {version} was made by {shown(other)} and by {shown(entry)}")
    return rows


def compare(rows: Rows, expected: dict[int, int]) -> None:
    """The table's rows are those of the log, in the generation that was written last."""
    there = dict(zip(rows.ids.tolist(), rows.generations.tolist(), strict=True))
    lost, strange = sorted(expected.keys() - there.keys()), sorted(there.keys() - expected.keys())
    expect(not lost, f"{len(lost)} rows of {len(expected)} that were committed are not there: {lost[:8]}")
    expect(not strange, f"{len(strange)} rows are there that were deleted, or never committed: {strange[:8]}")
    old = [i for i, generation in expected.items() if there[i] != generation]
    expect(
        not old,
        f"{len(old)} rows are of another generation than was committed last: {[(i, there[i], expected[i]) for i in old[:8]]}",
    )


def put_together(ds: Any, kind: Kind) -> dict[str, Any]:
    """Index what is not indexed, merge all segments, and compare each row's code with the encoder's.

    Returns
    -------
    dict
        What was found.
    """
    query = np.random.default_rng(kind.seed).standard_normal(DIM).astype(np.float32)
    before = check_version(ds, kind, query)
    la.extend_index(ds, NAME, backend="cpu", measure_fit=False)
    merge = la.merge_segments(ds, NAME)
    after = check_version(ds, kind, query)
    expect(
        (after["segments"], after["indexed"]) == (1, after["rows"]),
        f"extended and merged the index is {after}",
    )
    rows = read(ds, kind)
    without = int((~rows.usable).sum())
    expect(
        (merge.num_rows, merge.rows_missing) == (after["rows"] - without, without),
        f"the merged segment has {merge.num_rows} rows and misses {merge.rows_missing}; {after['rows']} are live, {without} without a vector",
    )
    differ = codes_that_differ(ds, kind)
    expect(
        not differ,
        f"{len(differ)} rows have other codes than the model of the index gives them: {differ[:8]}",
    )
    return {"before": before, "after": after, "codes_compared": int(rows.usable.sum())}


def codes_that_differ(ds: Any, kind: Kind) -> list[int]:
    """Row ids of an index of one segment whose partition or code is not what the model gives their vectors.

    Of dot only partitions are compared: stock's ``optimize_indices`` picks other codewords than its ``create_index``.
    """
    (uuid,) = segments(ds)
    options = ds.latest_storage_options()
    file = LanceFileReader(f"{ds.uri}/_indices/{uuid}/auxiliary.idx", storage_options=options or None)
    stored = file.read_all().to_table()
    sizes = [p["size"] for s in ds.stats.index_stats(NAME)["indices"] for p in s["partitions"]]
    codes = stored["__pq_code"].combine_chunks().flatten().to_numpy()
    width, ends = len(codes) // max(1, stored.num_rows), np.cumsum([0, *sizes])
    # Codes of a partition are stored byte by byte.
    blocks = [codes[a * width : b * width].reshape(width, b - a).T for a, b in itertools.pairwise(ends)]
    found = dict(zip(stored["_rowid"].to_pylist(), map(bytes, np.concatenate(blocks)), strict=True))
    partition = dict(
        zip(stored["_rowid"].to_pylist(), np.repeat(np.arange(len(sizes)), sizes).tolist(), strict=True)
    )
    expect(len(found) == stored.num_rows, "a row id is stored twice")
    encoder, differ, seen = la.CpuEncoder(la.IvfPqModel.from_index(ds, NAME)), [], 0
    for batch in la.prepared_vectors(ds, "vector", metric=kind.metric):
        part_id, pq_code = encoder.encode(batch["vector"])
        seen += batch.num_rows
        differ += [
            i
            for i, part, code in zip(
                batch["_rowid"].to_pylist(), part_id.to_pylist(), pq_code.to_pylist(), strict=True
            )
            if partition.get(i) != part or (found.get(i) != bytes(code) and kind.metric != "dot")
        ]
    expect(seen == len(found), f"the segment has {len(found)} rows, {seen} are to be in it")
    return differ


# -- files


def clean(ds: Any, work: str, options: dict[str, str]) -> None:
    """All cleaning up that there is, of Lance and of ours, when nobody works on the table any more."""
    time.sleep(0.01)
    ds.cleanup_old_versions(datetime.timedelta(milliseconds=1), delete_unverified=True)
    for run in sorted({name.split("/")[1] for name in listed(work, options) if name.startswith("runs/")}):
        la.clean_run(f"{work}/runs/{run}", ds, everything=True, storage_options=options or None)


def written(uri: str, options: dict[str, str]) -> dict[str, float]:
    """Every file below a folder, by its path there, and when it was last written."""
    if not options:
        root = Path(uri)
        files = [p for p in root.rglob("*") if not p.is_dir()] if root.exists() else []
        return {str(p.relative_to(root)): p.lstat().st_mtime for p in files}
    prefix = urlsplit(uri).path.strip("/") + "/"
    pages = client(options).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    objects = [each for page in pages for each in page.get("Contents", ())]
    return {each["Key"].removeprefix(prefix): each["LastModified"].timestamp() for each in objects}


def listed(uri: str, options: dict[str, str]) -> list[str]:
    """Every file below a folder, by its path there."""
    return sorted(written(uri, options))


def may_leave(log: list[Entry]) -> list[tuple[float, float, str]]:
    """The steps, from when to when, that may have left index segments which no version names, and whose they are.

    Our builds remove theirs after a conflict, and where a version was made and undone its segment goes with that version. Two kinds of
    steps leave theirs: those of which nobody knows whether the commit still comes, which say so, and stock pylance's own: it leaves what its
    `optimize_indices`, and its `compact_files` where row ids are addresses, has written before a conflict.
    """
    begun: dict[tuple[str, int], float] = {}
    found = []
    for entry in log:
        step = (entry["role"], entry["step"])
        if entry.get("begins"):
            begun[step] = entry["at"]
        elif step in begun:
            error = entry.get("error", "")
            ours = any(
                error.startswith(f"{kind.__name__}:") for kind in (la.CommitConflictError, la.StorageError)
            )
            theirs = entry["role"] in ("optimize", "keep") and not ours and entry["outcome"] != "committed"
            unknown = "the files of the segment stay" in error
            if theirs or unknown:
                found.append((begun[step], entry["at"], entry["role"] if theirs else "unknown"))
    return found


def before_cleaning(ds: Any, log: list[Entry], work: str, options: dict[str, str]) -> dict[str, int]:
    """What the steps left by themselves: index segments that no version names, and files of runs.

    Returns
    -------
    dict
        How many there are; those of segments that may be, by whose they are.

    Raises
    ------
    SoakError
        There is one that no step may have left.
    """
    runs = [name for name in listed(work, options) if name.startswith("runs/")]
    # Each step removes its own, whatever comes of it.
    expect(not runs, f"files of runs are left: {runs[:12]}")
    names = {name.split("/")[1] for name in named(ds) if name.startswith("_indices/")}
    last: dict[str, float] = {}
    for name, at in written(f"{ds.uri}/_indices", options).items():
        uuid = name.split("/")[0]
        last[uuid] = max(at, last.get(uuid, 0.0))
    steps, used, found = may_leave(log), set(), {"runs": 0, "segments": 0}
    # A store says when in whole seconds.
    slack = 1.0 if options else 0.05
    for uuid, at in sorted(last.items(), key=lambda one: one[1]):
        if uuid in names:
            continue
        within = [
            step
            for step in steps
            # One segment for a step, but for compactions, which write all anew.
            if step[0] - slack <= at <= step[1] + slack and (step[2] == "keep" or step not in used)
        ]
        expect(
            bool(within), f"the index segment {uuid} is left, which no version names and no step may leave"
        )
        used.add(within[0])
        found["segments"] += 1
        found[f"segments of {within[0][2]}"] = found.get(f"segments of {within[0][2]}", 0) + 1
    return found


def named(ds: Any) -> set[str]:
    """The files and folders that the versions of a dataset name."""
    names = set()
    for version in ds.versions():
        at = ds.checkout_version(version["version"])
        for fragment in at.get_fragments():
            metadata = fragment.metadata
            names |= {f"data/{file.path}" for file in metadata.files}
            if metadata.deletion_file is not None:
                names.add(metadata.deletion_file.path(fragment.fragment_id))
        names |= {f"_indices/{s.uuid}" for i in at.describe_indices() for s in i.segments}
    return names


def left_over(ds: Any, uri: str, options: dict[str, str]) -> list[str]:
    """Files of a dataset that no version names."""
    names, versions = named(ds), len(ds.versions())
    files = listed(uri, options)
    strange = [
        name
        for name in files
        if name.split("/")[0] not in ("_versions", "_transactions")
        and name not in names
        and "/".join(name.split("/")[:2]) not in names
    ]
    for kind in ("_versions", "_transactions"):
        there = [
            name
            for name in files
            if name.startswith(f"{kind}/") and name != "_versions/latest_version_hint.json"
        ]
        strange += there if len(there) > versions else []
    return strange


def open_uploads(options: dict[str, str]) -> list[str]:
    if not options:
        return []
    return [
        upload["Key"] for upload in client(options).list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
    ]


def artifact_left(work: str, options: dict[str, str]) -> list[str]:
    """Files beside the one artifact of a soak that its manifest does not name."""
    place = f"{work}/artifact"
    files = listed(place, options)
    if not files:
        return []
    manifest = la.Artifact.open(place, options or None).manifest
    ours = {"manifest.json", manifest.get("metadata_file", "metadata.lance"), *manifest["files"]}
    return [name for name in files if name not in ours]


def judge(
    ds: Any, kind: Kind, log: list[Entry], work: str, options: dict[str, str], temporary: Path
) -> dict[str, Any]:
    """All of it.

    Raises
    ------
    SoakError
        Something is not as it should be.
    """
    left_by_steps = before_cleaning(ds, log, work, options)
    expected = replayed(log)
    compare(read(ds, kind), expected)
    index = put_together(ds, kind)
    compare(read(ds, kind), expected)
    clean(ds, work, options)
    ds.checkout_latest()
    left = left_over(ds, str(ds.uri), options)
    expect(not left, f"{len(left)} files of the dataset are left that no version names: {left[:12]}")
    runs = [name for name in listed(work, options) if name.startswith("runs/")]
    expect(not runs, f"files of runs are left: {runs[:12]}")
    beside = artifact_left(work, options)
    expect(not beside, f"files are left beside the artifact: {beside[:12]}")
    uploads = open_uploads(options)
    expect(not uploads, f"uploads are left open: {uploads[:12]}")
    files = listed(str(temporary), {})
    expect(not files, f"temporary files are left: {files[:12]}")
    check_version(ds, kind, np.ones(DIM, np.float32))
    usable = int(has_vector(np.array(list(expected))).sum())
    return {
        "rows": len(expected), "usable": usable, "version": int(ds.version), "index": index, "before_cleaning": left_by_steps,
    }  # fmt: skip
