"""The external `lance_cuvs` loader (the package pylance-cuvs): it reads the dataset, trains and writes an artifact itself.

This file knows it by the signatures and the files of what it publishes (0.1.0b1 and 0.1.0b2). Its artifact, which is the sorted files of
Lance's own shuffler, is finalized as it is.
"""

from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._dataset import Handle, branch_of, vector_column
from .._lance_artifact import Artifact, IvfPqModel, shown_uri
from .._log import LOGGER
from ..exceptions import (
    ArtifactMismatchError,
    BackendUnavailableError,
    CorruptArtifactError,
    InvalidInputError,
)
from . import _cuda
from ._protocol import Availability, TrainParams

if TYPE_CHECKING:
    import lance

# Bytes of a column that its training may load without a word.
QUIETLY = 1 << 30


class PylanceCuvsBackend:
    """Delegates training and the whole artifact to `lance_cuvs`, on the device and with the cuVS that it chooses.

    It takes the newest version of a dataset at a path, all of its fragments, L2 and cosine, 8 bits, writes to local folders, and
    encodes only with a model that it has trained in this process. Its training loads the whole column into memory, and takes the
    first of its rows.
    """

    name = "pylance-cuvs"
    resumable = False

    def __init__(self) -> None:
        self._trained: dict[str, Any] = {}

    def availability(self) -> Availability:
        """Which of package, driver and device is missing. Imports nothing of CUDA."""
        missing = []
        installed = _installed_version()
        if find_spec("lance_cuvs") is None:
            missing.append(
                "package: the Python package lance_cuvs is not installed; pip install pylance-cuvs"
            )
        cuda = _cuda.probe()
        missing += _cuda.missing(cuda)
        return Availability(not missing, tuple(missing), {"pylance_cuvs": installed, **_cuda.describe(cuda)})

    def train(self, *_: Any, **__: Any) -> IvfPqModel:
        """Raises: `lance_cuvs` trains on datasets only; `lance_artifact.train` calls `train_on_dataset`."""
        raise InvalidInputError(
            f"backend {self.name!r} trains on a dataset, not on a sample; call lance_artifact.train"
        )

    def encoder(self, *_: Any) -> Any:
        """Raises: `lance_cuvs` encodes datasets only; `lance_artifact.build_artifact` calls `write_artifact`."""
        raise InvalidInputError(
            f"backend {self.name!r} encodes a dataset, not vectors; call lance_artifact.build_artifact"
        )

    def train_on_dataset(
        self, dataset: lance.LanceDataset, column: str, params: TrainParams, fragment_ids: list[int] | None
    ) -> IvfPqModel:
        """See `DatasetBackend.train_on_dataset`.

        Raises
        ------
        InvalidInputError
            What is asked for is more than `lance_cuvs` takes.
        """
        if params.metric == "dot":
            raise InvalidInputError(
                f"metric: backend {self.name!r} encodes residuals for dot, where an index needs raw vectors; use backend='cuvs'"
            )
        if params.ivf_centroids is not None or params.num_bits != 8:
            raise InvalidInputError(
                f"ivf_centroids and num_bits: backend {self.name!r} trains its own centroids, with 8 bits; use backend='cuvs'"
            )
        function = self._function("train_ivf_pq")
        options = self._readable(dataset, fragment_ids, function)
        self._warn_of_size(dataset, column)
        training = function(
            str(dataset.uri),
            column,
            metric_type={"l2": "L2", "cosine": "Cosine"}[params.metric],
            num_partitions=params.num_partitions,
            num_sub_vectors=params.num_sub_vectors,
            sample_rate=params.sample_rate,
            max_iters=params.max_iters,
            num_bits=params.num_bits,
            filter_nan=True,
            **options,
        )
        model = IvfPqModel(
            training.ivf_centroids(),
            training.pq_codebook(),
            params.metric,
            num_sub_vectors=params.num_sub_vectors,
        )
        self._trained[model.fingerprint] = training
        return model

    def write_artifact(
        self,
        dataset: lance.LanceDataset,
        column: str,
        model: IvfPqModel,
        artifact_uri: str | Path,
        fragment_ids: list[int] | None,
    ) -> Artifact:
        """See `DatasetBackend.write_artifact`.

        Raises
        ------
        InvalidInputError
            The model was not trained here, or the artifact is to go to an object store.
        ArtifactMismatchError
            The artifact has another model, or the dataset changed while it was read.
        """
        training = self._trained.get(model.fingerprint)
        if training is None:
            raise InvalidInputError(
                f"model: backend {self.name!r} encodes only with a model that it trained in this process; use backend='cuvs'"
            )
        self.check_target(artifact_uri)
        target = Path(artifact_uri)
        function = self._function("build_ivf_pq_artifact")
        options = self._readable(dataset, fragment_ids, function)
        target.parent.mkdir(parents=True, exist_ok=True)
        written = function(
            str(dataset.uri), column, training=training, artifact_uri=str(target), filter_nan=True, **options
        )
        self._readable(dataset, fragment_ids, function)
        folder = Path(written.artifact_uri)
        # Of a folder alone nobody can tell whether its last file is there.
        missing = [name for name in written.files if not (folder / name).is_file()]
        if missing:
            raise CorruptArtifactError(
                f"artifact {folder}: lance_cuvs says that it wrote {missing}, which are not there"
            )
        artifact = Artifact.open(str(folder))
        if artifact.model is not None and artifact.model.fingerprint != model.fingerprint:
            raise ArtifactMismatchError(
                f"artifact {artifact.uri}: its model is not the one it was to be encoded with"
            )
        return artifact

    def check_target(self, artifact_uri: str | Path) -> None:
        """Raises: the artifact cannot be written there."""
        target = Path(artifact_uri)
        if "://" in str(artifact_uri) or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise InvalidInputError(
                f"artifact_uri: got {shown_uri(str(artifact_uri))}, expected a new or empty local folder"
            )

    def _warn_of_size(self, dataset: lance.LanceDataset, column: str) -> None:
        handle = Handle.of(dataset)
        path, dimension = vector_column(handle, column)
        vector_bytes = dimension * np.dtype(handle.vectors(path, None).dtype).itemsize
        size = handle.count_rows(None) * vector_bytes
        if size > QUIETLY:
            LOGGER.warning(
                "backend %s: its training loads the whole column %r into memory, %.1f GiB, and takes the first of its rows; "
                "backend='cuvs' draws a sample instead",
                self.name,
                column,
                size / 2**30,
            )

    def _function(self, name: str) -> Any:
        import lance_cuvs

        function = getattr(lance_cuvs, name, None)
        if function is None:
            raise BackendUnavailableError(
                f"backend {self.name!r}: lance_cuvs {_installed_version()} has no {name}; pip install --upgrade pylance-cuvs"
            )
        return function

    def _readable(
        self, dataset: lance.LanceDataset, fragment_ids: list[int] | None, function: Any
    ) -> dict[str, Any]:
        """Check that `lance_cuvs` will read what the handle reads; its storage options, where it takes any."""
        if branch_of(dataset) is not None:
            raise InvalidInputError(
                f"dataset: backend {self.name!r} reads the main branch, and the handle is on branch {branch_of(dataset)!r}; "
                "use backend='cuvs'"
            )
        latest = int(dataset.latest_version)
        if latest != int(dataset.version):
            raise ArtifactMismatchError(
                f"dataset {dataset.uri}: backend {self.name!r} reads the newest version, {latest}, and the handle is at "
                f"{dataset.version}; check out the newest, or use backend='cuvs'"
            )
        everything = {f.fragment_id for f in dataset.get_fragments()}
        if fragment_ids is not None and set(fragment_ids) != everything:
            raise InvalidInputError(
                f"fragment_ids: backend {self.name!r} reads all fragments; use backend='cuvs'"
            )
        options = dataset.latest_storage_options()
        if not options:
            return {}
        parameters = inspect.signature(function).parameters
        if "storage_options" not in parameters:
            raise InvalidInputError(
                f"storage_options: lance_cuvs.{function.__name__} takes none, and the dataset has some; use backend='cuvs'"
            )
        return {"storage_options": dict(options)}


def _installed_version() -> str | None:
    try:
        return version("pylance-cuvs")
    except PackageNotFoundError:
        return None
