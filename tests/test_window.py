"""The wire format: any window round-trips, any corrupt bytes are refused with a reason."""

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pdm.data.window import (
    AssetPath,
    Recording,
    Window,
    decode,
    decode_ack,
    encode,
    encode_ack,
    parse_topic,
    parse_user_properties,
    topic,
    user_properties,
)
from pdm.errors import InvalidConfig, InvalidPayload, InvalidWindow

REASONS = {"unreadable", "unsupported_version", "oversize", "wrong_shape", "wrong_channels", "wrong_rate", "not_finite"}
level = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_ .-]{0,20}\Z")
count = st.integers(0, 2**63 - 1)
finite = st.floats(-(2.0**99), 2.0**99, width=32)


@st.composite
def windows(draw):
    x = draw(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=finite))
    seq = draw(count)
    names = tuple(draw(st.lists(st.text(max_size=8), min_size=len(x), max_size=len(x))))
    return Window(draw(level), draw(count), seq, draw(st.integers(0, seq)), draw(st.integers(0, 2**62 - 1)), draw(st.floats(1e-3, 1e7)), names, names, x,
                  draw(st.dictionaries(st.text(max_size=8), st.floats(-1e9, 1e9), max_size=3)))


@given(windows())
def test_any_window_round_trips(w):
    back = decode(encode(w))
    assert np.array_equal(back.samples, w.samples) and back.samples.dtype == np.float32
    assert {k: v for k, v in vars(back).items() if k != "samples"} == {k: v for k, v in vars(w).items() if k != "samples"}
    assert parse_user_properties(user_properties(w)) == (w.epoch, w.seq, w.oldest)


@given(windows(), st.floats(1e-6, 1e-2))
def test_int16_is_within_half_a_step(w, scale):
    x = np.clip(w.samples, -32000 * scale, 32000 * scale)
    back = decode(encode(Window(**{**vars(w), "samples": x}), scale=scale))
    assert np.abs(back.samples - x).max() <= 0.51 * scale


def refused(payload):
    try:
        decode(payload)
    except InvalidPayload as e:
        assert e.reason in REASONS and str(e)
        return True
    return False


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_reason(payload):
    assert refused(payload)


cbor_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    | st.builds(cbor2.CBORTag, st.integers(0, 300), inner), max_leaves=6)


@settings(max_examples=500)
@given(windows(), st.sampled_from(["v", "stream", "epoch", "seq", "oldest", "t0_ns", "rate_hz", "channels", "units", "samples", "conditions"]), cbor_values)
def test_a_window_with_a_foreign_value_is_read_or_refused_but_never_crashes(w, key, value):
    try:
        payload = cbor2.dumps({**{"v": 1}, **cbor2.loads(encode(w)), key: value})
    except cbor2.CBOREncodeError:
        return
    refused(payload)


@settings(max_examples=500)
@given(windows(), st.data())
def test_a_damaged_window_never_crashes(w, data):
    payload = bytearray(encode(w))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    refused(bytes(payload[: data.draw(st.integers(0, len(payload)))]))


@pytest.mark.parametrize("payload", [b"\x9f" * 100_000, b"\x81" * 100_000, b"\xd8\x23" + cbor2.dumps("((a+)+)+$"), b"\x5b" + b"\xff" * 8, b"\xc2" + cbor2.dumps(b"\xff" * 1000)],
                         ids=["nested indefinite", "nested", "pattern", "endless bytes", "bignum"])
def test_hostile_cbor_is_refused(payload):
    assert refused(payload)


def test_decoding_makes_no_copy_of_the_samples():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    w = decode(encode(Window("s", 1, 2, 0, 0, 10.0, ("a", "b"), ("g", "g"), x)))
    assert not w.samples.flags.owndata and not w.samples.flags.writeable


def test_an_unknown_key_is_passed_over_and_a_higher_version_refused():
    message = cbor2.loads(encode(Window("s", 1, 2, 0, 0, 10.0, ("a",), ("g",), np.ones((1, 3), np.float32))))
    assert decode(cbor2.dumps({**message, "firmware": "2.1"})).seq == 2
    with pytest.raises(InvalidPayload, match="update the agent") as e:
        decode(cbor2.dumps({**message, "v": 2}))
    assert e.value.reason == "unsupported_version"


@given(level, level, level, level, level, level)
def test_topics_round_trip(a, b, c, d, e, stream):
    path = AssetPath(a, b, c, d, e)
    assert parse_topic(topic(path, stream, "window")) == (path, stream, "window")
    assert AssetPath.parse(str(path)) == path


@pytest.mark.parametrize("bad", ["", "a/b", "+", "#", "a#", " a", "$SYS", "x" * 65, "a\0"])
def test_a_name_that_is_no_level_is_refused(bad):
    with pytest.raises(InvalidConfig):
        AssetPath("e", "s", "a", "l", bad)


@given(count, st.integers(-1, 2**63 - 1))
def test_acknowledgements_round_trip(epoch, seq):
    assert decode_ack(encode_ack(epoch, seq)) == (epoch, seq)


@given(st.binary(max_size=60))
def test_any_bytes_are_no_acknowledgement(payload):
    with pytest.raises(InvalidPayload):
        decode_ack(payload)


def test_a_resampled_recording_keeps_its_tone_and_drops_what_would_alias():
    t = np.arange(97656) / 97656
    x = np.sin(2 * np.pi * 1000 * t) + np.sin(2 * np.pi * 40000 * t)
    half = Recording("r", x[None].astype(np.float32), 97656, ("a",), ("g",)).at_rate(48828)
    spectrum = np.abs(np.fft.rfft(half.samples[0])) * 2 / half.samples.shape[1]
    assert half.samples.shape == (1, 48828) and abs(spectrum[1000] - 1) < 0.01
    assert np.delete(spectrum, range(990, 1010)).max() < 0.02


def test_a_recording_shorter_than_a_window_says_so():
    with pytest.raises(InvalidWindow, match="can't be cut"):
        Recording("r", np.zeros((1, 10), np.float32), 10, ("a",), ("g",)).windows(11)
