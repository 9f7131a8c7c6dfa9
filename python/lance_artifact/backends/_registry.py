"""Finding a backend by name, and saying why there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any

from ..exceptions import BackendUnavailableError, InvalidInputError
from ._protocol import Availability, Backend
from .cpu import CpuBackend
from .cuvs import CuvsBackend
from .pylance_cuvs import PylanceCuvsBackend

GROUP = "lance_artifact.backends"

# Known without installed metadata, so that a source tree works too.
_BUILT_IN: dict[str, type[Any]] = {"cpu": CpuBackend, "cuvs": CuvsBackend, "pylance-cuvs": PylanceCuvsBackend}


def _names() -> dict[str, Any]:
    found: dict[str, Any] = {point.name: point for point in entry_points(group=GROUP)}
    return {**found, **_BUILT_IN}


def _load(name: str) -> Backend:
    names = _names()
    if name not in names:
        raise InvalidInputError(
            f"backend: got {name!r}, expected 'auto', an object with train() and encoder(), or one of {sorted(names)}"
        )
    entry = names[name]
    made = entry() if isinstance(entry, type) else entry.load()()
    if not isinstance(made, Backend):
        raise InvalidInputError(
            f"backend {name!r}: {type(made).__name__} does not fulfil lance_artifact.Backend"
        )
    return made


def available_backends() -> dict[str, Availability]:
    """Every registered backend and whether it can run here."""
    return {name: _load(name).availability() for name in sorted(_names())}


def _on(backend: Backend, devices: Sequence[int] | None, device_memory_limit: int | None = None) -> Backend:
    """The backend on the devices that were asked for, within so much of their memory."""
    for what, given, method in (
        ("devices", None if devices is None else list(devices), "on_devices"),
        ("device_memory_limit", device_memory_limit, "within_device_memory"),
    ):
        if given is None:
            continue
        with_it = getattr(backend, method, None)
        if with_it is None:
            raise InvalidInputError(
                f"{what}: got {given}, but backend {backend.name!r} takes no {what}; leave it out, or name a GPU backend"
            )
        backend = with_it(given)
    return backend


def resolve_backend(
    backend: str | Backend, devices: Sequence[int] | None = None, device_memory_limit: int | None = None
) -> Backend:
    """A backend that can run here.

    Parameters
    ----------
    backend : str or Backend
        A name, "auto" (a GPU if there is one, else the CPU), or an object that fulfils the protocol.
    devices : sequence of int, optional
        Where a backend with devices computes.
    device_memory_limit : int, optional
        Bytes that it may take of each.

    Raises
    ------
    BackendUnavailableError
        The backend that was named cannot run here; another one is never taken in its place.
    """
    if not isinstance(backend, str):
        if isinstance(backend, Backend):
            return _on(backend, devices, device_memory_limit)
        raise InvalidInputError(
            f"backend: got {type(backend).__name__}, expected a name or an object with name, availability(), train() and encoder()"
        )
    if backend == "auto":
        if devices is not None:
            return resolve_accelerator("cuvs", devices, device_memory_limit)
        chosen = _on(_load("cuvs"), None, device_memory_limit)
        return chosen if chosen.availability().ok else CpuBackend()
    chosen = _on(_load(backend), devices, device_memory_limit)
    found = chosen.availability()
    if not found.ok:
        raise BackendUnavailableError(f"backend {backend!r} cannot run here: " + "; ".join(found.missing))
    return chosen


def resolve_accelerator(
    accelerator: str, devices: Sequence[int] | None = None, device_memory_limit: int | None = None
) -> Backend:
    """The backend that ``accelerator="cuvs"`` means: cuvs, else pylance-cuvs, else an error. Never the CPU.

    ``"cuvs:1"`` is device 1, as pylance writes ``"cuda:1"``.
    """
    match = re.fullmatch(r"cuvs(?::(\d+))?", accelerator)
    if match is None:
        raise InvalidInputError(f"accelerator: got {accelerator!r}, expected 'cuvs' or 'cuvs:N'")
    if match[1] is not None:
        if devices is not None and list(devices) != [int(match[1])]:
            raise InvalidInputError(
                f"devices: got {list(devices)} and accelerator={accelerator!r}; pass one of them"
            )
        devices = [int(match[1])]
    reasons = []
    for name in ("cuvs", "pylance-cuvs"):
        backend = _load(name)
        if hasattr(backend, "on_devices"):
            backend = _on(backend, devices, device_memory_limit)
        elif devices is not None and list(devices) != [0]:
            reasons.append(f"backend {name!r}: takes no devices")
            continue
        elif device_memory_limit is not None:
            reasons.append(f"backend {name!r}: takes no device_memory_limit")
            continue
        found = backend.availability()
        if found.ok:
            return backend
        reasons.append(f"backend {name!r}: " + "; ".join(found.missing))
    raise BackendUnavailableError(
        "accelerator='cuvs' cannot run here. "
        + ". ".join(reasons)
        + ". To build on the CPU, call lance_artifact.create_index(..., backend='cpu')"
    )


def check_resumable(backend: str | Backend) -> None:
    """Whether a backend may work on a run, which others take up where one stops.

    Raises
    ------
    InvalidInputError
    """
    made: Any = backend
    if isinstance(backend, str):
        # What is not known here, or does not load, is for the process that uses it to say.
        made = None
        with suppress(Exception):
            made = _load(backend) if backend != "auto" else None
    if getattr(made, "resumable", True):
        return
    raise InvalidInputError(
        f"backend {made.name!r}: encodes only with what the same process has trained, and its work cannot be taken up by another one, as "
        "a run's is; use another backend, such as 'cuvs', or create_index without resume, num_shards and the folder of a run"
    )
