"Clients of a tritonserver for benchmarks/edge.py and serve.py: ours, and what one would write with the client library."

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
    "Ways to ask one server for the scores of a batch. Each call of `make` gives a way of its own, for one thread."
    def __init__(self, address: str, repository, bundle: Bundle, http: str = ""):
        self._address, self._http, self._bundle = address, http, bundle
        self._engines = [TritonEngine(f"grpc://{address}", repository=repository, shared_memory=shared) for shared in (None, False)]
        self._open: list[Callable[[], object]] = [e.close for e in self._engines]
        self._model, self._model_by_message = (e.load(bundle) for e in self._engines)

    def make(self, kind: str, most: int) -> Ask:
        "`ours`, `ours, in the message`, or with tritonclient `gRPC` or `HTTP`, either with `, shared memory`."
        if kind.startswith("ours"):
            return (self._model_by_message if "message" in kind else self._model).infer
        if kind.startswith("HTTP"):
            import tritonclient.http as library
        else:
            library = grpcclient
        client = library.InferenceServerClient(self._http if library is not grpcclient else self._address)
        name, version, outputs = self._model.triton_name, self._model.triton_version, [library.InferRequestedOutput(o) for o in OUTPUTS]
        self._open.append(client.close)

        def read(answer) -> list[np.ndarray]:
            return [answer.as_numpy(o) for o in OUTPUTS]

        def ask(x: np.ndarray) -> list[np.ndarray]:
            window = library.InferInput("window", list(x.shape), "FP32")
            window.set_data_from_numpy(x)
            return read(client.infer(name, [window], version, outputs=outputs))

        if "shared memory" not in kind:
            return ask
        c, key = self._bundle.contract, f"edge-bench-{len(self._open)}"
        size = 4 * most * len(c.channels) * c.samples
        region = shared_memory.create_shared_memory_region(key, f"/{key}", size)
        client.register_system_shared_memory(key, f"/{key}", size)
        self._open += [lambda: shared_memory.destroy_shared_memory_region(region), lambda: client.unregister_system_shared_memory(key)]

        def ask_shared(x: np.ndarray) -> list[np.ndarray]:
            shared_memory.set_shared_memory_region(region, [x])
            window = library.InferInput("window", list(x.shape), "FP32")
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
