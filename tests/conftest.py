"""Fixtures that several tests share, by room."""

import hypothesis
import numpy as np
import pytest

# how long an example takes says nothing here: a busy machine stalls for seconds
hypothesis.settings.register_profile("pdm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("pdm")

# pdm.serve: a bundle whose scores can be checked by hand, and that needs no training


def rms_graph(channels: int, samples: int, gain: float, conditions: int) -> bytes:
    "ONNX: channel_score = gain · RMS · (1 + sum of the known conditions), score = its mean, embedding = both."
    from onnx import TensorProto, helper

    node = helper.make_node

    def tensor(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

    def constant(name, values, kind=TensorProto.INT64):
        return helper.make_tensor(name, kind, [len(values)], values)

    inputs = [tensor("window", channels, samples)]
    nodes = [
        node("Mul", ["window", "window"], ["square"]),
        node("ReduceMean", ["square", "last"], ["power"], keepdims=0),
        node("Sqrt", ["power"], ["rms"]),
        node("Mul", ["rms", "gain"], ["scaled" if conditions else "channel_score"]),
    ]
    if conditions:
        inputs += [tensor("conditions", conditions), tensor("conditions_known", conditions)]
        nodes += [
            node("Mul", ["conditions", "conditions_known"], ["known"]),
            node("ReduceSum", ["known", "second"], ["sum"], keepdims=1),
            node("Add", ["sum", "one"], ["factor"]),
            node("Mul", ["scaled", "factor"], ["channel_score"]),
        ]
    nodes += [
        node("ReduceMean", ["channel_score", "second"], ["score"], keepdims=1),
        node("Concat", ["channel_score", "score"], ["embedding"], axis=1),
    ]
    outputs = [tensor("score", 1), tensor("channel_score", channels), tensor("embedding", channels + 1)]
    constants = [constant("last", [2]), constant("second", [1]), constant("gain", [gain], TensorProto.FLOAT),
                 constant("one", [1.0], TensorProto.FLOAT)]
    graph = helper.make_graph(nodes, "rms", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory):
    "A function that writes a bundle of `rms_graph`."
    from pdm.model.bundle import Condition, Contract, write_bundle

    folder = tmp_path_factory.mktemp("bundles")

    def make(gain=1.0, conditions=0, channels=("h", "v"), samples=64, **contract):
        ranges = tuple(Condition(name=f"c{i}", unit="1", low=0, high=1) for i in range(conditions))
        return write_bundle(folder, rms_graph(len(channels), samples, gain, conditions), Contract(
            **{"name": "motor", "kind": "mahalanobis", "channels": channels, "units": ("g",) * len(channels), "rate_hz": 25600.0,
               "samples": samples, "conditions": ranges, "embedding": len(channels) + 1, "training_data": "0" * 64, **contract}))

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle):
    "Two channels of 64 samples; the score is the mean of the channels' RMS."
    return make_bundle()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    "A tracking server: slow to start, and shared by all that name their models apart."
    import servers

    server = servers.Mlflow(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.close()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
