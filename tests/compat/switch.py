"""A TCP proxy whose target a test changes: one server of a release talks to one service, to another, or to none."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class Switch:
    """``url`` stays; ``to(address)`` says where its connections go, ``to(None)`` that they are reset."""

    def __init__(self) -> None:
        self.url = ""
        self._target: tuple[str, int] | None = None
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()

    def to(self, address: str | None) -> None:
        """Connections that are open are closed: none goes on to the former target."""
        parts = urlsplit(address) if address else None
        self._target = (str(parts.hostname), int(parts.port or 80)) if parts else None
        asyncio.run_coroutine_threadsafe(self._close_all(), self._loop).result(10)

    @contextmanager
    def running(self) -> Iterator["Switch"]:
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        thread.start()
        assert started.wait(10), "the proxy did not start"
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(10)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _close_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._target is None:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target)
            self._open.add(target_writer)
            try:
                await asyncio.gather(_copy(reader, target_writer), _copy(target_reader, writer))
            finally:
                self._open.discard(target_writer)
                target_writer.close()
        except OSError:
            pass  # the target is not there, or an end of the connection went away: so does the other
        finally:
            self._open.discard(writer)
            writer.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    sink.close()
