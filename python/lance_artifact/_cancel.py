"""Cancelling a call from another thread, or with an asyncio task, where Ctrl-C is not the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, ParamSpec, Protocol, TypeVar

from ._checked import refuse_type
from .exceptions import CancelledError

P = ParamSpec("P")
R = TypeVar("R")


class Event(Protocol):
    """A `threading.Event`, or whatever else says whether it is set."""

    def is_set(self) -> bool: ...


# Seconds between looks.
LOOK = 0.05

_ASKED: ContextVar[Callable[[], Any] | None] = ContextVar("lance_artifact_cancel", default=None)


@contextmanager
def cancel_on(event: Event | Callable[[], bool]) -> Iterator[None]:
    """Calls made within the block end with `CancelledError` soon after the event is set, as after Ctrl-C: nothing is left behind.

    It is looked at about twenty times a second, on the thread of the call. A commit that has begun is not cancelled: it takes a moment,
    and then the call returns. Also an exception raised in a ``progress=`` callable ends a call, and is raised.

    Parameters
    ----------
    event : threading.Event, or callable that gives a bool
        Anything with ``is_set()``.

    Examples
    --------
    >>> stop = threading.Event()
    >>> with la.cancel_on(stop):
    ...     la.create_index(ds, "vector", num_sub_vectors=16)
    """
    asked = getattr(event, "is_set", event)
    if not callable(asked):
        raise refuse_type("event", event, "a threading.Event, or a callable that gives a bool")
    outer = _ASKED.get()
    token = _ASKED.set(asked if outer is None else lambda: outer() or asked())
    try:
        yield
    finally:
        _ASKED.reset(token)


@contextmanager
def shielded() -> Iterator[None]:
    """For what is done to its end once it has begun."""
    token = _ASKED.set(None)
    try:
        yield
    finally:
        _ASKED.reset(token)


def poll() -> None:
    """Raise `CancelledError` where that was asked for."""
    asked = _ASKED.get()
    if asked is not None and asked():
        raise CancelledError("cancelled; nothing was committed")


def wait(seconds: float) -> None:
    """Sleep, and raise `CancelledError` soon after that was asked for."""
    until = time.monotonic() + seconds
    poll()
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, LOOK))
        poll()


async def in_thread(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Await a call of this package, which runs in a thread meanwhile; cancelling the task cancels it, and waits until it is cleaned up.

    A task that is cancelled while the index is being committed may find it committed.

    Examples
    --------
    >>> await la.in_thread(la.create_index, ds, "vector", num_sub_vectors=16)
    """
    # Not at import: few programs need it.
    import asyncio

    stop = threading.Event()

    def call() -> R:
        with cancel_on(stop):
            return function(*args, **kwargs)

    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        # Also where it is cancelled again meanwhile.
        while not task.done():
            with suppress(Exception, asyncio.CancelledError):
                await asyncio.shield(task)
        with suppress(Exception):
            task.exception()
        raise
