"""A server between a client and a store that makes each answer wait, shares out a bandwidth, and writes down what was asked for."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from dataclasses import dataclass
from types import TracebackType

PIECE = 64 << 10


@dataclass(frozen=True)
class Request:
    """`began` and `ended`: `time.time()`. `first`: where a range begins. Bytes are those of the bodies."""

    method: str
    path: str
    first: int | None
    began: float
    ended: float
    sent: int
    received: int


class SlowStore:
    """HTTP/1.1 on a port of its own, passed on to another, in a thread. `latency` in seconds, `bandwidth` in bytes a second, shared by all."""

    def __init__(self, upstream: int, latency: float, bandwidth: float) -> None:
        self.upstream, self.latency, self.bandwidth = upstream, latency, bandwidth
        self.requests: list[Request] = []
        self.port = 0
        self._free_at = 0.0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SlowStore:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _pace(self, count: int) -> None:
        now = self._loop.time()
        self._free_at = max(now, self._free_at) + count / self.bandwidth
        await asyncio.sleep(self._free_at - now)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream, limit=1 << 20)
        try:
            while True:
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except (asyncio.IncompleteReadError, ConnectionError):
                    return
                began = time.time()
                method, path = head.decode("latin-1").split(" ", 2)[:2]
                found = re.search(rb"(?i)\r\nrange: *bytes=(\d+)-", head)
                up_writer.write(head)
                sent = await self._body(head, reader, up_writer, None)
                await asyncio.sleep(self.latency)
                answer = await up_reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                received = await self._body(answer, up_reader, writer, method)
                self.requests.append(
                    Request(
                        method, path, int(found[1]) if found else None, began, time.time(), sent, received
                    )
                )
                if b"connection: close" in answer.lower():
                    return
        except ConnectionError:
            return
        finally:
            writer.close()
            up_writer.close()

    async def _body(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked_by: str | None
    ) -> int:
        """Pass on what follows a head; bytes of it. `asked_by`: of an answer, the method that it answers."""
        status = head.split(b" ", 2)[1] if asked_by else b""
        total = 0
        if asked_by == "HEAD" or status in (b"204", b"304"):
            pass
        elif re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
            while True:
                line = await reader.readline()
                writer.write(line)
                size = int(line.split(b";")[0], 16)
                writer.write(await reader.readexactly(size + 2))
                await self._pace(size)
                total += size
                if size == 0:
                    break
        elif length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
            left = total = int(length[1])
            while left:
                piece = await reader.readexactly(min(left, PIECE))
                writer.write(piece)
                await self._pace(len(piece))
                left -= len(piece)
        await writer.drain()
        return total
