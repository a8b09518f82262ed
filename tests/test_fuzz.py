"""Whatever somebody types, and whatever lies in a file: the command ends with 0 to 3 and a sentence, never with a traceback, and runs nothing that it was given.

The bundle reader and the payloads of the wire are fuzzed where they are tested (tests/test_bundles.py, tests/test_window.py) and, led by coverage, by
tests/fuzz_atheris.py (`make fuzz`). Here are the rest: every command with any arguments, every kind of file that it reads, and releases on their way.
"""

import http.server
import io
import json
import os
import pickle
import shutil
import threading
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy.io import savemat, wavfile

from pdm import cli, pki
from pdm.errors import InvalidBundle, PartMissing, PdmError
from pdm.model.bundle import CalibrationRecord, load_bundle, read_record
from pdm.model.detector import Detector
from pdm.model.folder import contents_digest, file_hashes
from pdm.model.transport import fetch, push

EXAMPLES = int(os.environ.get("PREDMAINT_FUZZ", "60"))

# They run until they are stopped, or for minutes where the arguments are right
LONG = {("demo",), ("agent",), ("sinks",), ("triton", "run"), ("retrain",), ("step",), ("doctor",), ("engine", "build"), ("synth",)}


class Trap:
    "A pickle that leaves a file where it is opened."

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


def commands() -> dict[tuple[str, ...], list]:
    "Every command by its words, with its parameters."
    found = {}

    def walk(group, words):
        for name, c in group.commands.items():
            walk(c, (*words, name)) if hasattr(c, "commands") else found.update({(*words, name): [p for p in c.params if p.name != "help"]})

    walk(typer.main.get_command(cli.app), ())
    return {words: params for words, params in found.items() if words not in LONG}


COMMANDS = commands()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_bundle):
    "A folder with files of every kind that a command reads, right ones and hostile ones."
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4096)).astype(np.float32)
    np.save(folder / "right.npy", x)
    np.savetxt(folder / "right.csv", x.T, delimiter=",", header="h,v", comments="")
    wavfile.write(folder / "right.wav", 8000, (x.T * 1000).astype(np.int16))
    savemat(folder / "right.mat", {"DE": x[0], "rate": 8000.0})
    import pandas as pd
    pd.DataFrame(x.T, columns=["h", "v"]).to_parquet(folder / "right.parquet")
    shutil.copytree(tiny_bundle.path, folder / "bundle")
    (folder / "record.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "junk").write_bytes(rng.bytes(500))
    trap = pickle.dumps(Trap(folder / "sprung"))
    (folder / "pickle.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n" + trap)
    (folder / "pickle").write_bytes(trap)
    (folder / "yaml.yaml").write_text(f"!!python/object/apply:os.mkdir ['{folder / 'sprung'}']\n")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "labels.csv").write_text("asset,time,label\nnowhere,yesterday,nothing\n")
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("../x.npy", bytes(10**6))
    (folder / "round").symlink_to(folder / "round")
    return folder


