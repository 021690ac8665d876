"""A real TCP line between a site and its server: of a given rate, and it can be cut."""

import asyncio
import threading
import time
from contextlib import suppress

CHUNK_BYTES = 16 * 1024
BURST_S = 0.5  # what a sleep that lasted too long is made up for


class Line:
    """Passes bytes from a port of its own to another one and back, in a thread.

    Args:
        target_port: where it leads, on this machine.
        bits_per_s: rate in each direction; None for no limit.

    Attributes:
        port: where it is entered.
        num_bytes: that have passed in both directions.
        num_bytes_back: of these, the ones that came from the target.
    """

    def __init__(self, target_port: int, bits_per_s: float | None = None) -> None:
        self.port = self.num_bytes = self.num_bytes_back = 0
        self._target_port, self._bits_per_s = target_port, bits_per_s
        self._loop = asyncio.new_event_loop()
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def open(self) -> int:
        """Take up connections from now on; returns the port."""
        self._thread.start()
        started = asyncio.start_server(self._connect, "localhost", 0, limit=CHUNK_BYTES)
        self._server = asyncio.run_coroutine_threadsafe(started, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    def limit(self, bits_per_s: float | None) -> None:
        """Another rate from now on."""
        self._bits_per_s = bits_per_s

    def cut(self) -> None:
        """Nothing passes any more, and no end notices: a VPN that drops."""
        self._loop.call_soon_threadsafe(self._is_whole.clear)

    def mend(self, reset: bool = False) -> None:
        """What was held back passes; after a `reset` the old connections are gone and it does not."""
        if reset:
            self._loop.call_soon_threadsafe(lambda: [writer.close() for writer in self._writers])
        self._loop.call_soon_threadsafe(self._is_whole.set)

    def close(self) -> None:
        """The end of it."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _end(self) -> None:
        if self._server:
            self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers.copy():
            writer.close()
        await asyncio.sleep(0)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._is_whole.wait()
        try:
            there, back = await asyncio.open_connection("localhost", self._target_port, limit=CHUNK_BYTES)
        except ConnectionError:  # nobody is there
            writer.close()
            return
        self._writers |= {writer, back}
        try:
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer, is_back=True))
        finally:
            writer.close()
            back.close()
            self._writers -= {writer, back}

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_back: bool = False
    ) -> None:
        free_at = time.monotonic()
        with suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                await self._is_whole.wait()
                if self._bits_per_s:
                    free_at = max(free_at, time.monotonic() - BURST_S) + 8 * len(data) / self._bits_per_s
                    await asyncio.sleep(max(0.0, free_at - time.monotonic()))
                self.num_bytes += len(data)
                self.num_bytes_back += len(data) * is_back
                writer.write(data)
                await writer.drain()
        writer.close()
