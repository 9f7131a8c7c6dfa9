"""The files of a run, and how far one is."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from . import _lance_artifact as core
from ._lance_artifact import IvfPqModel
from .exceptions import CorruptArtifactError

if TYPE_CHECKING:
    from ._plan import BuildPlan

FORMAT, FORMAT_VERSION = "lance-artifact-run", 1
PLAN, MODEL, COMMITTED, SHARDS = "plan.json", "model.arrow", "committed.json", "shards"
# In the index details, by which a commit that happened is recognised.
HINT = "lance_artifact.run"


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes
    ----------
    uri : str
        Without credentials.
    is_trained : bool
    shards : tuple of bool
        Which are published.
    rows_done, rows_left : int
    rows_per_second : float or None
        Since the model was published, over all processes. None before the first shard.
    committed : mapping or None
        ``segment`` and ``version`` of its commit.
    """

    uri: str
    plan: BuildPlan
    is_trained: bool
    shards: tuple[bool, ...]
    rows_done: int
    rows_left: int
    rows_per_second: float | None
    committed: Mapping[str, Any] | None

    def __str__(self) -> str:
        done = sum(self.shards)
        lines = [
            f"{self.uri}: index {self.plan.name!r} of {self.plan.dataset_uri} version {self.plan.version}, column {self.plan.column}",
            f"  model: {'trained' if self.is_trained else 'not yet'}",
            f"  shards: {done:,} of {len(self.shards):,}, {self.rows_done:,} rows done, {self.rows_left:,} left",
        ]
        if self.rows_per_second:
            lines.append(
                f"  {self.rows_per_second:,.0f} rows a second, about {self.rows_left / self.rows_per_second:,.0f} s left"
            )
        where = (
            f"segment {self.committed['segment']} at version {self.committed['version']}"
            if self.committed
            else "not yet"
        )
        return "\n".join([*lines, f"  committed: {where}"])


def is_run(uri: str, storage_options: Any) -> bool:
    """Whether a run is there."""
    return core.read_file(uri, PLAN, storage_options) is not None


def read_plan(content: bytes, where: str) -> tuple[str, str]:
    """The plan, as text, and the id of a run.

    Raises
    ------
    CorruptArtifactError
    """
    try:
        said = json.loads(content)
        kind, version, run_id = said["format"], said["format_version"], str(said["run_id"])
        plan = json.dumps(said["plan"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifactError(f"{where}: {PLAN} cannot be read: {error!r}") from error
    if (kind, version) != (FORMAT, FORMAT_VERSION):
        raise CorruptArtifactError(
            f"{where}: {PLAN} is of format {kind!r} version {version}, expected {FORMAT!r} version {FORMAT_VERSION}"
        )
    return plan, run_id


def read_committed(content: bytes, where: str) -> dict[str, Any]:
    """``segment`` and ``version`` of a commit.

    Raises
    ------
    CorruptArtifactError
    """
    try:
        said = json.loads(content)
        return {**said, "segment": str(said["segment"]), "version": int(said["version"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifactError(f"{where}: {COMMITTED} cannot be read: {error!r}") from error


def written_model(model: IvfPqModel) -> bytes:
    schema = pa.schema(
        [
            ("ivf_centroids", pa.list_(model.ivf_centroids.type)),
            ("pq_codebook", pa.list_(model.pq_codebook.type)),
        ],
        metadata={
            "metric": model.metric,
            "num_sub_vectors": str(model.num_sub_vectors),
            "fingerprint": model.fingerprint,
            "training": json.dumps(model.training),
        },
    )
    columns = [
        pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
        for values in (model.ivf_centroids, model.pq_codebook)
    ]
    batch = pa.record_batch([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def read_model(content: bytes, where: str) -> IvfPqModel:
    try:
        with pa.ipc.open_file(pa.py_buffer(content)) as reader:
            batch = reader.get_batch(0)
            # Arrow takes the offsets of a list as they are: a hostile one would be read beyond the end of its values.
            batch.validate(full=True)
            said = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
        centroids, codebook = (batch.column(i).flatten() for i in range(2))
        model = IvfPqModel(centroids, codebook, said["metric"], num_sub_vectors=int(said["num_sub_vectors"]))
        training = json.loads(said["training"])
    except (pa.ArrowException, KeyError, ValueError, IndexError, OSError, RecursionError) as error:
        raise CorruptArtifactError(f"{where}: no model can be read: {error}") from error
    if model.fingerprint != said["fingerprint"]:
        raise CorruptArtifactError(
            f"{where}: the model has fingerprint {model.fingerprint}, the file says {said['fingerprint']}"
        )
    return model.with_training(**training) if training else model