@pytest.fixture
def here(place, monkeypatch, tmp_path_factory):
    "The settings of nobody."
    for name in [n for n in os.environ if n.startswith("PREDMAINT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREDMAINT_STATE_DIR", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("PREDMAINT_METRICS_PORT", "1")  # nobody answers there
    monkeypatch.chdir(place)
    return place


def run(*args: str) -> tuple[int, str]:
    "A command's exit code, and what it says when that is not 0."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        cli.main(list(args))
    return end.value.code or 0, err.getvalue()


def refused_or_done(args: tuple[str, ...], place: Path) -> None:
    code, said = run(*args)
    assert code in (0, 1, 2, 3), (code, args)
    assert code == 0 or (said.strip() and "Traceback" not in said), (code, args, said)
    assert not (place / "sprung").exists(), args


numbers = st.sampled_from(["", "0", "-1", "1", "8000", "nan", "-inf", "1e400", "1e-400", "9" * 30, "0x10", "1_000", "١٢"])
names = st.sampled_from(["", " ", ".", "..", "a", "-", "--", "h,v", ",", "a" * 300, "../../x", "/", "\udcff", "\u202e", "%s%n", "'; DROP TABLE x; --", "e/s/a/l/fan", "e/s/a/l/fan/x",
                         "e/../a/l/fan", "#", "a" * 64, "0" * 64, "key=value", "=", "vibration", "agent", "2026-01-01", "1970-01-01T00:00:00Z", "30d", "-30d", "9999-12-31"])
places = st.sampled_from(["right.npy", "right.csv", "right.wav", "right.mat", "right.parquet", "bundle", "bundle/bundle.json", "record.json", "empty", "junk", "pickle.npy", "pickle",
                          "yaml.yaml", "deep.json", "labels.csv", "bomb.npz", "round", "nowhere", "nowhere/x", "right.npy/x", "n" * 300, "/dev/null", "/proc/self/mem", "file:nowhere", "s3:", "mqtt://", "mqtt://127.0.0.1:1",
                          "postgresql://127.0.0.1:1/x", "sqlite:junk", "sqlite:junk?table=x", "https://", "http://[", "oci://x", "file:", ":", "://"])
values = numbers | names | places | st.text(st.characters(exclude_characters="\0"), max_size=12)


def of(parameter) -> st.SearchStrategy[str]:
    "Mostly values of its kind."
    kind = str(parameter.type_descriptor.annotation)
    return st.one_of([{"int": numbers, "float": numbers, "Path": places}.get(next((k for k in ("int", "float", "Path") if k in kind), ""), names | places)] * 4 + [values])


@st.composite
def calls(draw) -> tuple[str, ...]:
    "A command with what it needs and some of what it may have, each of any value."
    words = draw(st.sampled_from(sorted(COMMANDS)))
    args: list[str] = []
    for p in COMMANDS[words]:
        if not p.required and draw(st.integers(0, 2)) or p.name in ("watch", "wait"):  # which go on for ever
            continue
        flag = getattr(p, "is_flag", False)
        args += [p.opts[-1]] * (p.param_type_name != "argument") + [draw(of(p))] * (not flag)
    return (*words, *args)


@settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])
@given(args=calls())
def test_any_arguments_end_in_a_sentence(here, args):
    refused_or_done(args, here)


# --- files


@st.composite
def damage(draw):
    "What becomes of the bytes of a file."
    how, at, more = draw(st.sampled_from(["flip", "cut", "append", "insert", "overwrite", "other"])), draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=60))

    def apply(data: bytes) -> bytes:
        place = int(at**4 * len(data))  # mostly in the head
        return {"flip": data[:place] + bytes([(data[place:place + 1] or b"0")[0] ^ more[0]]) + data[place + 1:], "cut": data[:place], "append": data + more,
                "insert": data[:place] + more + data[place:], "overwrite": data[:place] + more + data[place + len(more):], "other": more}[how]

    return apply


ASSETS = b"""assets:
- path: e/s/a/l/fan
  machine_class: group_2_rigid
  poles: 4
  speed_range_rpm: [900, 1500]
  bearings: {drive: {balls: 9, ball_diameter_mm: 7.94, pitch_diameter_mm: 39.04}}
  streams: {vibration: {bundle: bundle, calibration: record.json, bearing: drive, sensors: {h: {unit: g, range: [-16, 16]}}}}
"""
SETTINGS = b"""broker_url = "mqtt://127.0.0.1:1"
batch = 8
alert_urls = ["mqtt:", "http://127.0.0.1:9"]
trusted_keys = ["release.pub"]
[rings]
canary = ["e/s"]
"""
LABELS = b"asset,time,label,fault\ne/s/a/l/fan,2026-01-01T00:00:00Z,fault,outer_race\ne/s/a/l/fan,1767225600,false_alarm,\n"
FILES = {"assets.yaml": (ASSETS, ("bundle", "fetch")), "predmaint.toml": (SETTINGS, ("sinks", "status")), "labels.csv": (LABELS, ("labels", "import", "{file}"))}
RECORD = CalibrationRecord(hop_s=1, scores_db=(-1.0, 0.0, 1.0), centre_db=0, threshold_db=3, confirmations=2, spacing_s=1, exceedance=0.1, false_alarms_per_day=1, supported=True, quiet_s=60,
                           gap_s=60).to_json().encode()
