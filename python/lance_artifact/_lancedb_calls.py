"""LanceDB's `create_index`: each form of the call that asks for cuVS comes to ours, or is refused. All others go where they went."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import wrapt

from ._cancel import in_thread
from ._codebook_rate import codebook_rate
from ._create_index import create_index
from ._log import LOGGER
from ._over import over
from ._pylance import MARK, asks_for_cuvs, replaced_by
from ._versions import check_lancedb, lancedb_version, warn_of_lancedb
from .exceptions import InvalidInputError, UnsupportedError, UntestedVersionWarning

# LanceDB's configurations of what is built here.
_INDEX_TYPES = {"IvfPq": "IVF_PQ", "HnswPq": "IVF_HNSW_PQ"}
# Its names for our arguments.
_RENAMED = {"max_iterations": "max_iters", "distance_type": "metric"}
_TAKEN = (
    "num_partitions",
    "num_sub_vectors",
    "num_bits",
    "sample_rate",
    "max_iterations",
    "target_partition_size",
    "m",
    "ef_construction",
)


# Of its codebooks, which its `sample_rate` is not of.
_CODEBOOK_RATE = 256

# Arguments that have the same meaning beside a configuration as without one; of the others it is the configuration that counts.
_BESIDE_CONFIG = {
    "self",
    "metric",
    "column",
    "config",
    "replace",
    "name",
    "train",
    "accelerator",
    "wait_timeout",
}


def _check_config(given: dict[str, Any]) -> None:
    """What would be dropped without a word: arguments beside a configuration, and what it has that is not known here."""
    config = given.get("config")
    if config is None:
        return
    beside = sorted(what for what in given.keys() - _BESIDE_CONFIG if given[what] is not None)
    if beside:
        raise InvalidInputError(f"{', '.join(beside)}: not beside config; put them into it")
    if not dataclasses.is_dataclass(config):
        return
    known = {*_TAKEN, "distance_type", "accelerator"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value != field.default:
            raise UnsupportedError(
                f"config: {type(config).__name__}({field.name}={value!r}) is not known here, with accelerator='cuvs'; leave it out"
            )


def _accelerator(bound: dict[str, Any]) -> Any:
    """What a call, or its configuration, asks for. Where it asks for two things and none is ours, LanceDB is to say what comes of it."""
    given, configured = bound.get("accelerator"), getattr(bound.get("config"), "accelerator", None)
    ours = asks_for_cuvs(given) or asks_for_cuvs(configured)
    if ours and given is not None and configured not in (None, given):
        raise InvalidInputError(f"accelerator: got {given!r}, and {configured!r} in config; pass one of them")
    return given if given is not None else configured


def _arguments(bound: dict[str, Any]) -> dict[str, Any]:
    """A call of LanceDB as one of ours."""
    config = bound.get("config")
    if config is None:
        column, index_type, source = bound["vector_column_name"], bound["index_type"], bound
        metric = bound["metric"]
        if metric.lower() not in ("l2", "euclidean", "cosine", "dot", "hamming"):
            raise InvalidInputError(
                f"create_index: without config the first argument is the metric, and {metric!r} is none; pass "
                f"config=IvfPq(...), or vector_column_name={metric!r}"
            )
    else:
        # The first argument, which its synchronous tables call the metric.
        column = bound.get("column", bound.get("metric"))
        name = type(config).__name__
        if name not in _INDEX_TYPES:
            raise UnsupportedError(
                f"config: got {name}, expected one of {sorted(_INDEX_TYPES)} with accelerator='cuvs'"
            )
        index_type, source = _INDEX_TYPES[name], vars(config)
        metric = config.distance_type
    given = {_RENAMED.get(what, what): source[what] for what in _TAKEN if source.get(what) is not None}
    replace = bound.get("replace")
    return {
        "column": column,
        "index_type": index_type,
        "name": bound.get("name"),
        "metric": metric,
        # LanceDB's default.
        "replace": True if replace is None else replace,
        "train": bound.get("train", True),
        "accelerator": _accelerator(bound),
        **given,
    }


def _bound(original: Any) -> Callable[..., dict[str, Any] | None]:
    """The arguments of a call that asks for cuVS; None for any other call, also for one that LanceDB will refuse."""
    signature = inspect.signature(original)
    keyword = inspect.Parameter("accelerator", inspect.Parameter.KEYWORD_ONLY, default=None)
    if "accelerator" not in signature.parameters:
        signature = signature.replace(parameters=[*signature.parameters.values(), keyword])

    def bind(args: Any, kwargs: Any) -> dict[str, Any] | None:
        if not _state["registered"]:
            return None
        try:
            call = signature.bind(*args, **kwargs)
        except TypeError:
            return None
        if not asks_for_cuvs(_accelerator(call.arguments)):
            return None
        check_lancedb(lancedb_version())
        if type(call.arguments.get("config")).__name__ in _INDEX_TYPES:
            _check_config(dict(call.arguments))
        call.apply_defaults()
        return dict(call.arguments)

    return bind


def _create(table: Any, **given: Any) -> None:
    with codebook_rate(_CODEBOOK_RATE):
        create_index(table, **given)


def _of_table(original: Any) -> Any:
    bind = _bound(original)

    def ours(*args: Any, **kwargs: Any) -> Callable[[], Any] | None:
        bound = bind(args, kwargs)
        return None if bound is None else functools.partial(_create, args[0], **_arguments(bound))

    return over(original, ours)


def _of_async_table(original: Any) -> Any:
    bind = _bound(original)

    def ours(*args: Any, **kwargs: Any) -> Callable[[], Any] | None:
        bound = bind(args, kwargs)
        if bound is None:
            return None
        return functools.partial(in_thread, _create, args[0], **_arguments(bound))

    return over(original, ours)


def _refused(why: str) -> Callable[[Any], Any]:
    def wrap(original: Any) -> Any:
        bind = _bound(original)

        def ours(*args: Any, **kwargs: Any) -> None:
            if bind(args, kwargs) is not None:
                raise UnsupportedError(f"accelerator='cuvs': {why}")

        return over(original, ours)

    return wrap


_NO_JOB = (
    "create_index_async gives a job of LanceDB's own, which runs nothing of this package; call create_index"
)
_REMOTE = (
    "a remote table's indexes are built by its server; build where the data is stored, with lance_artifact.create_index(uri, "
    "...), if that is allowed"
)
_WRAPS: dict[str, dict[str, dict[str, Callable[[Any], Any]]]] = {
    "lancedb.table": {
        "LanceTable": {"create_index": _of_table, "create_index_async": _refused(_NO_JOB)},
        "AsyncTable": {"create_index": _of_async_table, "create_index_async": _refused(_NO_JOB)},
    },
    "lancedb.remote.table": {
        "RemoteTable": {"create_index": _refused(_REMOTE), "create_index_async": _refused(_REMOTE)}
    },
}

# The methods without which a class is none that is known here. Releases of LanceDB differ in the others.
_NEEDED = ("create_index",)

_state: dict[str, Any] = {"hooked": False, "registered": False, "hooking": None}
_told: set[str] = set()


def _wrap(module: Any) -> None:
    missing = []
    for owner_name, methods in _WRAPS[module.__name__].items():
        of_class = vars(getattr(module, owner_name, object))
        missing += [f"{owner_name}.{name}" for name in _NEEDED if name not in of_class]
        for name, wrap in methods.items():
            current = of_class.get(name)
            if current is not None and not hasattr(current, MARK):
                setattr(getattr(module, owner_name), name, wrap(current))
    version = lancedb_version()
    if missing and module.__name__ not in _told:
        _told.add(module.__name__)
        warnings.warn(
            f"lance_artifact: {module.__name__} has no {', '.join(missing)} in LanceDB {version}, so accelerator='cuvs' does nothing new there; "
            "lance_artifact.create_index(table, ...) makes the same index. If lancedb was only half imported, call lance_artifact.register() "
            "after it",
            UntestedVersionWarning,
            stacklevel=2,
        )
    if "version" not in _told:
        _told.add("version")
        warn_of_lancedb(version)


def _unwrap(module: Any) -> None:
    """Give LanceDB its own functions back, also those that another copy of this package took. What others have put over ours stays."""
    for owner_name, methods in _WRAPS[module.__name__].items():
        owner = getattr(module, owner_name, object)
        for name in methods:
            original = replaced_by(vars(owner).get(name))
            if original is not None:
                setattr(owner, name, original)


def _is_imported(module: Any) -> None:
    """The hook. At once for a module of which a part is there: that one is waited for."""
    if _state["hooking"] != threading.get_ident():
        try:
            (_wrap if _state["registered"] else _unwrap)(module)
        except UntestedVersionWarning as warning:
            # Where warnings are errors LanceDB's import does not fail of one of ours.
            LOGGER.warning("%s", warning)


def _imported() -> Iterator[Any]:
    """Those that are imported, or are being imported by another thread, when they are."""
    # First the one whose import brings the others. What is in `sys.modules` is waited for by importing it, and not imported.
    for name in ("lancedb", *_WRAPS):
        if name in sys.modules:
            # It fails where the other thread's import does, and is for that one to say.
            with suppress(Exception):
                module = importlib.import_module(name)
                if name in _WRAPS:
                    yield module


def register_lancedb() -> None:
    """Wrap LanceDB's classes, now where it is imported, else when it is: this imports nothing."""
    _state["registered"] = True
    if not _state["hooked"]:
        _state["hooked"], _state["hooking"] = True, threading.get_ident()
        try:
            for name in _WRAPS:
                wrapt.register_post_import_hook(_is_imported, name)
        finally:
            _state["hooking"] = None
    for module in _imported():
        _wrap(module)


def unregister_lancedb() -> None:
    _state["registered"] = False
    for name in _WRAPS:
        if name in sys.modules:
            _unwrap(sys.modules[name])
