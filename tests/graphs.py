"A graph whose scores can be checked by hand, and that needs no training."


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
