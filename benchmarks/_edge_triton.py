"Clients of a tritonserver for benchmarks/edge.py: ours, and what one would write with the client library."

import threading
import time
from collections.abc import Callable

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import shared_memory

from pdm.model.bundle import Bundle
from pdm.serve.engine import OUTPUTS
from pdm.serve.triton import TritonEngine

Ask = Callable[[np.ndarray], object]


class Clients:
    "Three ways to ask one server for the scores of a batch. Each call of `make` gives a way of its own, for one thread."
    def __init__(self, address: str, repository, bundle: Bundle):
        self._address, self._bundle = address, bundle
        self._engine = TritonEngine(f"grpc://{address}", repository=repository)
        self._model = self._engine.load(bundle)
        self._open: list[Callable[[], object]] = [self._engine.close]

    def make(self, kind: str, most: int) -> Ask:
        if kind == "ours":
            return self._model.infer
        client = grpcclient.InferenceServerClient(self._address)
        name, version, outputs = self._model.triton_name, self._model.triton_version, [grpcclient.InferRequestedOutput(o) for o in OUTPUTS]

        def read(answer: grpcclient.InferResult) -> list[np.ndarray]:
            return [answer.as_numpy(o) for o in OUTPUTS]

        self._open.append(client.close)
        if kind == "gRPC":
            def ask(x: np.ndarray) -> list[np.ndarray]:
                window = grpcclient.InferInput("window", list(x.shape), "FP32")
                window.set_data_from_numpy(x)
                return read(client.infer(name, [window], version, outputs=outputs))
            return ask
        c, key = self._bundle.contract, f"edge-bench-{len(self._open)}"
        region = shared_memory.create_shared_memory_region(key, f"/{key}", 4 * most * len(c.channels) * c.samples)
        client.register_system_shared_memory(key, f"/{key}", 4 * most * len(c.channels) * c.samples)
        self._open += [lambda: shared_memory.destroy_shared_memory_region(region), lambda: client.unregister_system_shared_memory(key)]

        def ask_shared(x: np.ndarray) -> list[np.ndarray]:
            shared_memory.set_shared_memory_region(region, [x])
            window = grpcclient.InferInput("window", list(x.shape), "FP32")
            window.set_shared_memory(key, x.nbytes)
            return read(client.infer(name, [window], version, outputs=outputs))
        return ask_shared

    def close(self) -> None:
        for close in reversed(self._open):
            close()


def windows_a_second(asks: list[Ask], batch: np.ndarray, seconds: float) -> float:
    "What so many threads, each with its own way to ask, get through."
    done, end = [0] * len(asks), time.perf_counter() + seconds

    def work(n: int) -> None:
        while time.perf_counter() < end:
            asks[n](batch)
            done[n] += len(batch)

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(asks))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sum(done) / (time.perf_counter() - start)


def paced_ms(ask: Ask, batch: np.ndarray, rate: float, stop: threading.Event) -> list[float]:
    "How long single requests take, one every 1 / `rate` seconds, until `stop`."
    times, start = [], time.perf_counter()
    while not stop.is_set():
        if (wait := start + len(times) / rate - time.perf_counter()) > 0:
            time.sleep(wait)
        since = time.perf_counter()
        ask(batch)
        times.append(1e3 * (time.perf_counter() - since))
    return times