RECORDINGS = ("right.npy", "right.csv", "right.wav", "right.mat", "right.parquet")


@settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])
@given(name=st.sampled_from(RECORDINGS), changes=st.lists(damage(), min_size=1, max_size=3))
def test_any_recording_is_read_or_refused(here, name, changes):
    data = (here / name).read_bytes()
    for change in changes:
        data = change(data)
    (file := here / f"wrong{Path(name).suffix}").write_bytes(data)
    refused_or_done(("diagnose", str(file), "--rate-hz", "8000"), here)


@settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])
@given(kind=st.sampled_from(sorted(FILES)), text=st.none() | st.binary(max_size=80), changes=st.lists(damage(), min_size=1, max_size=3))
@example(kind="assets.yaml", text=b"!!python/object/apply:os.mkdir ['sprung']", changes=[])
@example(kind="assets.yaml", text=b"a: &a [*a]\nassets: *a", changes=[])
@example(kind="predmaint.toml", text=b"\xff", changes=[])
def test_any_settings_records_and_labels_are_read_or_refused(here, monkeypatch, kind, text, changes):
    data, args = FILES[kind]
    data = data if text is None else text
    for change in changes:
        data = change(data)
    (file := here / f"wrong-{kind}").write_bytes(data)
    with monkeypatch.context() as m:
        m.setenv("PREDMAINT_SETTINGS", str(file)) if kind == "predmaint.toml" else m.setenv("PREDMAINT_ASSETS", str(file))
        refused_or_done(tuple(a.format(file=file) for a in args), here)


@given(data=st.binary(max_size=200) | damage().map(lambda change: change(RECORD)))
def test_any_calibration_record_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("record") / "record.json"
    file.write_bytes(data)
    try:
        record = read_record(file)
        assert CalibrationRecord.model_validate_json(record.to_json()) == record
    except InvalidBundle:
        pass


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "model"
    Detector.fit(np.random.default_rng(0).normal(size=(200, 2, 64)), rate_hz=8000, channels=["h", "v"], hop_s=1, kind="mahalanobis").save(folder)
    return folder


@settings(max_examples=EXAMPLES // 3, suppress_health_check=[*HealthCheck])
@given(data=st.data(), change=damage(), renamed=st.booleans())
def test_a_damaged_detector_is_told(here, detector, tmp_path_factory, data, change, renamed):
    folder = Path(shutil.copytree(detector, tmp_path_factory.mktemp("fuzz") / "model"))
    file = folder / data.draw(st.sampled_from(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())))
    file.write_bytes(change(file.read_bytes()))
    if renamed and len(file.parent.name) == 64:  # as somebody would who knows how digests are made
        digest = contents_digest(file_hashes(file.parent))
        for record in folder.glob("*calibration.json"):
            record.write_text(record.read_text().replace(file.parent.name, digest))
        file.parent.rename(folder / digest)
    refused_or_done(("score", str(folder), "right.npy", "--rate-hz", "8000"), here)
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority") / "pki"
    pki.init(folder)
    pki.issue(folder, "e/s/a/l/fan")
    pki.issue(folder, "mosquitto", ["127.0.0.1"])
    return folder


