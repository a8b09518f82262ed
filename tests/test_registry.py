"""The registry with a real MLflow, embedded and as a server: what waits, what is there once, and who the champion is."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from pdm.config import Settings
from pdm.errors import InvalidBundle, InvalidInput, PartMissing
from pdm.loop.promotion import AuditLog
from pdm.loop.record import DataSet, Queue, Record
from pdm.loop.registry import Registry
from pdm.model.bundle import CalibrationRecord
from pdm.model.folder import file_hashes
from pdm.model.signature import Trust, sign, verify
from pdm.model.transport import fetch, gather, push
from pdm.process import free_port

T0 = 1_700_000_000 * 10**9


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return Registry.of(Settings(state_dir=tmp_path_factory.mktemp("state"))).tracking_url


@pytest.fixture(params=["sqlite", "server"])
def registry(request, tmp_path):
    url = request.getfixturevalue("embedded") if request.param == "sqlite" else f"http://127.0.0.1:{request.getfixturevalue('mlflow_server').port}"
    return Registry(url, f"file:{tmp_path / 'queue'}")


@pytest.fixture
def name(request, tmp_path):
    "A model of this test's own."
    return f"motor_{abs(hash((request.node.name, str(tmp_path)))) % 10**9}"


def a_record(step="train", **more) -> Record:
    return Record(**{"name": f"motor/{step}", "step": step, "started_ns": T0, "ended_ns": T0 + 10**9, **more})


def calibrate(bundle, threshold_db=6.0) -> Path:
    "Put a calibration record beside a bundle, where Detector.export leaves it."
    path = bundle.path.with_name("acme.lyon.hall-2.line-1.fan-1.calibration.json")
    path.write_text(CalibrationRecord(asset="acme/lyon/hall-2/line-1/fan-1", model=bundle.digest, hop_s=1, scores_db=(0.0, 1.0), centre_db=0.0, threshold_db=threshold_db,
                                      confirmations=3, spacing_s=1, exceedance=0.1, false_alarms_per_day=1.0, supported=True, quiet_s=60, gap_s=60).to_json())
    return path


@pytest.fixture
def versions(registry, name, make_bundle):
    "Three versions of a model; the last one is the challenger."
    return [registry.register(make_bundle(gain, name=name).path, a_record("package", ended_ns=T0 + i)).version for i, gain in enumerate((1.0, 2.0, 3.0))]


# --- runs


def test_a_record_becomes_a_run_below_its_pipeline_with_all_that_it_holds(registry, name, tmp_path):
    (tmp_path / "made/plots").mkdir(parents=True)
    (tmp_path / "made/train.ipynb").write_text("{}")
    (tmp_path / "made/plots/loss.png").write_bytes(b"\x89PNG")
    series = [(T0 + i * 10**9, float(i)) for i in range(1100)]  # more than MLflow takes at once
    train = a_record(pipeline_run=name, params={f"p{i}": i for i in range(150)} | {"long": "x" * 7000}, metrics={"loss": 0.25}, tags={"shard": "motor"},
                     dataset=DataSet("motor", "5e" * 32, "mfpt:"), system={"system/cpu_utilization_percentage": series}, files=tmp_path / "made")
    run_id = registry.log(train)
    registry.log(a_record("evaluate", pipeline_run=name, status="FAILED"))
    whole = registry.log(Record(name, "pipeline", name, "FAILED", T0, T0 + 5 * 10**9, metrics={"steps": 2.0}))
    client = registry._client
    run, parent = client.get_run(run_id), client.get_run(whole)
    assert run.data.tags["mlflow.parentRunId"] == whole and (run.info.run_name, run.info.status) == ("motor/train", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (T0 // 10**6, T0 // 10**6 + 1000)
    assert len(run.data.params) == 151 and run.data.metrics["loss"] == 0.25
    assert run.data.tags["shard"] == "motor" and run.data.tags["predmaint.dataset"] == "5e" * 32
    (data,) = run.inputs.dataset_inputs
    assert ("5e" * 32).startswith(data.dataset.digest) and json.loads(data.dataset.profile) == {"sha256": "5e" * 32}
    assert [m.value for m in client.get_metric_history(run_id, "system/cpu_utilization_percentage")] == [value for _, value in series]
    assert sorted(f.path for f in client.list_artifacts(run_id)) == ["plots", "train.ipynb"]
    assert (parent.info.run_name, parent.info.status, parent.data.metrics) == (name, "FAILED", {"steps": 2.0})
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{whole}'")
    assert sorted(r.info.status for r in children) == ["FAILED", "FINISHED"]
    page = registry.page(train.id)
    assert page.endswith(run_id) and page.startswith("http") == registry.tracking_url.startswith("http")
    assert Queue(registry.queue).items() == []


def test_steps_that_end_at_once_share_one_parent(registry, name):
    records = [a_record("train", pipeline_run=name, id=f"{name}-{i}") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda r: Registry(registry.tracking_url, registry.queue).log(r), records))
    registry.log(a_record("pipeline", pipeline_run=name))
    found = [registry._client.get_run(r) for r in runs]
    assert len(set(runs)) == 4 and {r.info.lifecycle_stage for r in found} == {"active"}
    (parent,) = registry._client.search_runs([found[0].info.experiment_id], f"tags.`predmaint.pipeline` = '{name}'")
    assert {r.data.tags["mlflow.parentRunId"] for r in found} == {parent.info.run_id}


def test_a_record_that_several_bring_at_once_is_one_run(registry, name):
    record = a_record(pipeline_run=name, id=name, metrics={"loss": 0.5})
    with ThreadPoolExecutor(3) as pool:
        runs = set(pool.map(lambda i: Registry(registry.tracking_url, f"{registry.queue}-{i}").log(record), range(3)))
    experiment = registry._client.get_run(next(iter(runs))).info.experiment_id
    (run,) = registry._client.search_runs([experiment], f"tags.`predmaint.record` = '{name}'")
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})


# --- versions


def test_a_version_is_fetched_by_the_edge_with_signature_and_calibration(mlflow_server, name, make_bundle, tmp_path):
    registry = Registry(f"http://127.0.0.1:{mlflow_server.port}", f"file:{tmp_path / 'queue'}")
    bundle = make_bundle(5.0, name=name)
    calibrate(bundle)
    key = ec.generate_private_key(ec.SECP256R1())
    for file, data in (("key", key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())),
                       ("pub", key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))):
        (tmp_path / file).write_bytes(data)
    folders = gather(bundle.path)
    for folder in folders:
        sign(folder, tmp_path / "key")
    made = registry.register(bundle.path)
    url = f"mlflow+{registry.tracking_url}/{name}"
    came = fetch(url, bundle.digest, tmp_path / "edge")
    for folder in folders:
        arrived = tmp_path / "edge" / folder.name
        assert file_hashes(arrived) == file_hashes(folder) and verify(arrived, Trust(keys=(tmp_path / "pub",))).kind == "key"
    sign(bundle.path, tmp_path / "key")  # anew: another signature under the same contents
    assert registry.register(bundle.path) == made
    assert file_hashes(fetch(url, bundle.digest, tmp_path / "edge", anew=True)) == file_hashes(bundle.path)
    push(bundle.path, url)  # by hand, without the registry
    assert file_hashes(fetch(url, bundle.digest, tmp_path / "by hand")) == file_hashes(came) and registry.version(name, bundle.digest).version == made.version + 1


def test_mlflow_loads_a_version_as_its_own_model(registry, name, make_bundle):
    made = registry.register(make_bundle(2.0, name=name).path, a_record("package"), tags={"trigger": "t-1"})
    assert made.aliases == ("challenger",)
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(registry.tracking_url)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{name}@challenger")
        scores = model.predict({"window": np.ones((3, 2, 64), np.float32)})["score"]
    finally:
        mlflow.set_tracking_uri(before)
    assert np.allclose(scores, 2.0)
    stored = registry._client.get_model_version(name, "1")
    assert stored.tags["trigger"] == "t-1" and registry._client.get_run(stored.run_id).info.run_name == "motor/package"


def test_the_same_release_is_the_same_version_and_another_calibration_is_not(registry, name, make_bundle, tmp_path):
    first = make_bundle(4.0, name=name)
    one = registry.register(first.path, a_record("package"))
    assert registry.register(first.path) == one
    (copy := tmp_path / first.digest).mkdir()
    for file in first.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    calibrate(replace(first, path=copy), threshold_db=7.0)
    two = registry.register(copy)
    assert (two.version, two.digest) == (2, one.digest)
    assert registry.version(name, one.digest) == two and registry.version(name, "ab" * 32) is None


def test_the_challenger_is_what_ended_last_whatever_is_brought_first(registry, name, make_bundle):
    later, earlier = make_bundle(2.0, name=name), make_bundle(1.0, name=name)
    registry.register(later.path, a_record("package", ended_ns=T0 + 20))
    registry.register(earlier.path, a_record("package", ended_ns=T0 + 10))
    assert registry.challenger(name).digest == later.digest


# --- the champion


def test_promotion_and_rollback_move_the_aliases_and_stay_in_the_log(registry, name, versions):
    assert registry.champion(name) is None and registry.challenger(name).version == 3
    registry.promote(name, 1, who="ann", why="the first")
    registry.promote(name, 2, who="ann", why="better")
    row = registry.promote(name, who="gate", why="no worse", metrics={"missed": 0.0})
    assert (row.before, row.after, row.metrics) == (2, 3, {"missed": 0.0})
    assert (registry.champion(name).aliases, registry.previous(name).version, registry.challenger(name)) == (("champion",), 2, None)
    assert [registry.rollback(name, who="bob", why="false alarms").after for _ in range(2)] == [2, 1]
    with pytest.raises(InvalidInput, match="there was none before"):
        registry.rollback(name, who="bob", why="false alarms")
    assert [(r.number, r.action, r.before, r.after, r.void) for r in registry.history(name)] == [
        (1, "promote", None, 1, False), (2, "promote", 1, 2, False), (3, "promote", 2, 3, False), (4, "rollback", 3, 2, False), (5, "rollback", 2, 1, False)]
    assert AuditLog(registry._client, name).aliases() == {"champion": 1}


@pytest.mark.parametrize("call", [lambda r, n: r.promote(n, 9, who="ann", why="x"), lambda r, n: r.promote("no_such_model", who="ann", why="x"),
                                  lambda r, n: r.promote(n, 1, who="ann", why=""), lambda r, n: r.rollback(n, who="ann", why="x"),
                                  lambda r, n: r.promote("it's", who="ann", why="x")])
def test_what_cannot_be_promoted_is_said_and_changes_nothing(embedded, make_bundle, name, tmp_path, call):
    registry = Registry(embedded, f"file:{tmp_path / 'queue'}")
    registry.register(make_bundle(name=name).path)
    with pytest.raises(InvalidInput):
        call(registry, name)
    assert registry.history(name) == [] and AuditLog(registry._client, name).aliases() == {"challenger": 1}


class Dies:
    "A client whose connection is lost after so many calls: each of them was done."

    def __init__(self, client, calls):
        self._client, self._calls = client, calls

    def __getattr__(self, call):
        def called(*args, **kwargs):
            answer = getattr(self._client, call)(*args, **kwargs)
            self._calls -= 1
            if self._calls < 0:
                raise ConnectionError("killed")
            return answer
        return called


@pytest.mark.parametrize("change", ["promote", "rollback"])
def test_whoever_dies_after_any_call_leaves_a_champion_and_one_row(embedded, name, make_bundle, tmp_path, change):
    registry = Registry(embedded, f"file:{tmp_path / 'queue'}")
    bundles = [make_bundle(float(g), name=name) for g in range(1, 3)]
    for bundle in bundles:
        registry.register(bundle.path)
    registry.promote(name, 1, who="ann", why="the first")
    if change == "rollback":
        registry.promote(name, 2, who="ann", why="the second")
    for calls in range(99):
        old, new = (1, 2) if change == "promote" else (2, 1)
        rows = len(registry.history(name))
        dying = Registry(registry.tracking_url, registry.queue)
        dying.__dict__["_client"] = Dies(registry._client, calls)
        dead = False
        try:
            getattr(dying, change)(name, 2, who="ann", why="it is time")
        except PartMissing:
            dead = True
        assert AuditLog(registry._client, name).aliases()["champion"] in (old, new)
        assert registry.champion(name).version in (old, new)
        getattr(registry, change)(name, 2, who="ann", why="it is time")  # tried again
        assert len(registry.history(name)) == rows + 1
        expected = {"champion": 2, "previous": 1} if change == "promote" else {"champion": 1}
        assert AuditLog(registry._client, name).aliases() == expected
        if not dead:
            break
        (registry.rollback if change == "promote" else registry.promote)(name, 2, who="ann", why="and back")
    assert calls > 5


RACER = """
import sys, warnings
warnings.filterwarnings("ignore", "DELETE statement on table 'registered_model_aliases'")  # the other one was faster, and has taken it away
from pdm.errors import InvalidInput
from pdm.loop.registry import Registry
url, queue, name, version, n = sys.argv[1:]
registry = Registry(url, queue)
registry.champion(name)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(n)):
    try:
        registry.promote(name, int(version), who="racer " + version, why="a race")
    except InvalidInput as e:
        assert e.reason == "lost_race", e
