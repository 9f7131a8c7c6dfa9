"""Registration with pylance: two calls learn two arguments, every other call goes where it went."""

from __future__ import annotations

import functools
import inspect
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import lance
from lance.dataset import LanceDataset
from lance.indices import IndicesBuilder

from ._arguments import given_model
from ._checked import check
from ._create_index import create_index
from ._finalize import finalize
from ._lance_artifact import Artifact
from ._train import train
from ._uncommitted import create_index_uncommitted as create_uncommitted
from .backends import resolve_accelerator
from .exceptions import ArtifactMismatchError, InvalidInputError

_MARK = "__lance_artifact_original__"
_LOCK = threading.Lock()

# Arguments of pylance's create_index that change how *it* builds, and have no meaning in ours unless they are at their default.
_REFUSED = {
    "ivf_centroids_file": None,
    "precomputed_partition_dataset": None,
    "train": True,
    "index_uuid": None,
    "streaming_sample_rate": None,
    "streaming_coreset_rate": None,
    "streaming_refine_passes": None,
    "skip_transpose": False,
}
# Arguments that tune Lance's own shuffle, cache or filter; ours has no use for them and gives the same index without.
_WITHOUT_EFFECT = {
    "index_cache_size",
    "shuffle_partition_batches",
    "shuffle_partition_concurrency",
    "filter_nan",
}
_OURS = {
    "num_bits",
    "sample_rate",
    "max_iters",
    "seed",
    "m",
    "ef_construction",
    "artifact_uri",
    "keep_artifact",
    "memory_limit",
    "devices",
    "resume",
    "num_shards",
    "verify",
}

# Of those what a segment that is not committed has a use for.
_OF_SEGMENTS = _OURS - {"artifact_uri", "keep_artifact", "resume", "num_shards", "verify"}


def _is_cuvs(accelerator: Any) -> bool:
    return isinstance(accelerator, str) and (accelerator == "cuvs" or accelerator.startswith("cuvs:"))


def pylance_knows_cuvs() -> bool:
    """Whether pylance itself takes accelerator="cuvs", in which case it is left alone."""
    original = getattr(LanceDataset.create_index, _MARK, LanceDataset.create_index)
    texts = []
    for function in (original, LanceDataset._create_index_impl):
        with suppress(OSError, TypeError):
            texts.append(inspect.getsource(function))
    # Read, not imported: lance.vector needs tqdm, which pylance does not declare.
    with suppress(OSError, TypeError):
        texts.append(Path(str(lance.__file__)).with_name("vector.py").read_text(encoding="utf-8"))
    return any(quoted in text for text in texts for quoted in ('"cuvs"', "'cuvs'"))


