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
        parameters = json.loads(args["model_config"]).get("parameters", {})
        threads = int(parameters.get("intra_op_threads", {}).get("string_value", "1"))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are shared with the agent
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def execute(self, requests: list) -> list:
        responses = []
        for request in requests:
            try:
                feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
                values = self.session.run(self.outputs, feed)
                tensors = [pb_utils.Tensor(name, value) for name, value in zip(self.outputs, values, strict=True)]
                responses.append(pb_utils.InferenceResponse(tensors))
            except Exception as error:  # noqa: BLE001 (one bad request must not take the others of its batch with it)
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}")))
        return responses
