"""A network in fewer bits says what it said in 32, or is not used: reduced graphs, their comparison, and the ladder."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import pdm
from pdm.errors import CheckFailed, InvalidConfig, NotEnoughData, PartMissing
from pdm.model.bundle import write_bundle
from pdm.model.detector import EXAMPLES
from pdm.model.operators import check_operators
from pdm.serve.engine import Artifact, Canary, InProcess, InProcessModel
from pdm.serve.parity import LEAST_TOLERANCE, choose, compare, straddling
from pdm.serve.precision import LOUDER, NETWORK, reduced


def humming(n, seed=0):
    "Two channels of a machine that hums, louder and quieter with its load [n, 2, 1024]; the loads [n]."
    rng = np.random.default_rng(seed)
    load = rng.uniform(0.5, 1.0, n)
    x = np.sin(2 * np.pi * (3000 / 25600 * np.arange(1024) + rng.random((n, 2, 1)))) + 0.2 * rng.normal(size=(n, 2, 1024))
    return (load[:, None, None] * x).astype(np.float32), load


@pytest.fixture(scope="session", params=["conv_ae", "lstm_ae"])
def fitted(request, tmp_path_factory):
    "A detector with a network and a condition, fitted for a moment, its bundle and its record."
    windows, load = humming(300)
    detector = pdm.Detector.fit(windows, 25600, ["h", "v"], 10.0, conditions={"load": load}, kind=request.param, epochs=3, progress=False)
    folder = tmp_path_factory.mktemp(request.param)
    bundle, _ = detector.export(folder)
    return detector, bundle, detector.calibration


def halves(bundle):
    windows, conditions = bundle.examples()
    half = len(windows) // 2
    return (windows[:half], conditions[:half]), (windows[half:], conditions[half:])


def artifact(bundle, precision, tmp_path, **kwargs):
    path = tmp_path / f"{precision}.onnx"
    path.write_bytes(reduced(bundle.onnx.read_bytes(), precision, *halves(bundle)[0]))
    return Artifact(path, precision, **kwargs)


def recurrent(bundle):
    return bundle.contract.kind == "lstm_ae"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_reduced_network_raises_the_alarms_of_the_whole_one(fitted, precision, tmp_path):
    _, bundle, record = fitted
    if recurrent(bundle) and precision == "int8":
        with pytest.raises(CheckFailed, match="nothing to gain from int8"):
            artifact(bundle, precision, tmp_path)
        return
    candidate = InProcessModel(bundle, graph=artifact(bundle, precision, tmp_path).path)
    found = compare(InProcessModel(bundle), candidate, *halves(bundle)[1], [record])
    assert found.ok, found.reason
    assert found.faulty > 50 and found.agreement >= 0.99


def test_what_is_not_the_network_is_left_as_it_was(fitted):
    _, bundle, _ = fitted
    full = bundle.onnx.read_bytes()
    precisions = ["fp16"] if recurrent(bundle) else ["fp16", "int8"]

    def around(graph):
        model = onnx.load_from_string(graph)
        weights = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
        return {n.name: (list(n.input), list(n.output), [weights.get(i) for i in n.input]) for n in model.graph.node
                if n.name.startswith(("front/", "residual/", "scorer/", "level/")) and not n.name.startswith(NETWORK)}

    for precision in precisions:
        graph = reduced(full, precision, *halves(bundle)[0])
        assert around(graph) == around(full)
        assert len(graph) < len(full)
        assert [v.SerializeToString() for v in onnx.load_from_string(graph).graph.input] == [v.SerializeToString() for v in onnx.load_from_string(full).graph.input]
        assert graph == reduced(full, precision, *halves(bundle)[0])  # the same bytes
        check_operators(graph)


def test_what_the_distances_read_is_made_in_32_bits(fitted):
    _, bundle, _ = fitted
    if recurrent(bundle):
        pytest.skip("no LSTM of 8 bits")
    nodes = onnx.load_from_string(reduced(bundle.onnx.read_bytes(), "int8", *halves(bundle)[0])).graph.node
    rounded = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
    inside = [n for n in nodes if n.name.startswith(NETWORK) and n.op_type == "Conv"]
    for_others = {i for n in nodes if n.name.startswith("scorer/") and not n.name.startswith(NETWORK) for i in n.input}
    border = [n for n in inside if for_others.intersection([n.output[0]]) or n.input[0] in for_others]
    assert len(border) == 3 and not any(rounded.intersection(n.input) for n in border)
    assert all(rounded.issuperset(n.input[:2]) for n in inside if n not in border) and len(inside) > len(border)


def test_the_ranges_of_8_bits_leave_room_for_a_louder_machine(fitted):
    _, bundle, _ = fitted
    if recurrent(bundle):
        pytest.skip("no LSTM of 8 bits")
    (windows, conditions), full = halves(bundle)[0], bundle.onnx.read_bytes()

    def range_of_features(given):
        model = onnx.load_from_string(reduced(full, "int8", given, conditions))
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        return 127 * next(float(weights[n.input[1]]) for n in model.graph.node if n.op_type == "QuantizeLinear")

    def extreme(given):
        "Of the standardised features, by the graph itself."
        model = onnx.load_from_string(full)
        feature = next(n.input[0] for n in model.graph.node if n.name.startswith(NETWORK) and n.op_type == "Conv")
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(feature))
        feed = {"window": given, "conditions": conditions, "conditions_known": np.ones_like(conditions)}
        return float(np.abs(ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run([feature], feed)[0]).max())

    still = windows.mean(2, keepdims=True)
    louder = (still + LOUDER * (windows - still)).astype(np.float32)
    assert range_of_features(windows) == pytest.approx(max(extreme(windows), extreme(louder)), rel=1e-3)
    assert range_of_features(windows) > 1.2 * extreme(windows)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_builds_the_reduced_graph(fitted, precision):
    trt = pytest.importorskip("tensorrt_rtx")
    _, bundle, _ = fitted
    if recurrent(bundle) and precision == "int8":
        pytest.skip("no LSTM of 8 bits")
    graph = bundle.onnx.read_bytes()
    if precision != "fp32":
        graph = reduced(graph, precision, *halves(bundle)[0])
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network()
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(graph), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        profile.set_shape(tensor.name, *((n, *tuple(tensor.shape)[1:]) for n in (1, 8, 64)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("size", [1e3, 1e12, 1e30])
def test_no_window_overflows_a_network_of_16_bits(fitted, size, tmp_path):
    _, bundle, _ = fitted
    model = InProcessModel(bundle, graph=artifact(bundle, "fp16", tmp_path).path)
    wild = humming(8, seed=3)[0] * np.float32(size)
    struck = humming(8, seed=4)[0]
    struck[:, :, 500] = size
    for windows in (wild, struck):
        scores = model.infer(windows, np.full((8, 1), 0.75, np.float32)).score
        assert np.isfinite(scores).all() and scores.min() > 1


class Changed:
    "A model, and something done to its scores."

    def __init__(self, model, change):
        self.contract, self.model, self.change = model.contract, model, change

    def infer(self, windows, conditions=None):
        scored = self.model.infer(windows, conditions)
        return replace(scored, score=self.change(scored.score))


@pytest.mark.parametrize("change,said", [
    (lambda s: 1.3 * s, "dB off"),
    (lambda s: s / 1.3, "dB off"),
    (lambda s: np.where(s > np.median(s), np.nan, s), "not finite"),
    (lambda s: np.full_like(s, np.inf), "not finite"),
    (lambda s: np.full_like(s, np.median(s)), "of the alarms"),
    (lambda s: np.where(s > 1, 0.5, s).astype(np.float32), "of the alarms"),
    (lambda s: np.where(np.arange(len(s)) % 8 == 0, np.float32(9), s), "false-alarm promise"),
], ids=["louder", "quieter", "NaN", "infinite", "constant", "deaf", "nervous"])
def test_a_wrong_engine_is_refused_and_told_why(fitted, change, said):
    _, bundle, record = fitted
    model = InProcessModel(bundle)
    found = compare(model, Changed(model, change), *halves(bundle)[1], [record])
    assert not found.ok and said in found.reason


def test_faults_bring_the_score_to_where_thresholds_are(fitted):
    _, bundle, record = fitted
    model = InProcessModel(bundle)
    windows, conditions = straddling(model, *halves(bundle)[1], (record.threshold_db - 6, record.threshold_db + 6))
    above = 20 * np.log10(model.infer(windows, conditions).score) > record.threshold_db
    assert 0.2 < above.mean() < 0.95


def test_comparing_needs_windows_and_does_without_a_calibration(fitted):
    _, bundle, _ = fitted
    model = InProcessModel(bundle)
    found = compare(model, model, *halves(bundle)[1])
    assert found.ok and found.agreement == 1 and found.worst_db == 0 and "no calibration record" in found.thresholds
    with pytest.raises(NotEnoughData, match="export the bundle again"):
        compare(model, model, bundle.examples()[0][:0], None)


def test_the_ladder_takes_the_first_that_holds_and_says_why_not_the_others(fitted, tmp_path):
    _, bundle, record = fitted
    model = InProcessModel(bundle)

    def build(precision):
        if precision == "int8":
            raise PartMissing("no TensorRT here")
        return None if precision == "fp32" else artifact(bundle, precision, tmp_path)

    chosen = choose(bundle, [record], "int8", build, lambda a: InProcess().load(bundle, a))
    assert (chosen.precision, chosen.reasons) == ("fp16", ("int8: no TensorRT here",)) and chosen.parity.ok
    InProcess().load(bundle, chosen.artifact)  # holds at the canary's tolerance

    chosen = choose(bundle, [record], "fp16", build, lambda a: Changed(model, lambda s: 1.3 * s))
    assert chosen.artifact is None and chosen.parity is None
    assert [r.split(":")[0] for r in chosen.reasons] == ["fp16", "fp32"] and "dB off" in chosen.reasons[0]


def test_the_canary_of_a_chosen_artifact_still_tells_another_graph_apart(fitted, tmp_path):
    _, bundle, record = fitted
    chosen = choose(bundle, [record], "int8", lambda p: artifact(bundle, p, tmp_path), lambda a: InProcess().load(bundle, a))
    assert chosen.precision == ("fp16" if recurrent(bundle) else "int8")
    assert LEAST_TOLERANCE <= chosen.artifact.tolerance < 0.25
    model = InProcessModel(bundle)
    with pytest.raises(CheckFailed, match="answers the canary"):
        Canary.of(model, bundle.examples()).prove(Changed(model, lambda s: 1.3 * s), chosen.artifact.tolerance)


def test_a_bundle_without_windows_stays_on_onnx_runtime(tiny_bundle):
    chosen = choose(tiny_bundle, [], "fp16", lambda p: Artifact(tiny_bundle.onnx), lambda a: InProcessModel(tiny_bundle))
    assert chosen.artifact is None and "carries no windows" in chosen.reasons[0]


def test_a_graph_without_a_network_has_nothing_to_reduce(tiny_bundle):
    with pytest.raises(CheckFailed, match="nothing to reduce"):
        reduced(tiny_bundle.onnx.read_bytes(), "fp16")
    with pytest.raises(InvalidConfig, match="expected fp16 or int8"):
        reduced(tiny_bundle.onnx.read_bytes(), "fp8")


def test_a_bundle_carries_what_the_graph_was_trained_on_and_what_it_was_not(fitted, tmp_path):
    detector, bundle, _ = fitted
    windows, load = humming(300)
    given, known = bundle.examples()
    assert len(given) % 2 == 0 and len(given) <= 2 * EXAMPLES
    where = [int(np.flatnonzero((windows == w).all((1, 2)))[0]) for w in given]
    half = len(where) // 2
    assert max(where[:half]) < 180 <= min(where[half:]) and where == sorted(where)
    np.testing.assert_allclose(known[:, 0], load[where], rtol=1e-6)
    again, _ = pdm.Detector.load(bundle.path.parent).export(tmp_path)
    assert again.digest == bundle.digest
    later, _ = detector.export(tmp_path, revision=3)
    assert later.contract.revision == 3 and later.digest != bundle.digest
    assert write_bundle(tmp_path, later.onnx.read_bytes(), later.contract, *later.examples()).digest == later.digest
    detector.export(bundle.path.parent, revision=0)
