"""A double of the package pylance-cuvs: the signatures of its published wheels, and the artifacts of releases to come.

Held to the wheel by tests/test_doubles.py. It trains and encodes on the CPU, and writes the manifest's required keys only.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import lance

import lance_artifact as la

CALLS = []


class IvfPqTrainingOutput:
    def __init__(self, model):
        self._model = model
        self.num_partitions, self.num_sub_vectors, self.num_bits = (
            model.num_partitions,
            model.num_sub_vectors,
            model.num_bits,
        )
        self.metric_type = {"l2": "L2", "cosine": "Cosine"}[model.metric]

    def ivf_centroids(self):
        return self._model.ivf_centroids

    def pq_codebook(self):
        return self._model.pq_codebook


class IvfPqArtifactOutput:
    def __init__(self, artifact_uri, files):
        self.artifact_uri, self.files = artifact_uri, files


def train_ivf_pq(
    dataset_uri: str | os.PathLike[str],
    column: str,
    *,
    metric_type: str = "L2",
    num_partitions: int,
    num_sub_vectors: int,
    sample_rate: int = 256,
    max_iters: int = 50,
    num_bits: int = 8,
    filter_nan: bool = True,
) -> IvfPqTrainingOutput:
    given = dict(locals())
    CALLS.append(("train_ivf_pq", (given.pop("dataset_uri"), given.pop("column")), given))
    model = la.train(
        lance.dataset(dataset_uri), column, metric=metric_type.lower(), num_partitions=num_partitions,
        num_sub_vectors=num_sub_vectors, sample_rate=sample_rate, max_iters=max_iters, num_bits=num_bits, backend="cpu",
    )  # fmt: skip
    return IvfPqTrainingOutput(model)


def build_ivf_pq_artifact(
    dataset_uri: str | os.PathLike[str],
    column: str,
    *,
    training: IvfPqTrainingOutput,
    artifact_uri: str | os.PathLike[str] | None = None,
    batch_size: int = 1024 * 128,
    filter_nan: bool = True,
) -> IvfPqArtifactOutput:
    CALLS.append(
        ("build_ivf_pq_artifact", (dataset_uri, column), {"batch_size": batch_size, "filter_nan": filter_nan})
    )
    folder = Path(artifact_uri or tempfile.mkdtemp())
    la.build_artifact(lance.dataset(dataset_uri), column, training._model, folder, backend="cpu")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: manifest[key] for key in ("version", "num_partitions", "partitions")}))
    return IvfPqArtifactOutput(str(folder), [p.name for p in folder.rglob("*.lance")])