def _wrap_create_index(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_index(self: Any, *args: Any, **kwargs: Any) -> Any:
        uri = kwargs.get("precomputed_partition_artifact_uri")
        if uri is None and "accelerator" not in kwargs and len(args) < 10:
            return original(self, *args, **kwargs)
        ours = dict(kwargs)
        ours.pop("precomputed_partition_artifact_uri", None)
        bound = signature.bind(self, *args, **ours)
        accelerator = bound.arguments.get("accelerator")
        if uri is None and not _is_cuvs(accelerator):
            return original(self, *args, **kwargs)
        bound.apply_defaults()
        return _create_index(uri, **bound.arguments)

    setattr(create_index, _MARK, original)
    return create_index


def _create_index(uri: Any, self: Any, column: Any, index_type: str, **arguments: Any) -> Any:
    extra = arguments.pop("kwargs", {})
    _only_ours(arguments, extra, "accelerator='cuvs' or precomputed_partition_artifact_uri")
    accelerator = arguments.pop("accelerator", None)
    progress = check("progress", arguments.pop("progress_callback", None)) or False
    # pylance logs that it falls back to the CPU for other index types; IVF_HNSW_PQ is built from the same codes here.
    if uri is not None and accelerator is not None:
        raise InvalidInputError(
            "accelerator: the artifact is encoded already; pass one of accelerator and precomputed_partition_artifact_uri"
        )
    if uri is None:
        return create_index(
            self,
            column,
            index_type,
            backend=resolve_accelerator(accelerator, check("devices", extra.pop("devices", None))),
            progress=progress,
            **arguments,
            **extra,
        )
    return _finalize(check("artifact_uri", uri), self, column, index_type, progress, arguments, extra)


def _only_ours(arguments: dict[str, Any], extra: dict[str, Any], where: str, known: set[str] = _OURS) -> None:
    """Take out what has no effect here, and refuse what has another one."""
    for what, default in _REFUSED.items():
        given = arguments.pop(what, default)
        # Not compared: an array has no one truth value.
        if given is not default:
            raise InvalidInputError(f"{what}: not supported with {where}")
    for what in _WITHOUT_EFFECT:
        arguments.pop(what, None)
    unknown = set(extra) - known
    if unknown:
        raise InvalidInputError(f"{sorted(unknown)}: not known with {where}; known are {sorted(known)}")


def _finalize(
    uri: str, dataset: Any, column: Any, index_type: str, progress: Any, arguments: Any, extra: Any
) -> Any:
    training = sorted(set(extra) - {"m", "ef_construction", "num_bits", "memory_limit"})
    if training:
        raise InvalidInputError(
            f"{training}: the artifact is encoded already; they have no meaning with precomputed_partition_artifact_uri"
        )
    if arguments["target_partition_size"] is not None:
        raise InvalidInputError("target_partition_size: the artifact has its partitions already")
    column = check("column", column)
    opened = Artifact.open(uri, check("storage_options", arguments.get("storage_options")))
    centroids, codebook = arguments["ivf_centroids"], arguments["pq_codebook"]
    if (centroids is None) != (codebook is None):
        raise InvalidInputError(
            "ivf_centroids and pq_codebook: pass both or neither; they must match the artifact's model"
        )
    model = None
    if centroids is not None:
        model = given_model(centroids, codebook, arguments["metric"], arguments["num_sub_vectors"])
    expected = model or opened.model
    for what, got in (
        ("num_partitions", arguments["num_partitions"]),
        ("num_sub_vectors", arguments["num_sub_vectors"]),
        ("num_bits", extra.get("num_bits")),
    ):
        got = check(what, got)
        if expected is not None and got is not None and got != getattr(expected, what):
            raise ArtifactMismatchError(
                f"{what}: got {got}, the artifact {opened.uri} was encoded with {getattr(expected, what)}"
            )
    return finalize(
        dataset,
        column,
        opened,
        model=model,
        name=arguments["name"],
        replace=arguments["replace"],
        index_type=index_type,
        metric=arguments["metric"],
        fragment_ids=arguments["fragment_ids"],
        m=extra.get("m", 20),
        ef_construction=extra.get("ef_construction", 150),
        memory_limit=extra.get("memory_limit"),
        progress=progress,
    )


def _wrap_prepare(original: Any) -> Any:
    @functools.wraps(original)
    def prepare_global_ivf_pq(
        self: Any,
        num_partitions: int | None,
        num_subvectors: int | None,
        *,
        accelerator: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not _is_cuvs(accelerator):
            return original(self, num_partitions, num_subvectors, accelerator=accelerator, **kwargs)
        metric = kwargs.pop("distance_type", "l2")
        column = self.column[0] if isinstance(self.column, list) else self.column
        subvectors = self._normalize_pq_params(num_subvectors, self.dimension)
        model = train(
            self.dataset,
            column,
            metric=metric,
            num_partitions=num_partitions,
            num_sub_vectors=subvectors,
            backend=resolve_accelerator(accelerator),
            **kwargs,
        )
        return {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}

    setattr(prepare_global_ivf_pq, _MARK, original)
    return prepare_global_ivf_pq


def _wrap_uncommitted(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_index_uncommitted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "accelerator" not in kwargs and len(args) < 10:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        accelerator: Any = bound.arguments.get("accelerator")
        if not _is_cuvs(accelerator):
            return original(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        dataset, extra = arguments.pop("self"), arguments.pop("kwargs", {})
        index_uuid = arguments.pop("index_uuid")
        # Codes are row by row in any case.
        for what in ("accelerator", "replace", "skip_transpose", "storage_options", "rabitq_model"):
            arguments.pop(what, None)
        devices = check("devices", extra.pop("devices", None))
        progress = check("progress", extra.pop("progress_callback", None)) or False
        _only_ours(arguments, extra, "accelerator='cuvs'", _OF_SEGMENTS)
        return create_uncommitted(
            dataset,
            index_uuid=index_uuid,
            backend=resolve_accelerator(accelerator, devices),
            progress=progress,
            **arguments,
            **extra,
        )

    setattr(create_index_uncommitted, _MARK, original)
    return create_index_uncommitted


def _wrap_train_ivf(original: Any) -> Any:
    @functools.wraps(original)
    def train_ivf(
        self: Any, num_partitions: int | None = None, *, accelerator: Any = None, **kwargs: Any
    ) -> Any:
        if not _is_cuvs(accelerator):
            return original(self, num_partitions, accelerator=accelerator, **kwargs)
        from lance.indices import IvfModel

        metric = kwargs.pop("distance_type", "l2")
        column = self.column[0] if isinstance(self.column, list) else self.column
        rows = self._count_rows(kwargs.get("fragment_ids"))
        model = train(
            self.dataset,
            column,
            metric=metric,
            num_partitions=self._determine_num_partitions(num_partitions, rows),
            # The smallest codebook: it is not asked for.
            num_sub_vectors=1,
            backend=resolve_accelerator(accelerator),
            **kwargs,
        )
        return IvfModel(model.ivf_centroids, model.metric)

    setattr(train_ivf, _MARK, original)
    return train_ivf


_WRAPPED = (
    (LanceDataset, "create_index", _wrap_create_index),
    (LanceDataset, "create_index_uncommitted", _wrap_uncommitted),
    (IndicesBuilder, "prepare_global_ivf_pq", _wrap_prepare),
    (IndicesBuilder, "train_ivf", _wrap_train_ivf),
)


def register() -> bool:
    """Teach pylance ``accelerator="cuvs"`` and ``precomputed_partition_artifact_uri=``. Importing lance_artifact does it.

    Returns
    -------
    bool
        False where pylance itself knows "cuvs" and is left alone. Calling it again changes nothing.
    """
    with _LOCK:
        if pylance_knows_cuvs():
            return False
        for owner, name, wrap in _WRAPPED:
            current = getattr(owner, name)
            if not hasattr(current, _MARK):
                setattr(owner, name, wrap(current))
        return True


def unregister() -> None:
    """Give pylance its own functions back. Calling it again changes nothing."""
    with _LOCK:
        for owner, name, _ in _WRAPPED:
            original = getattr(getattr(owner, name), _MARK, None)
            if original is not None:
                setattr(owner, name, original)
