"""The sample rate of a codebook, where it is another than that of the centroids: LanceDB's `sample_rate` is of these only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

# As Lance says it of each index.
_SAID = "lance.pq.sample_rate"

_RATE: ContextVar[int | None] = ContextVar("lance_artifact_codebook_rate", default=None)


@contextmanager
def codebook_rate(rate: int) -> Iterator[None]:
    """Indexes that are made within train their codebooks on ``rate`` vectors for each codeword, whatever their ``sample_rate`` is."""
    token = _RATE.set(rate)
    try:
        yield
    finally:
        _RATE.reset(token)


def rate_of_codebook(sample_rate: int) -> int:
    """The one of the call, or the ``sample_rate``."""
    rate = _RATE.get()
    return sample_rate if rate is None else rate


def one_rate(sample_rate: int) -> int:
    """For what takes one rate for both: more vectors than asked for cost time, and fewer cost recall."""
    return max(sample_rate, rate_of_codebook(sample_rate))


def said_of_codebook(hints: Mapping[str, str] | None = None) -> dict[str, str]:
    """What details say of it: of the call, or as an index says it whose model goes on."""
    rate = _RATE.get()
    if rate is not None:
        return {_SAID: str(rate)}
    return {_SAID: hints[_SAID]} if hints and _SAID in hints else {}
