"""Triton python-backend model that executes the `model.onnx` beside it with ONNX Runtime.

It runs in Triton's own environment (numpy < 2), which does not have pdm: so nothing of pdm is imported here. Inputs and
outputs are those of the graph; how many threads it may use stands in the parameters of config.pbtxt.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

if int(np.__version__.split(".")[0]) >= 2:
    raise ImportError(f"numpy {np.__version__}: this python backend returns empty tensors with numpy 2, it needs numpy<2")


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        threads = int(config.get("parameters", {}).get("intra_op_threads", {}).get("string_value", "1"))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are shared with the agent
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]
        self.max_batch = config["max_batch_size"]
        self.shapes = {tensor["name"]: tuple(int(dim) for dim in tensor["dims"]) for tensor in config["input"]}  # without the batch
        found = {tensor.name: tuple(tensor.shape[1:]) for tensor in self.session.get_inputs()}
        if found != self.shapes:
            raise ValueError(f"the graph takes {found}, config.pbtxt says {self.shapes}: export it again")

    def execute(self, requests: list) -> list:
        return [self.answer(request) for request in requests]  # one bad request does not take the others of its batch with it

    def answer(self, request):
        try:
            values = self.session.run(self.outputs, self.inputs(request))
            return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(self.outputs, values, strict=True)])
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors have no common base of their own)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))

    def inputs(self, request) -> dict:
        "The request's tensors by name. Raises `ValueError` where they are not what the graph expects."
        feed, rows = {}, 0
        for name, shape in self.shapes.items():
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            value = None if tensor is None else tensor.as_numpy()
            expected = f"{name} must be float32 {[rows or f'1 to {self.max_batch}', *shape]}, all finite"
            if value is None:
                raise ValueError(f"no {name}: {expected}")
            rows = rows or len(value)
            if value.dtype != np.float32 or value.shape != (rows, *shape) or not 1 <= rows <= self.max_batch:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}: {expected}")
            if not np.isfinite(value).all():
                raise ValueError(f"{name} has values that are NaN or infinite: {expected}")
            feed[name] = value
        return feed
