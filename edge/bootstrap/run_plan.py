"""Execute an engine with TensorRT itself: `python3 run_plan.py PLAN in.npz out.npz REPEATS`, for verify_device.py.

It runs in the Python that has TensorRT, with polygraphy and numpy beside it. Into out.npz go the outputs and, as `seconds`, how long each of the
repeated inferences took.
"""

import sys
import time

import numpy as np
from polygraphy.backend.common import BytesFromPath
from polygraphy.backend.trt import EngineFromBytes, TrtRunner

plan, given, to, repeats = sys.argv[1:]
inputs = dict(np.load(given))
seconds = []
with TrtRunner(EngineFromBytes(BytesFromPath(plan))) as runner:
    outputs = {name: np.array(values) for name, values in runner.infer(inputs).items()}
    for _ in range(int(repeats)):
        begin = time.perf_counter()
        runner.infer(inputs)
        seconds.append(time.perf_counter() - begin)
np.savez(to, seconds=seconds, **outputs)  # type: ignore[arg-type]
