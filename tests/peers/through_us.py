"""A pytest plugin for the tests of pylance, LanceDB and lance-ray: with THROUGH_US=1 indexes of PQ codes are built by this package, on the CPU.

Calls that ask for an accelerator, for something that is not built here (fragment_ids without a commit, multivectors), or that torch is to do,
stay pylance's: they are counted. lance-ray's segments are made in Ray's workers, which load this file too and count into THROUGH_US_LOG.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

CALLS: Counter[str] = Counter()
PQ = ("IVF_PQ", "IVF_HNSW_PQ")


def _is_multivector(dataset: Any, column: Any) -> bool:
    import pyarrow as pa

    name = column[0] if isinstance(column, list) and len(column) == 1 else column
    field = dataset.schema.field(name) if isinstance(name, str) and name in dataset.schema.names else None
    return field is not None and pa.types.is_list(field.type)


def _pylance() -> None:
    from lance.dataset import LanceDataset

    import lance_artifact as la
    from lance_artifact._pylance import stock

    original = stock(LanceDataset.create_index)

    @functools.wraps(original)
    def create_index(self: Any, column: Any, index_type: Any = None, *args: Any, **kwargs: Any) -> Any:
        wanted = isinstance(index_type, str) and index_type.upper() in PQ
        elsewhere = (
            kwargs.get("accelerator") is not None
            or kwargs.get("fragment_ids") is not None
            or len(args) > 7
            or any("torch" in str(type(value)) for value in kwargs.values())
            or _is_multivector(self, column)
        )
        if not wanted or elsewhere:
            CALLS["pylance"] += 1
            return original(self, column, index_type, *args, **kwargs)
        CALLS["ours"] += 1
        kwargs.pop("accelerator", None)
        kwargs.pop("fragment_ids", None)
        return la.create_index(self, column, index_type, *args, backend="cpu", **kwargs)

    LanceDataset.create_index = create_index


def _lancedb() -> None:
    import lancedb.table as tables

    import lance_artifact as la
    from lance_artifact import _lancedb_calls

    def arguments(column: str, config: Any, given: dict[str, Any]) -> dict[str, Any]:
        bound = {"column": column, "config": config, **given}
        found = _lancedb_calls._arguments(bound)
        found.pop("accelerator")
        return found

    def is_ours(table: Any, config: Any) -> bool:
        return type(config).__name__ in ("IvfPq", "HnswPq") and config.accelerator is None

    sync, later = tables.LanceTable.create_index, tables.AsyncTable.create_index

    @functools.wraps(sync)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if not is_ours(self, config) or str(self._dataset_path).startswith("memory"):
            CALLS["lancedb"] += 1
            return sync(self, *args, **kwargs)
        CALLS["ours"] += 1
        given = {key: kwargs[key] for key in ("name", "replace", "train") if key in kwargs}
        la.create_index(
            self, backend="cpu", **arguments(args[0] if args else kwargs["metric"], config, given)
        )
        return None

    @functools.wraps(later)
    async def create_later(self: Any, column: str, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        try:
            place = await self.uri()
        except Exception:
            place = "memory://"
        if not is_ours(self, config) or place.startswith("memory"):
            CALLS["lancedb"] += 1
            return await later(self, column, **kwargs)
        CALLS["ours"] += 1
        given = {key: kwargs[key] for key in ("name", "replace", "train") if key in kwargs}
        await la.in_thread(la.create_index, self, backend="cpu", **arguments(column, config, given))
        return None

    tables.LanceTable.create_index = create
    tables.AsyncTable.create_index = create_later


def in_worker() -> None:
    """In a worker of Ray: pylance's segments are built by the call by which lance-ray reaches us, with the CPU for the accelerator."""
    if os.environ.get("THROUGH_US") != "1":
        return
    from lance.dataset import LanceDataset

    import lance_artifact as la
    from lance_artifact import _uncommitted
    from lance_artifact.backends.cpu import CpuBackend

    la.register()
    _uncommitted.resolve_accelerator = lambda *_: CpuBackend()
    registered = LanceDataset.create_index_uncommitted

    @functools.wraps(registered)
    def create_index_uncommitted(self: Any, column: Any, index_type: Any, *args: Any, **kwargs: Any) -> Any:
        ours = isinstance(index_type, str) and index_type.upper() in PQ and not kwargs.get("accelerator")
        with Path(os.environ["THROUGH_US_LOG"]).open("a") as log:
            log.write("ours\n" if ours else "pylance\n")
        if ours:
            kwargs["accelerator"] = "cuvs"
        return registered(self, column, index_type, *args, **kwargs)

    LanceDataset.create_index_uncommitted = create_index_uncommitted


def pytest_configure(config: Any) -> None:
    if os.environ.get("THROUGH_US") != "1":
        return
    _pylance()
    try:
        import lancedb  # noqa: F401
    except ImportError:
        return
    _lancedb()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    log = Path(os.environ.get("THROUGH_US_LOG", ""))
    if log.is_file():
        CALLS.update(log.read_text().split())
    if CALLS:
        terminalreporter.write_line(f"indexes built by: {dict(CALLS)}")