@settings(max_examples=EXAMPLES // 3, suppress_health_check=[*HealthCheck])
@given(data=st.data(), change=damage())
def test_a_damaged_folder_of_certificates_is_told(here, authority, tmp_path_factory, data, change):
    folder = Path(shutil.copytree(authority, tmp_path_factory.mktemp("fuzz") / "pki"))
    file = folder / data.draw(st.sampled_from(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())))
    file.write_bytes(change(file.read_bytes()))
    for args in (("pki", "status", str(folder)), ("pki", "issue", str(folder), "e/s/a/l/fan"), ("pki", "revoke", str(folder), "e/s/a/l/fan"), ("pki", "init", str(folder))):
        refused_or_done(args, here)
    shutil.rmtree(folder.parent)


# --- releases on their way


def fetched_or_refused(url: str, digest: str, into: Path) -> None:
    "Nothing else than the bundle of that digest ever stands under its name."
    try:
        assert fetch(url, digest, into) == into / digest
    except PdmError as e:
        assert isinstance(e, InvalidBundle | PartMissing) and str(e)
        assert not (into / digest).exists()
    else:
        assert load_bundle(into / digest).digest == digest
    assert {p.name for p in into.iterdir()} <= {digest, f"{digest}.calibration", ".fetching"} if into.exists() else True


@settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])
@given(kind=st.sampled_from(["file", "oci-layout"]), data=st.data(), change=damage(), name=st.none() | st.sampled_from(["x", "model.onnx", ".hidden", "\u202e", "a" * 200, "bundle.json"]))
def test_a_release_that_was_changed_where_it_lies_is_refused_or_unharmed(tiny_bundle, tmp_path_factory, kind, data, change, name):
    folder = tmp_path_factory.mktemp("fuzz")
    push(tiny_bundle.path, f"{kind}:{folder / 'store'}")
    file = data.draw(st.sampled_from(sorted(p for p in (folder / "store").rglob("*") if p.is_file())).map(Path))
    file.write_bytes(change(file.read_bytes()))
    if name is not None and not file.with_name(name).exists():
        file.rename(file.with_name(name))
    fetched_or_refused(f"{kind}:{folder / 'store'}", tiny_bundle.digest, folder / "into")
    shutil.rmtree(folder)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["model_versions", "artifact_uri", "version", "files", "path", "is_dir", "file_size", "layers", "digest", "annotations"]), inner, max_size=3), max_leaves=6)


@pytest.fixture(scope="module")
def liar():
    "A server that says what it is told to say, on every path."
    class Liar(http.server.BaseHTTPRequestHandler):
        said: list[tuple[int, bytes]] = []

        def do_GET(self):
            code, body = self.said.pop(0) if len(self.said) > 1 else self.said[0]
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_port, Liar
    server.shutdown()
    server.server_close()
    thread.join()


right = st.sampled_from([{"model_versions": [{"version": "1"}]}, {"artifact_uri": "mlflow-artifacts:/1"}, {"artifact_uri": "mlflow-artifacts:/../.."}, {"artifact_uri": "file:///etc"},
                         {"files": [{"path": "a/model.onnx", "is_dir": False}]}, {"files": [{"path": "../../x", "is_dir": False}]}, {"files": [{"path": "a/bundle.json"}]}])


@settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])
@given(scheme=st.sampled_from(["mlflow+http", "oci"]), answers=st.lists(st.tuples(st.sampled_from([200, 200, 200, 302, 404, 500]), st.one_of(
    right.map(lambda v: json.dumps(v).encode()), json_values.map(lambda v: json.dumps(v).encode()), st.binary(max_size=50))), min_size=1, max_size=5))
def test_a_registry_that_lies_is_refused(tiny_bundle, liar, tmp_path_factory, scheme, answers):
    port, handler = liar
    handler.said = list(answers)
    into = tmp_path_factory.mktemp("fuzz")
    fetched_or_refused(f"{scheme}://127.0.0.1:{port}/fan_motor", tiny_bundle.digest, into)
    shutil.rmtree(into)
