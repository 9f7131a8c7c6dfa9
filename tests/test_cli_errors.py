"""The command line: what cannot end well is known before any work, and a commit that is done is never a traceback."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, command_line, leftovers, vectors
from lance_artifact import _create_index, cli

K, M, DIM, ROWS = 4, 4, 16, 2000
TRAINING = command_line(num_partitions=K, num_sub_vectors=M, sample_rate=8, max_iters=2, backend="cpu")


@pytest.fixture
def ds(tmp_path: Path) -> Any:
    array = column(vectors(ROWS, DIM))
    nested = pa.StructArray.from_arrays([array], ["Inner"])
    return lance.write_dataset(
        pa.table({"UPPER": array, "Outer": nested, "with space": array}), str(tmp_path / "d.lance")
    )


@pytest.fixture
def artifact(ds: Any, tmp_path: Path) -> la.Artifact:
    model = la.train(
        ds, "UPPER", num_partitions=K, num_sub_vectors=M, sample_rate=8, max_iters=2, backend="cpu"
    )
    return la.build_artifact(ds, "UPPER", model, tmp_path / "a", backend="cpu")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = cli.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("said", "index"),
    [
        ("upper", "UPPER_idx"),
        ("UPPER", "UPPER_idx"),
        ("outer.inner", "Outer.Inner_idx"),
        ("Outer.Inner", "Outer.Inner_idx"),
        ("with space", "with space_idx"),
    ],
)
def test_a_column_in_any_spelling(said: str, index: str, ds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, "build", ds.uri, said, *TRAINING)
    assert (code, result["index"], result["rows"], result["index_type"]) == (0, index, ROWS, "IVF_PQ")
    assert cli.main(["build", ds.uri, said, *TRAINING, "--name", "Other"]) == 0
    assert f"index Other (IVF_PQ) over {ROWS:,} rows" in capsys.readouterr().out


def test_finalizing_a_column_in_another_spelling(
    ds: Any, artifact: la.Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "finalize", ds.uri, "upper", artifact.uri)
    assert (code, result["index"], result["rows"]) == (0, "UPPER_idx", ROWS)


def test_a_commit_that_is_done_is_no_error(
    ds: Any, artifact: la.Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing can be said about it any more."""
    finalize = la.finalize

    def commit_and_break(*arguments: Any, **options: Any) -> Any:
        done = finalize(*arguments, **options)
        monkeypatch.setattr(lance.LanceDataset, "describe_indices", lambda self: 1 / 0)
        return done

    monkeypatch.setattr(la, "finalize", commit_and_break)
    code, result = run(capsys, "finalize", ds.uri, "UPPER", artifact.uri)
    monkeypatch.undo()
    assert (code, result["index"], result["rows"]) == (0, "UPPER_idx", None)
    assert [i.name for i in lance.dataset(ds.uri).describe_indices()] == ["UPPER_idx"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.xyz", "endings"),
        ("x", "endings"),
        ("folder.png", "is a folder"),
        ("nowhere/x.png", "no folder"),
        ("closed/x.png", "written"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused_first(
    name: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First: there is not even an artifact."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "closed").mkdir()
    # Root may write everywhere.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))
    code, result = run(capsys, "inspect", str(tmp_path / "none"), "--plot", str(tmp_path / name))
    assert code == 2 and message in result["message"], result
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_while_drawing(
    artifact: la.Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "x.png").symlink_to("/dev/full")
    code, result = run(capsys, "inspect", artifact.uri, "--plot", str(tmp_path / "x.png"))
    assert code == 10 and "x.png" in result["message"]


def test_an_artifact_only_is_checked_before_training(
    ds: Any,
    artifact: la.Artifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(la, "train", None)
    build = ["build", ds.uri, "UPPER", *TRAINING, "--artifact-only"]
    cases = {
        (4, "artifact"): ["--artifact", artifact.uri],
        (2, "memory_limit"): ["--artifact", str(tmp_path / "b"), "--memory-limit", "1000"],
        (2, "--artifact URI"): [],
        (2, "--name"): ["--artifact", str(tmp_path / "b"), "--name", "x"],
        (2, "--replace"): ["--artifact", str(tmp_path / "b"), "--replace"],
        (2, "--index-type"): ["--artifact", str(tmp_path / "b"), "--index-type", "IVF_HNSW_PQ"],
    }
    for (expected, message), arguments in cases.items():
        code, result = run(capsys, *build, *arguments)
        assert code == expected and message in result["message"], result
    assert leftovers(tmp_path / "b") == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["--num-partitions", "99999999999999999999"], ["--num-partitions", "-1"], ["--seed", "-1"], ["--max-iters", "0"], ["--sample-rate", "99999999999999999999"],
        ["--fragment", "-1"], ["--fragment", "99999999999"], ["--devices", "99999999999"], ["--memory-limit", "-5"], ["--name", ""], ["--name", "a\0b"], ["--name", "a\udcffb"],
        ["--artifact", ""], ["--artifact", "a\udcffb"], ["--storage-option", "a"], ["--storage-option", "=b"], ["--num-bits", "4", "--num-sub-vectors", "3"],
    ],
)  # fmt: skip
def test_arguments_out_of_range(
    wrong: list[str], ds: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_create_index, "build_artifact", None)
    code, result = run(capsys, "build", ds.uri, "UPPER", *TRAINING, *wrong)
    assert code == 2, result
    assert lance.dataset(ds.uri).version == 1


def test_a_part_of_an_index_is_not_replaced_after_training(
    ds: Any, artifact: la.Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of two fragments cannot be replaced by one of the first: known before anything is read."""
    lance.write_dataset(ds.to_table(), ds.uri, mode="append")
    assert run(capsys, "build", ds.uri, "UPPER", *TRAINING)[0] == 0
    before = lance.dataset(ds.uri).version
    monkeypatch.setattr(_create_index, "train_handle", None)
    code, result = run(capsys, "build", ds.uri, "UPPER", *TRAINING, "--fragment", "0", "--replace")
    assert code in (2, 9) and "fragment" in result["message"], result
    assert lance.dataset(ds.uri).version == before


def test_the_fragments_of_an_artifact_that_does_not_say_them(
    ds: Any, artifact: la.Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = artifact.model
    assert model is not None
    bare = str(tmp_path / "bare")
    scan = la.prepared_vectors(ds, "UPPER", metric=model.metric)
    encoder = la.CpuEncoder(model)
    with la.PartitionArtifactBuilder(bare, model) as builder:
        for batch in scan:
            part_id, pq_code = encoder.encode(batch["vector"])
            columns = {"row_id": batch["_rowid"], "part_id": part_id, "pq_code": pq_code}
            builder.append_batch(pa.table(columns))
        builder.finish(rows_dropped=scan.dropped)
    code, result = run(capsys, "finalize", ds.uri, "UPPER", bare)
    assert code in (2, 6) and "fragment_ids" in result["message"]
    fragments = [text for f in ds.get_fragments() for text in ("--fragment", str(f.fragment_id))]
    code, result = run(capsys, "finalize", ds.uri, "UPPER", bare, *fragments)
    assert (code, result["rows"]) == (0, ROWS), result


@pytest.mark.parametrize("place", ["in the dataset", "too little memory"])
def test_an_artifact_that_cannot_be_written_is_known_before_training(
    place: str, ds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(la, "train", None)
    where = f"{ds.uri}/a" if place == "in the dataset" else str(tmp_path / "a")
    wrong = ["--memory-limit", "1000"] if place == "too little memory" else []
    code, result = run(
        capsys, "build", ds.uri, "UPPER", *TRAINING, "--artifact", where, "--artifact-only", *wrong
    )
    assert code == 2, result


def test_a_picture_that_needs_latex(
    artifact: la.Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    code, result = run(capsys, "inspect", artifact.uri, "--plot", str(tmp_path / "x.pgf"))
    assert code == 2 and "endings" in result["message"]


# Options as people write them


def test_options_as_people_write_them(ds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = command_line(num_partitions=K, num_sub_vectors=M, sample_rate=8, max_iters=2, backend="cpu")
    code, result = run(
        capsys, "build", ds.uri, "UPPER", *shape, "--metric", "COSINE", "--memory-limit", "1GiB", "--index-type", "IVF_HNSW_PQ",
        "-m", "8", "--ef", "40", "--max-level", "5", "--artifact", str(tmp_path / "kept"),
    )  # fmt: skip
    assert code == 0, result
    assert (result["metric"], result["num_partitions"], result["num_sub_vectors"], result["num_bits"]) == (
        "cosine",
        K,
        M,
        8,
    )
    assert (result["backend"], result["segments"], result["rows"]) == ("cpu", 1, ROWS)
    assert result["rows_dropped"] == {"null": 0, "non_finite": 0, "zero_norm": 0}
    assert {"train", "encode", "build", "total"} == result["seconds"].keys() and result[
        "peak_memory"
    ] > 1 << 20
    details = lance.dataset(ds.uri).describe_indices()[0].details["hnsw"]
    assert (details["max_connections"], details["construction_ef"], details["max_level"]) == (8, 40, 5)
    only = [
        "build",
        ds.uri,
        "UPPER",
        *shape,
        "--artifact-only",
        "--artifact",
        str(tmp_path / "a"),
        "--num-buckets",
        "2",
    ]
    assert run(capsys, *only)[0] == 0
    assert run(capsys, *only)[0] == 4
    code, result = run(capsys, *only, "--overwrite")
    assert code == 0 and la.Artifact.open(tmp_path / "a").verify().num_files == 2
    assert run(capsys, "build", ds.uri, "UPPER", *shape, "--overwrite")[0] == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1024", 1024),
        ("1KiB", 1024),
        ("1.5 GiB", 3 << 29),
        ("2g", 2 * 10**9),
        ("512MB", 512 * 10**6),
        ("-5", -5),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    from lance_artifact.cli._options import Bytes

    assert Bytes().convert(text, None, None) == expected


@pytest.mark.parametrize(
    "wrong",
    [["--memory-limit", "much"], ["--memory-limit", "1XB"], ["--devices", "a"], ["--metric", "hamming"], ["--nothing"], ["--num-partitions", "many"]],
)  # fmt: skip
def test_wrong_options_are_errors_like_others(
    wrong: list[str], ds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "build", ds.uri, "UPPER", *wrong)
    assert code == 2 and result["message"], result
    assert cli.main(["build", ds.uri]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Usage: lance-artifact build" in err and "COLUMN" in err
    assert cli.main(["buidl"]) == 2 and "No such command" in capsys.readouterr().err


def test_no_traceback(ds: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a defect, unless it is asked for."""
    monkeypatch.setattr(_create_index, "build_artifact", None)
    assert cli.main(["build", ds.uri, "UPPER", *TRAINING]) == 1
    _, err = capsys.readouterr()
    assert "This is a defect" in err and "Traceback" not in err
    assert cli.main(["build", ds.uri, "UPPER", *TRAINING, "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from lance.progress import IndexProgress

    from lance_artifact.cli._told import Lines

    tell = Lines(every=0.0)
    tell(IndexProgress("start", "shuffle", 0, 1_000_000, "rows"))
    time.sleep(0.1)
    tell(IndexProgress("progress", "shuffle", 250_000, 1_000_000, "rows"))
    tell(IndexProgress("complete", "shuffle", 1_000_000, 1_000_000, "rows"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("shuffle: 0 of 1,000,000 rows")
    found = re.fullmatch(r"shuffle: 250,000 of 1,000,000 rows, ([0-9,]+)/s, ([0-9,]+) s left", lines[1])
    assert found and int(found[1].replace(",", "")) < 2_500_001
    quiet = Lines()
    quiet(IndexProgress("start", "shuffle", 0, 10, "rows"))
    quiet(IndexProgress("progress", "shuffle", 5, 10, "rows"))
    assert capsys.readouterr().err == ""


def test_verbose_says_the_stages(ds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", ds.uri, "UPPER", *TRAINING, "-v"]) == 0
    out, err = capsys.readouterr()
    assert "trained 4 partitions in" in err and "committed index" in err and "lance_index" not in err
    assert (
        "backend cpu; train" in out
        and "rows dropped: none" in out
        and "4 partitions, 4 sub-vectors of 8 bits, 1 segment\n" in out
    )
    assert cli.main(["build", ds.uri, "UPPER", *TRAINING, "--replace", "-vv"]) == 0
    assert "write_batch" in capsys.readouterr().err
    assert cli.main(["build", ds.uri, "UPPER", *TRAINING, "--replace"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["completion", shell]) == 0
    assert "_LANCE_ARTIFACT_COMPLETE" in capsys.readouterr().out


def test_help_says_defaults_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    from lance_artifact.cli._app import app

    for name in app.commands:
        assert cli.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        for code in {code for _, code in cli.EXIT_CODES}:
            assert re.search(rf"\b{code} ", text), (name, code)
    assert cli.main([]) in (0, 2)
    assert cli.main(["--version"]) == 0
    assert la.__version__ in capsys.readouterr().out
