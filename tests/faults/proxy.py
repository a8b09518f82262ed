"The network between two parts: a TCP proxy that passes on what comes, late, slowly, or not at all."

import asyncio
import socket
import struct
import threading
from collections.abc import Callable

_PIECE = 16384  # bytes read at once


class Proxy:
    "Listens on a free port of 127.0.0.1 and connects each caller to `target`. It runs until `close`."

    def __init__(self, target: str):  # host:port; may be changed at any time, for the connections to come
        self.target = target
        self.latency_s = 0.0                       # each way
        self.bytes_per_s: float | None = None      # of each connection, each way
        self.connections = 0                       # so far
        self._mode = "open"                        # `open`, `cut` or `hole`
        self._pairs: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server, self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        "Reset all connections, and every new one, until `heal`."
        self._set("cut", lambda pair: True)

    def reset(self) -> None:
        "Reset all connections once; new ones pass."
        self._set(self._mode, lambda pair: True)

    def hole(self) -> None:
        "Take what both sides say, and pass on nothing, until `heal`: nobody is told."
        self._set("hole", lambda pair: False)

    def heal(self) -> None:
        "As new. Connections that lost something are reset: TCP would not have lost it."
        self.latency_s, self.bytes_per_s = 0.0, None
        self._set("open", lambda pair: pair.holed)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.cut()
        self._call(end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, coroutine: Callable, *args):
        return asyncio.run_coroutine_threadsafe(coroutine(*args), self._loop).result(10)

    def _set(self, mode: str, end: "Callable[[_Pair], bool]") -> None:
        async def change() -> None:
            self._mode = mode
            for pair in [p for p in self._pairs if end(p)]:
                pair.reset()

        self._call(change)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        pair = _Pair(writer)
        if self._mode == "cut":
            return pair.reset()
        self._pairs.add(pair)
        try:
            host, _, port = self.target.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            pair.writers.append(far_writer)
            async with asyncio.TaskGroup() as both:
                for source, sink in ((reader, far_writer), (far_reader, writer)):
                    line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
                    both.create_task(self._take(pair, source, line))
                    both.create_task(self._pass_on(line, sink))
        except* OSError:  # the target is not there, or one side is gone
            pair.reset()
        finally:
            self._pairs.discard(pair)
            for w in pair.writers:
                w.close()

    async def _take(self, pair: "_Pair", reader: asyncio.StreamReader, line: asyncio.Queue) -> None:
        data = b"?"
        while data:
            data = await reader.read(_PIECE)
            if self._mode == "hole" and data:
                pair.holed = True
            else:
                await line.put((self._loop.time() + self.latency_s, data))

    async def _pass_on(self, line: asyncio.Queue, writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await line.get()
            await asyncio.sleep(due - self._loop.time())
            if not data:
                return writer.close()
            if self.bytes_per_s:
                await asyncio.sleep(len(data) / self.bytes_per_s)
            writer.write(data)
            await writer.drain()


class _Pair:
    "A caller's connection and ours to the target."

    def __init__(self, writer: asyncio.StreamWriter):
        self.writers = [writer]
        self.holed = False  # something of it was not passed on

    def reset(self) -> None:
        "RST to both, whatever is under way."
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
