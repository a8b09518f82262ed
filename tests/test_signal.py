"""The physics against what is published, and the diagnosis against faults whose truth is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pdm
from pdm.data.synth import bearing_signal, random_machine, synthetic_recordings
from pdm.errors import InvalidGeometry, InvalidInput, InvalidWindow
from pdm.signal.indicators import indicators
from pdm.signal.kinematics import Bearing, fault_frequencies
from pdm.signal.spectrum import amplitude_spectrum, order_resample, squared_envelope_spectrum

# (bearing, orders of BPFO, BPFI, FTF and BSF as published)
PUBLISHED = {
    "SKF 6205-2RS JEM (CWRU, drive end)": (Bearing(9, 7.94, 39.04), 3.5848, 5.4152, 0.39828, 4.7135 / 2),
    "SKF 6203-2RS JEM (CWRU, fan end)": (Bearing(8, 6.746, 28.4988), 3.0530, 4.9469, 0.38163, 3.9874 / 2),
    "NICE (MFPT), 25 Hz": (Bearing(8, 0.235 * 25.4, 1.245 * 25.4), 81.125 / 25, 118.875 / 25, None, None),
    "Rexnord ZA-2115 (IMS), 2000 rpm": (Bearing(16, 0.331 * 25.4, 2.815 * 25.4, 15.17), 236.4 * 60 / 2000, 296.9 * 60 / 2000, None, 139.9 * 60 / 2000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_are_the_published_ones(name):
    bearing, bpfo, bpfi, ftf, bsf = PUBLISHED[name]
    f = fault_frequencies(bearing, rpm=60)
    assert f.bpfo_hz == pytest.approx(bpfo, rel=2e-3) and f.bpfi_hz == pytest.approx(bpfi, rel=2e-3)
    assert ftf is None or f.ftf_hz == pytest.approx(ftf, rel=2e-3)
    assert bsf is None or f.bsf_hz == pytest.approx(bsf, rel=2e-3)


bearings = st.builds(lambda n, d, r, a: Bearing(n, d, d / r, a), st.integers(3, 40), st.floats(1, 80), st.floats(0.02, 0.6), st.floats(0, 60))


@given(bearings, st.floats(1, 60_000))
def test_sum_rules_hold_for_every_bearing(bearing, rpm):
    f = fault_frequencies(bearing, rpm)
    assert f.bpfo_hz + f.bpfi_hz == pytest.approx(bearing.balls * f.shaft_hz)
    assert f.bpfo_hz == pytest.approx(bearing.balls * f.ftf_hz)
    assert 0 < f.ftf_hz < f.shaft_hz / 2 and f.bpfi_hz > f.bpfo_hz


@pytest.mark.parametrize("geometry,says", [((2, 5, 40), "at least 3"), ((9, 40, 5), "swapped"), ((9, 5, 40, 90), "contact angle")])
def test_a_bearing_that_can_not_exist_is_refused(geometry, says):
    with pytest.raises(InvalidGeometry, match=says):
        Bearing(*geometry)


@given(st.floats(50, 4000), st.floats(0.01, 100))
@settings(max_examples=30)
def test_a_tone_has_its_amplitude(hz, amplitude):
    hz = round(hz)
    t = np.arange(10_000) / 10_000
    freq, a = amplitude_spectrum(amplitude * np.sin(2 * np.pi * hz * t), 10_000)
    assert freq[a.argmax()] == pytest.approx(hz, abs=1.01) and a.max() == pytest.approx(amplitude, rel=0.05)


def test_a_ramp_becomes_one_order():
    rate_hz, rpm = 10_000, np.linspace(600, 1800, 30_000)
    turns = np.cumsum(rpm / 60) / rate_hz
    x, per_turn = order_resample(np.sin(2 * np.pi * 5 * turns), rate_hz, rpm)
    order, a = amplitude_spectrum(x, per_turn)
    assert order[a.argmax()] == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_the_envelope_spectrum_peaks_where_the_truth_says(seed):
    machine = random_machine([77, seed])
    x, truth = bearing_signal(machine, 1200 + 100 * seed, 48_828.0, 4.0, "outer_race", severity=3.0, seed=seed)
    freq, a = squared_envelope_spectrum(x, 48_828.0)
    near = (freq > 0.9 * truth.fault_hz) & (freq < 1.1 * truth.fault_hz)
    assert freq[near][a[near].argmax()] == pytest.approx(truth.fault_hz, rel=0.01)


def test_indicators_are_those_of_the_textbook():
    t = np.arange(4096) / 4096
    got = indicators(np.stack([np.sin(2 * np.pi * 32 * t), 3 * np.sign(np.sin(2 * np.pi * 32 * t + 0.1))]), 4096.0)
    assert got["rms"] == pytest.approx([1 / np.sqrt(2), 3], rel=1e-2)
    assert got["kurtosis"] == pytest.approx([1.5, 1], rel=1e-2)
    assert got["peak"] == pytest.approx([1, 3], rel=1e-2)


@pytest.fixture(scope="module")
def recordings():
    return synthetic_recordings(seed=4)


def test_generated_records_are_named(recordings):
    said = [(r.fault, pdm.diagnose(r.samples[0], r.rate_hz, bearing=r.bearing, rpm=r.rpm).fault) for r in recordings if r.load_n is None or r.load_n > 500]
    wrong = [pair for pair in said if pair[0] != pair[1]]
    assert len(wrong) <= 0.1 * len(said), wrong


def test_a_diagnosis_is_plain_data_with_evidence(recordings):
    r = [r for r in recordings if r.fault == "outer_race"][-1]
    d = pdm.diagnose(r.samples[0], r.rate_hz, bearing=r.bearing, rpm=r.rpm)
    told = json.loads(json.dumps(d.to_dict()))
    assert told["fault"] == d.fault == "outer_race" and told["evidence"] and "BPFO" in d.reason


def test_what_can_not_be_told_is_undetermined_with_the_reason(recordings):
    r = recordings[5]
    d = pdm.diagnose(r.samples[0, :4000], r.rate_hz, bearing=r.bearing, rpm=r.rpm)
    assert d.fault == "undetermined" and "needed" in d.reason
    slow = pdm.diagnose(r.samples[0, ::40], r.rate_hz / 40, bearing=r.bearing, rpm=r.rpm)
    assert slow.fault == "undetermined" and "rate too low" in slow.reason


@pytest.mark.parametrize("signal,rpm", [(np.full(50_000, np.nan), 1500), (np.zeros((2, 2, 50_000)), 1500), (np.ones(50_000), np.ones(3)), ("noise", 1500)])
def test_what_is_no_signal_is_refused(signal, rpm):
    with pytest.raises((InvalidWindow, InvalidInput)):
        pdm.diagnose(signal, 48_828.0, bearing=Bearing(9, 7.94, 39.04), rpm=rpm)


T = np.arange(0, 600.0)


@pytest.mark.parametrize("values,quantity,ok", [
    (20 + 0.1 * np.sin(T / 7) + 0.01 * np.random.default_rng(0).standard_normal(600), "temperature", True),
    (20 + T / 10 + 0.05 * np.random.default_rng(1).standard_normal(600), "temperature", True),   # truly hot
    (np.where(T > 300, 850.0, 40.0) + 0.05 * np.random.default_rng(2).standard_normal(600), "temperature", False),  # an open thermocouple
    (np.where(T > 200, 41.3, 40 + 0.1 * np.random.default_rng(3).standard_normal(600)), "temperature", False),  # stuck
    (np.where(T % 50 == 7, np.nan, 40.0 + 0.1 * np.random.default_rng(4).standard_normal(600)), "temperature", False),
], ids=["well", "hot", "open", "stuck", "gaps"])
def test_a_broken_sensor_is_told_from_a_hot_machine(values, quantity, ok):
    status = pdm.check_sensor(values, 1.0, quantity=quantity)
    assert status.ok is ok and (status.fault in (None, "none", "")) is ok
