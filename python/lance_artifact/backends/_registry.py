"""Finding a backend by name, and saying why there is none."""

from __future__ import annotations

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


def resolve_backend(backend: str | Backend) -> Backend:
    """A backend that can run here.

    Parameters
    ----------
    backend : str or Backend
        A name, "auto" (a GPU if there is one, else the CPU), or an object that fulfils the protocol.

    Raises
    ------
    BackendUnavailableError
        The backend that was named cannot run here; another one is never taken in its place.
    """
    if not isinstance(backend, str):
        if isinstance(backend, Backend):
            return backend
        raise InvalidInputError(
            f"backend: got {type(backend).__name__}, expected a name or an object with name, availability(), train() and encoder()"
        )
    if backend == "auto":
        chosen = _load("cuvs")
        return chosen if chosen.availability().ok else CpuBackend()
    chosen = _load(backend)
    found = chosen.availability()
    if not found.ok:
        raise BackendUnavailableError(f"backend {backend!r} cannot run here: " + "; ".join(found.missing))
    return chosen


def resolve_accelerator(accelerator: str) -> Backend:
    """The backend that ``accelerator="cuvs"`` means: cuvs, else pylance-cuvs, else an error. Never the CPU."""
    if accelerator != "cuvs":
        raise InvalidInputError(f"accelerator: got {accelerator!r}, expected 'cuvs'")
    reasons = []
    for name in ("cuvs", "pylance-cuvs"):
        backend = _load(name)
        found = backend.availability()
        if found.ok:
            return backend
        reasons.append(f"backend {name!r}: " + "; ".join(found.missing))
    raise BackendUnavailableError(
        "accelerator='cuvs' cannot run here. "
        + ". ".join(reasons)
        + ". To build on the CPU, call lance_artifact.create_index(..., backend='cpu')"
    )
