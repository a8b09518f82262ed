"""The two readers of what comes from elsewhere, fuzzed with coverage to lead the way: payloads of the wire, and bundles.

    python tests/fuzz_atheris.py {window,bundle} [-max_total_time=60] [options of libFuzzer]

`make fuzz` makes an environment with atheris and runs both. It is no test of pytest's: it goes on until its time is over, and ends with another exit code than 0
where something was raised that the reader does not promise. What it has found lies in build/fuzz, and is the start of the next run.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pdm", "cbor2"]):
    import numpy as np

    from pdm.data.window import Window, decode, encode
    from pdm.errors import InvalidBundle, InvalidInput, InvalidPayload
    from pdm.model.bundle import CalibrationRecord, Contract, load_bundle, read_record, write_bundle

CONTRACT = Contract(name="motor", kind="mahalanobis", channels=("h", "v"), units=("g", "g"), rate_hz=25600, samples=8, embedding=3, training_data="0" * 64,
                    conditions=({"name": "speed_rpm", "low": 900, "high": 1500},))
FOLDER = Path("build/fuzz/work")
NAMES = ("bundle.json", "windows.npy", "conditions.npy")
GOOD = {p.name: p.read_bytes() for p in write_bundle(FOLDER, b"a graph", CONTRACT, np.ones((2, 2, 8)), np.ones((2, 1))).path.iterdir()}
(FUZZED := FOLDER / "fuzzed").mkdir(exist_ok=True)


def window(data: bytes) -> None:
    "Read, or refused with a reason; and what was read is written so that it reads the same."
    try:
        w = decode(data)
    except InvalidPayload as e:
        assert e.reason != InvalidInput("").reason, e  # each has its own
        return
    again = decode(encode(w))
    assert again.samples.shape == w.samples.shape and (again.epoch, again.seq) == (w.epoch, w.seq)


def bundle(data: bytes) -> None:
    "The first byte says which file it is; that folder, and the same bytes as a calibration record."
    for name, content in (GOOD | {NAMES[(data or b"\0")[0] % len(NAMES)]: data[1:]}).items():
        (FUZZED / name).unlink(missing_ok=True)  # to be made anew is faster than to be emptied
        (FUZZED / name).write_bytes(content)
    (FOLDER / "record.json").write_bytes(data[1:])
    for read in (lambda: load_bundle(FUZZED).examples(), lambda: read_record(FOLDER / "record.json", CalibrationRecord)):
        try:
            read()
        except InvalidBundle as e:
            assert e.reason != InvalidInput("").reason, e


def seeds(what: str, folder: Path) -> None:
    "Right ones, to begin with."
    folder.mkdir(parents=True, exist_ok=True)
    if what == "window":
        x = np.ones((2, 8), np.float32)
        some = [encode(Window("vibration", 7, 1, 0, 10**18, 8000.0, ("h", "v"), ("g", "g"), x, {"speed_rpm": 1500.0})), encode(Window("t", 7, 1, 0, 0, 1.0, ("c",), ("degC",), x[:1]), 0.01)]
    else:
        buffer = io.BytesIO()
        np.save(buffer, np.ones((2, 2, 8), np.float32))
        record = CalibrationRecord(hop_s=1, scores_db=(0.0,), centre_db=0, threshold_db=3, confirmations=2, spacing_s=1, exceedance=0.1, false_alarms_per_day=1, supported=True, quiet_s=60, gap_s=60)
        some = [b"\0" + json.dumps(CONTRACT.model_dump(mode="json")).encode(), b"\1" + buffer.getvalue(), b"\0" + record.to_json().encode()]
    for data in some:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


if __name__ == "__main__":
    what, *options = sys.argv[1:] or [""]
    if what not in ("window", "bundle"):
        sys.exit(__doc__)
    corpus = Path("build/fuzz", what)
    seeds(what, corpus)
    atheris.Setup([sys.argv[0], *options, "-max_len=4096", f"-artifact_prefix={corpus.parent}/{what}-", str(corpus)], {"window": window, "bundle": bundle}[what])
    atheris.Fuzz()