"""


def test_of_processes_that_promote_at_once_each_row_counts_or_is_void(embedded, name, make_bundle, tmp_path):
    registry = Registry(embedded, f"file:{tmp_path / 'queue'}")
    for gain in (1.0, 2.0):
        registry.register(make_bundle(gain, name=name).path)
    racers = [subprocess.Popen([sys.executable, "-c", RACER, embedded, registry.queue, name, version, "6"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True) for version in "12"]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert [racer.communicate(timeout=120) for racer in racers] == [("", "")] * 2 and [racer.returncode for racer in racers] == [0, 0]
    the_log_is_sound(registry, name)


def test_an_alias_that_somebody_makes_between_mlflows_look_and_its_insert_is_theirs_then_ours(embedded, name, make_bundle, tmp_path):
    from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModelAlias  # MLflow takes seconds to load
    from sqlalchemy import event

    registry = Registry(embedded, f"file:{tmp_path / 'queue'}")
    for gain in (1.0, 2.0):
        registry.register(make_bundle(gain, name=name).path)
    races = []

    def somebody_is_faster(mapper, connection, target):
        if not races:
            races.append(target.alias)
            Registry(embedded, registry.queue)._client.set_registered_model_alias(name, target.alias, "2")

    event.listen(SqlRegisteredModelAlias, "before_insert", somebody_is_faster)
    try:
        registry.promote(name, 1, who="ann", why="the first")
    finally:
        event.remove(SqlRegisteredModelAlias, "before_insert", somebody_is_faster)
    assert races == ["champion"]
    the_log_is_sound(registry, name)


def test_of_clients_of_a_server_that_promote_at_once_each_row_counts_or_is_void(mlflow_server, name, make_bundle, tmp_path):
    registry = Registry(f"http://127.0.0.1:{mlflow_server.port}", f"file:{tmp_path / 'queue'}")
    for gain in (1.0, 2.0):
        registry.register(make_bundle(gain, name=name).path)

    def race(version):
        for _ in range(4):
            try:
                Registry(registry.tracking_url, registry.queue).promote(name, version, who=f"racer {version}", why="a race")
            except InvalidInput as e:
                assert e.reason == "lost_race"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(race, (1, 2)))
    the_log_is_sound(registry, name)


def the_log_is_sound(registry, name):
    rows = registry.history(name)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1)) and len({row.id for row in rows}) == len(rows)
    counted = [row for row in rows if not row.void]
    assert [row.before for row in counted] == [None, *(row.after for row in counted[:-1])]
    aliases = AuditLog(registry._client, name).aliases()
    assert aliases["champion"] == counted[-1].after == registry.champion(name).version and aliases.get("previous") == counted[-1].before


# --- MLflow is away


@pytest.fixture(params=["file", "memory"])
def queue(request, tmp_path):
    return f"file:{tmp_path / 'queue'}" if request.param == "file" else f"memory://{tmp_path}/queue"


def test_a_trained_model_outlives_the_servers_absence(embedded, queue, name, make_bundle, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Registry(f"http://127.0.0.1:{free_port()}", queue)
    first, second = make_bundle(1.0, name=name), make_bundle(2.0, name=name)
    assert away.register(first.path, a_record("package", ended_ns=T0 + 1)) is None
    assert away.register(second.path, a_record("package", ended_ns=T0 + 2)) is None
    assert away.log(a_record("gate", metrics={"missed": 1.0}, ended_ns=T0 + 3)) is None
    with pytest.raises(PartMissing, match="check tracking_url"):
        away.promote(name, who="ann", why="better")
    with pytest.raises(PartMissing):
        away.flush()
    back = Registry(embedded, queue)
    assert back.flush() == 3 and back.flush() == 0
    assert back.challenger(name).digest == second.digest and back.version(name, first.digest).version == 1


class Faults(BaseHTTPRequestHandler):
    "In front of a real server: passes on so many requests, and then answers 503."

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.left -= 1
        code, answer, kind = 503, b"{}", "application/json"
        if self.server.left >= 0:
            request = Request(f"http://127.0.0.1:{self.server.real}{self.path}", body or None, method=self.command,
                              headers={k: v for k, v in self.headers.items() if k in ("Content-Type", "Accept")})
            try:
                with urlopen(request, timeout=30) as found:
                    code, answer, kind = found.status, found.read(), found.headers.get("Content-Type", kind)
            except HTTPError as e:
                code, answer = e.code, e.read()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

    def log_message(self, *_):
        pass


def test_a_server_that_breaks_off_gets_each_thing_once(mlflow_server, name, make_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "made").mkdir()
    (tmp_path / "made/result.json").write_text("{}")
    with ThreadingHTTPServer(("127.0.0.1", 0), Faults) as proxy:
        proxy.real, proxy.left = mlflow_server.port, 0
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        try:
            registry = Registry(f"http://127.0.0.1:{proxy.server_port}", f"file:{tmp_path / 'queue'}")
            made = registry.register(make_bundle(3.0, name=name).path, a_record("package", pipeline_run=name, id=name, metrics={"loss": 0.5}, files=tmp_path / "made"))
            tries = 0
            while made is None:  # a few requests further each time
                tries += 1
                proxy.left = 5 * tries
                try:
                    registry.flush()
                except PartMissing:
                    continue
                proxy.left = 10**6
                made = registry.challenger(name)
        finally:
            proxy.shutdown()
            thread.join()
    direct = Registry(f"http://127.0.0.1:{mlflow_server.port}", registry.queue)
    (run,) = direct._client.search_runs([direct._client.get_run(made.run_id).info.experiment_id], f"tags.`predmaint.record` = '{name}'")
    assert (made.version, made.aliases, run.info.run_id, run.info.status) == (1, ("challenger",), made.run_id, "FINISHED") and tries > 3
    assert len(direct._client.search_model_versions(f"name = '{name}'")) == 1 and len(direct._client.get_metric_history(made.run_id, "loss")) == 1


def test_an_upload_that_dies_after_any_call_is_finished_and_not_doubled(embedded, name, make_bundle, tmp_path):
    registry, dying = (Registry(embedded, f"file:{tmp_path / 'queue'}") for _ in range(2))
    bundle = make_bundle(3.0, name=name)
    record = a_record("package", pipeline_run=name, id=name, metrics={"loss": 0.5}, dataset=DataSet("motor", "5e" * 32, "mfpt:"))
    for calls in range(99):
        dying.__dict__["_client"] = Dies(registry._client, calls)
        if dying.register(bundle.path, record) is not None:
            break
    made = registry.version(name, bundle.digest)
    (run,) = registry._client.search_runs([registry._client.get_run(made.run_id).info.experiment_id], f"tags.`predmaint.record` = '{name}'")
    assert (made.version, made.aliases, run.info.run_id, run.info.status) == (1, ("challenger",), made.run_id, "FINISHED") and calls > 10
    assert len(registry._client.search_model_versions(f"name = '{name}'")) == 1 and len(registry._client.get_metric_history(made.run_id, "loss")) == 1
    assert Queue(registry.queue).items() == []


def test_a_server_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    before = dict(os.environ)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        registry = Registry(f"http://127.0.0.1:{silent.getsockname()[1]}", f"file:{tmp_path}")
        assert registry.log(a_record()) is None and len(Queue(registry.queue).items()) == 1
    assert dict(os.environ) == before


def test_the_limits_of_mlflow_hold_until_the_last_thread_has_asked(tmp_path):
    before, first, second = dict(os.environ), Registry("http://127.0.0.1:9", f"file:{tmp_path}"), Registry("http://127.0.0.1:9", f"file:{tmp_path}")
    entered, left = threading.Event(), threading.Event()

    def ask() -> str:
        with first._asking():
            entered.set()
            assert left.wait(30)
            return os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]

    with ThreadPoolExecutor(1) as pool:
        with second._asking():
            asked = pool.submit(ask)
            assert entered.wait(30)
        left.set()
        assert asked.result(30)
    assert dict(os.environ) == before


def test_what_mlflow_refuses_waits_and_is_named_and_holds_up_nobody(embedded, tmp_path):
    registry = Registry(embedded, f"file:{tmp_path}")
    with pytest.raises(InvalidInput, match="refuses this"):
        registry.log(a_record(metrics={"loss (dB)": 1.0}))
    Queue(registry.queue).put(a_record("evaluate", ended_ns=T0 + 2 * 10**9, id="good"))
    with pytest.raises(InvalidInput, match="1 of 2 records"):
        registry.flush()
    assert len(Queue(registry.queue).items()) == 1


def test_a_full_disk_is_told_before_anything_is_lost(embedded, make_bundle, name, tmp_path):
    (tmp_path / "full").write_bytes(b"")
    with pytest.raises(PartMissing, match="check the space left"):
        Registry(embedded, f"file:{tmp_path / 'full'}/queue").register(make_bundle(name=name).path)


def test_a_bundle_that_was_touched_is_never_kept(embedded, make_bundle, name, tmp_path):
    bundle = make_bundle(name=name)
    (copy := tmp_path / bundle.digest).mkdir()
    for file in bundle.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes() + b" ")
    registry = Registry(embedded, f"file:{tmp_path / 'queue'}")
    with pytest.raises(InvalidBundle):
        registry.register(copy)
    assert Queue(registry.queue).items() == []


def test_what_a_dead_process_left_half_written_is_no_record_and_goes(tmp_path):
    queue = Queue(f"file:{tmp_path}")
    for ended_ns in (T0, time.time_ns()):
        (tmp_path / f"{ended_ns:020d}-a1" / "files").mkdir(parents=True)
    assert queue.items() == [] and len(list(tmp_path.iterdir())) == 1


# --- the command


def test_promote_tells_from_to_and_lists_the_log(embedded, name, make_bundle, tmp_path, monkeypatch):
    from pdm.cli import app

    def told(*words):
        done = CliRunner().invoke(app, ["promote", *words])
        return done.exception or done.output

    monkeypatch.setenv("PREDMAINT_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("PREDMAINT_TRACKING_URL", f"sqlite:{embedded.removeprefix('sqlite:///')}")
    monkeypatch.setenv("GITHUB_ACTOR", "ann")
    queued = Registry(f"http://127.0.0.1:{free_port()}", f"file:{tmp_path}/runs/queue")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    bundle = make_bundle(1.0, name=name)
    assert queued.register(bundle.path) is None
    answer = json.loads(told(name, "--why", "the first", "--json"))
    assert (answer["champion"], answer["digest"], answer["who"], answer["brought first"]) == ([None, 1], bundle.digest, "ann (CI)", 1)
    assert "the first" in told(name, "--history") and "- → 1" in told(name, "--history")
    assert isinstance(told(name), InvalidInput) and isinstance(told(name, "--rollback", "--why", "x"), InvalidInput)
    monkeypatch.setenv("PREDMAINT_TRACKING_URL", queued.tracking_url)
    assert isinstance(told(name, "--why", "again"), PartMissing)


def test_nothing_is_printed_among_what_a_program_reads(registry, tmp_path, capfd):
    registry.log(a_record(pipeline_run="quiet"))
    Registry.of(Settings(state_dir=tmp_path / "new")).champion("motor")  # makes its tables
    assert capfd.readouterr() == ("", "")


def test_a_release_that_somebody_else_brings_and_drops_meanwhile_is_no_error(registry, name, make_bundle, monkeypatch):
    from pdm.loop import registry as module

    upload, others = module.upload, replace(registry)

    def slow(client, experiment, record):
        monkeypatch.setattr(module, "upload", upload)
        assert others.flush() == 1  # the whole of it, between our taking the item and our looking at its files
        return upload(client, experiment, record)

    monkeypatch.setattr(module, "upload", slow)
    assert registry.register(make_bundle(1.0, name=name).path).aliases == ("challenger",)
    assert Queue(registry.queue).items() == []
