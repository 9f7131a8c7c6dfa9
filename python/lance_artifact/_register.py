"""Registration with pylance: two calls learn two arguments, every other call goes where it went."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lance
from lance.dataset import LanceDataset
from lance.indices import IndicesBuilder

from ._arguments import given_model, index_mode, metric_name, one_progress
from ._artifacts import open_artifacts
from ._checked import CHECKS, check, nearest
from ._create_index import create_index as build
from ._dataset import Handle
from ._finalize import finalize
from ._lancedb_calls import register_lancedb, unregister_lancedb
from ._over import over
from ._pylance import (
    MARK,
    asks_for_cuvs,
    check_pylance_arguments,
    is_registered,
    replaced_by,
    set_registered,
    stock,
)
from ._train import train
from ._train_ivf import train_ivf as train_centroids
from ._uncommitted import create_index_uncommitted as create_uncommitted
from .backends import resolve_accelerator
from .exceptions import ArtifactMismatchError, InvalidInputError, InvalidTypeError

_LOCK = threading.Lock()

_URI = "precomputed_partition_artifact_uri"


def pylance_knows_cuvs() -> bool:
    """Whether pylance itself takes accelerator="cuvs", in which case it is left alone."""
    original = stock(LanceDataset.create_index)
    texts = []
    for function in (original, LanceDataset._create_index_impl):
        with suppress(OSError, TypeError):
            texts.append(inspect.getsource(function))
    # Read, not imported: lance.vector needs tqdm, which pylance does not declare.
    with suppress(OSError, TypeError):
        texts.append(Path(str(lance.__file__)).with_name("vector.py").read_text(encoding="utf-8"))
    return any(quoted in text for text in texts for quoted in ('"cuvs"', "'cuvs'"))


def _bind(
    signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments that a call gives, and no defaults."""
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InvalidTypeError(f"{name}: {error}") from None
    extra = bound.pop("kwargs", {})
    return {**bound, **extra}


def _refuse_misspelt(name: str, unknown: set[str]) -> None:
    """pylance takes any keyword, and would build as if it were not there."""
    for what in unknown - {_URI}:
        # It has arguments that are like ours, such as precomputed_partitions_file.
        if "artifact" in what and nearest(what, (_URI,)):
            raise InvalidTypeError(f"{name}: got an unexpected argument {what!r}{nearest(what, (_URI,))}")


def _wrap_create_index(original: Any) -> Any:
    signature = inspect.signature(original)

    def ours(self: Any, *args: Any, **kwargs: Any) -> Callable[[], Any] | None:
        if not is_registered():
            return None
        uri = kwargs.get(_URI)
        if uri is None:
            _refuse_misspelt("create_index", kwargs.keys() - signature.parameters.keys())
            if "accelerator" not in kwargs and len(args) < 10:
                return None
        given = _bind(
            signature, "create_index", (self, *args), {k: v for k, v in kwargs.items() if k != _URI}
        )
        accelerator = given.get("accelerator")
        if uri is None and not asks_for_cuvs(accelerator):
            return None
        dataset = given.pop("self")
        if uri is None:
            return functools.partial(build, dataset, **given)
        if given.pop("accelerator", None) is not None:
            raise InvalidInputError(
                f"accelerator: the artifact is encoded already; pass one of accelerator and {_URI}"
            )
        return functools.partial(_finalize, check("artifact_uri", uri), dataset, **given)

    return over(original, ours)


# Those of `finalize`, and those that must agree with the artifact.
_OF_FINALIZE = {
    "column",
    "index_type",
    "name",
    "metric",
    "replace",
    "append",
    "fragment_ids",
    "index_uuid",
    "m",
    "ef_construction",
    "max_level",
    "skip_transpose",
    "memory_limit",
    "storage_options",
    "sync",
    "progress",
    "progress_callback",
}
_AGREES = {"num_partitions", "num_sub_vectors", "num_bits", "ivf_centroids", "pq_codebook"}


def _finalize(uri: str, dataset: Any, column: Any, index_type: str = "IVF_PQ", **given: Any) -> Any:
    """pylance's call with an artifact: what is left out is what the artifact says."""
    encoded = {k: v for k, v in given.items() if k in _ENCODED and v is not None}
    if encoded:
        raise InvalidInputError(
            f"{sorted(encoded)}: the artifact is encoded already; they have no meaning with {_URI}"
        )
    passed = {k: check(k, v) if k in CHECKS else v for k, v in given.items() if k in _OF_FINALIZE}
    agrees = {k: check(k, v) if k in CHECKS else v for k, v in given.items() if k in _AGREES}
    others = given.keys() - passed.keys() - agrees.keys() - _ENCODED
    if check("train", given.get("train")) is False:
        raise InvalidInputError(f"train: got False with {_URI}, whose rows are the index")
    check_pylance_arguments({k: given[k] for k in others - {"train"}}, _OF_FINALIZE | _AGREES)
    mode = index_mode(passed.pop("replace", False), "append" if passed.pop("append", False) else None)
    passed["progress"] = one_progress(passed.pop("progress", False), passed.pop("progress_callback", None))
    options = check("storage_options", passed.pop("storage_options", None))
    opened = open_artifacts(Handle.of(dataset), [uri], options)[0]
    centroids, codebook = agrees.pop("ivf_centroids", None), agrees.pop("pq_codebook", None)
    if (centroids is None) != (codebook is None):
        raise InvalidInputError(
            "ivf_centroids and pq_codebook: pass both or neither; they must match the artifact's model"
        )
    model = None
    if centroids is not None:
        metric = passed.get("metric") or (opened.model.metric if opened.model else "l2")
        model = given_model(centroids, codebook, metric, agrees.get("num_sub_vectors"))
    expected = model or opened.model
    for what, got in agrees.items():
        if expected is not None and got is not None and got != getattr(expected, what):
            raise ArtifactMismatchError(
                f"{what}: got {got}, the artifact {opened.uri} was encoded with {getattr(expected, what)}"
            )
    return finalize(dataset, column, opened, model=model, index_type=index_type, mode=mode, **passed)


# Of training and encoding, which is over.
_ENCODED = {
    "target_partition_size",
    "sample_rate",
    "max_iters",
    "seed",
    "ivf_centroids_file",
    "backend",
    "devices",
    "device_memory_limit",
    "artifact_uri",
    "keep_artifact",
    "resume",
    "num_shards",
}


def _with_accelerator(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """``function`` in place of one of pylance's where that is asked for cuVS."""

    def ours(*args: Any, **kwargs: Any) -> Callable[[], Any] | None:
        asked = is_registered() and asks_for_cuvs(kwargs.get("accelerator"))
        return functools.partial(function, *args, **kwargs) if asked else None

    return lambda original: over(original, ours)


def _prepare_global_ivf_pq(
    self: Any, num_partitions: int | None, num_subvectors: int | None, *, accelerator: Any, **kwargs: Any
) -> Any:
    metric = kwargs.pop("distance_type", "l2")
    column = self.column[0] if isinstance(self.column, list) else self.column
    rows = self._count_rows(kwargs.get("fragment_ids"))
    # Its own rules, of which the number of partitions is another than create_index has.
    partitions = self._determine_num_partitions(num_partitions, rows)
    self._verify_ivf_sample_rate(kwargs.get("sample_rate", 256), partitions, rows)
    self._verify_pq_sample_rate(rows, kwargs.get("sample_rate", 256), kwargs.get("num_bits", 8))
    subvectors = self._normalize_pq_params(num_subvectors, self.dimension)
    model = train(
        self.dataset,
        column,
        metric=metric,
        num_partitions=partitions,
        num_sub_vectors=subvectors,
        backend=resolve_accelerator(accelerator),
        **kwargs,
    )
    return {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}


def _wrap_uncommitted(original: Any) -> Any:
    signature = inspect.signature(original)

    def ours(self: Any, *args: Any, **kwargs: Any) -> Callable[[], Any] | None:
        if not is_registered():
            return None
        _refuse_misspelt("create_index_uncommitted", kwargs.keys() - signature.parameters.keys())
        if kwargs.get(_URI) is not None:
            raise InvalidInputError(
                f"{_URI}: create_index_uncommitted encodes rows itself; of an artifact lance_artifact.build_segment(dataset, column, artifact) "
                "makes a segment"
            )
        if "accelerator" not in kwargs and len(args) < 10:
            return None
        given = _bind(
            signature,
            "create_index_uncommitted",
            (self, *args),
            {k: v for k, v in kwargs.items() if k != _URI},
        )
        if not asks_for_cuvs(given.get("accelerator")):
            return None
        dataset = given.pop("self")
        if given.pop("rabitq_model", None) is not None:
            raise InvalidInputError("rabitq_model: is of another kind of index; IVF_PQ takes pq_codebook")
        # Codes are row by row in any case, and nothing is replaced.
        for what in ("replace", "skip_transpose", "storage_options"):
            given.pop(what, None)
        if given.pop("train", True) is False:
            raise InvalidInputError("train: got False, but a segment without rows is none to merge")
        return functools.partial(create_uncommitted, dataset, **given)

    return over(original, ours)


def _train_ivf(self: Any, num_partitions: int | None = None, *, accelerator: Any, **kwargs: Any) -> Any:
    from lance.indices import IvfModel

    metric = kwargs.pop("distance_type", "l2")
    column = self.column[0] if isinstance(self.column, list) else self.column
    rows = self._count_rows(kwargs.get("fragment_ids"))
    partitions = self._determine_num_partitions(num_partitions, rows)
    self._verify_ivf_sample_rate(kwargs.get("sample_rate", 256), partitions, rows)
    centroids = train_centroids(
        self.dataset,
        column,
        metric=metric,
        num_partitions=partitions,
        backend=resolve_accelerator(accelerator),
        **kwargs,
    )
    return IvfModel(centroids, metric_name(metric))


_WRAPPED = (
    (LanceDataset, "create_index", _wrap_create_index),
    (LanceDataset, "create_index_uncommitted", _wrap_uncommitted),
    (IndicesBuilder, "prepare_global_ivf_pq", _with_accelerator(_prepare_global_ivf_pq)),
    (IndicesBuilder, "train_ivf", _with_accelerator(_train_ivf)),
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
            # Also one that others have wrapped: ours is at work below it.
            if not hasattr(current, MARK):
                setattr(owner, name, wrap(current))
        set_registered(True)
        register_lancedb()
        return True


def unregister() -> None:
    """Give pylance its own functions back. What others have put over ours stays, and does what it would over pylance's. Calling it again
    changes nothing."""
    with _LOCK:
        set_registered(False)
        for owner, name, _ in _WRAPPED:
            original = replaced_by(getattr(owner, name))
            if original is not None:
                setattr(owner, name, original)
        unregister_lancedb()
