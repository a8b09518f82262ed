"""A model that has passed its gates goes ring by ring to the machines, and its name follows what they report; whoever is away, slow or killed is waited for."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from graphs import rms_graph
from servers import wait_for
from typer.testing import CliRunner
from warehouse_servers import postgres_programs, shared_postgres

from pdm.bundle_cli import bundle
from pdm.config import Settings
from pdm.errors import InvalidBundle, InvalidConfig, InvalidInput, PartMissing
from pdm.loop.approved import gated
from pdm.loop.dispatch import dispatch, token_of
from pdm.loop.registry import Registry
from pdm.loop.release import Releases, advance, follow, put_beside, release, releases_of, reports, signed_by
from pdm.model.bundle import (
    EXCUSED,
    CalibrationRecord,
    Contract,
    Excuse,
    excuse_of,
    load_bundle,
    read_record,
    records_of,
    write_bundle,
)
from pdm.model.signature import sign
from pdm.model.transport import fetch, gather, push
from pdm.process import free_port
from pdm.stream.journal import Group, Journal, Row
from pdm.stream.postgres import PostgresSink
from pdm.stream.reports import Reporter
from pdm.stream.rollout import Rollout, Wanted
from pdm.stream.sinks import running

pytestmark = pytest.mark.timeout(120)
OLD, NEW, OTHER = "1a" * 32, "2b" * 32, "3c" * 32
FAN = "acme/oslo/hall/line/fan"


class Hub:
    "Stands in for GitHub: it writes down what it was told, and answers as it is told to."

    def __init__(self, port: int = 0):
        self.heard, self.answers, self.headers, self.delay_s = [], [204], {}, 0.0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                hub.heard.append((self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                time.sleep(hub.delay_s)
                status = hub.answers.pop(0) if len(hub.answers) > 1 else hub.answers[0]
                if status is None:  # it falls over in mid answer
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in ({"Content-Length": "2"} | hub.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):
                pass  # the client has had enough

        self.http = Server(("127.0.0.1", port), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def payloads(self):
        return [said["client_payload"] for _, _, said in self.heard]


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.close()


def told_to(hub, tmp_path, **more):
    return Settings(state_dir=tmp_path, release_url="github://acme/plant", release_token="t0ken", release_api=f"http://127.0.0.1:{hub.port}", **more)


class Pauses(list):
    def __call__(self, seconds):
        self.append(seconds)


def test_github_is_told_with_token_event_and_payload(hub, tmp_path):
    assert dispatch(told_to(hub, tmp_path), {"digest": NEW}) == 1
    path, headers, said = hub.heard[0]
    assert path == "/repos/acme/plant/dispatches" and headers["Authorization"] == "Bearer t0ken"
    assert said == {"event_type": "model-approved", "client_payload": {"digest": NEW}}


@pytest.mark.parametrize("answers", [[500, 502, 204], [429, 204], [None, 204], [503, None, 503, 204]], ids=str)
def test_a_server_that_stumbles_is_told_again(hub, tmp_path, answers):
    hub.answers = list(answers)
    pauses = Pauses()
    assert dispatch(told_to(hub, tmp_path), {"digest": NEW}, pause=pauses) == len(answers)
    assert len(pauses) == len(answers) - 1 and all(0 < p <= 60 for p in pauses)


def test_a_server_says_how_long_it_wants_to_be_left_alone(hub, tmp_path):
    hub.answers, hub.headers = [403, 204], {"retry-after": "9", "x-ratelimit-remaining": "0"}
    pauses = Pauses()
    dispatch(told_to(hub, tmp_path), {}, pause=pauses)
    assert pauses == [9.0]


def test_a_server_that_is_slow_is_not_waited_for_without_end(hub, tmp_path):
    hub.delay_s = 1.0
    with pytest.raises(PartMissing, match="could not be told"):
        dispatch(told_to(hub, tmp_path), {}, pause=Pauses(), timeout_s=0.05)


@pytest.mark.parametrize("status, says", [(401, "does not count"), (403, "needs to write contents"), (404, "does not see it"), (422, "refuses the fields"), (302, "no yes")])
def test_what_waiting_does_not_change_is_said_at_once(hub, tmp_path, status, says):
    hub.answers = [status]
    with pytest.raises(InvalidConfig, match=says):
        dispatch(told_to(hub, tmp_path), {}, pause=Pauses())
    assert len(hub.heard) == 1


def test_the_token_comes_from_the_environment_or_a_file_and_stands_in_no_message(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PREDMAINT_RELEASE_TOKEN", "from-env")
    assert token_of(Settings()) == "from-env"
    monkeypatch.delenv("PREDMAINT_RELEASE_TOKEN")
    (tmp_path / "token").write_text("from-file\n")
    assert token_of(Settings(release_token_file=tmp_path / "token")) == "from-file"
    for file in (None, tmp_path / "none"):
        with pytest.raises(InvalidConfig, match="token"):
            token_of(Settings(release_token_file=file))
    hub.answers = [401]
    with pytest.raises(InvalidConfig) as e:
        dispatch(told_to(hub, tmp_path), {})
    assert "t0ken" not in f"{e.value}{Settings(release_token='t0ken')!r}"


# --- rings


@pytest.fixture(params=list(postgres_programs())[:1] or [pytest.param("none", marks=pytest.mark.skip("no PostgreSQL: pip install 'predmaint[embedded]'"))])
def server(request):
    return shared_postgres(request.param)


@pytest.fixture(scope="module")
def tracking_url(tmp_path_factory):
    "An MLflow for all tests of this file; each has a model of its own."
    return f"sqlite:{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def plant(server, hub, tracking_url, tmp_path):
    return Plant(server, hub, tracking_url, tmp_path)


class Plant:
    "Three sites in two rings, their reports in a real PostgreSQL, and a real registry."

    def __init__(self, server, hub, tracking_url, tmp_path):
        self.url = server.new_database(f"t{uuid.uuid4().hex}")
        self.settings = told_to(hub, tmp_path, warehouse_url=self.url, tracking_url=tracking_url,
                                rings={"canary": ("acme/oslo",), "rest": ("acme/bergen", "acme/lyon")})
        self.sink, self.t_ns = PostgresSink(self.url), time.time_ns()
        self.sink.init()
        self.registry = Registry.of(self.settings)
        client = self.registry._client
        self.name = f"fan_{uuid.uuid4().hex[:8]}"
        client.create_registered_model(self.name)
        for digest in (OLD, NEW, OTHER):
            client.create_model_version(self.name, f"{tmp_path}/model", tags={"digest": digest})
        self.registry.promote(self.name, 1, who="test", why="the first")

    def says(self, site, after, reason="as the test says", digest=NEW, **details):
        self.t_ns = max(self.t_ns + 1, time.time_ns())
        self.sink.report([(site, "agent", self.t_ns, digest, self.name, "", after, reason, json.dumps(details))])

    def advance(self):
        return advance(self.settings, self.registry, self.name, pause=Pauses())

    def champion(self):
        return self.registry.champion(self.name).digest


def told(hub):
    return [(p["ring"], p["digest"], p["rollback"]) for p in hub.payloads()]


def test_a_model_goes_ring_by_ring_and_the_name_follows_the_canary(plant, hub):
    assert release(plant.settings, plant.name, NEW, version=2, verdicts={"promise": "yes"})
    assert plant.advance().rings == {"canary": "told"} and plant.champion() == OLD
    for state in ("fetched", "verified", "built", "parity", "shadow"):
        plant.says("acme/oslo", state)
        assert plant.advance().state == "waiting"
    plant.says("acme/oslo", "promoted", "300 of 300 windows judged alike")
    standing = plant.advance()
    assert (standing.rings, standing.champion, plant.champion()) == ({"canary": "promoted"}, True, NEW) and "the probation at canary" in standing.sentence
    plant.says("acme/oslo", "promoted", "the probation is over", settled=True)
    assert plant.advance().rings == {"canary": "settled", "rest": "told"}
    assert "acme/oslo: 300 of 300" in plant.registry.history(plant.name)[-1].why and plant.registry.history(plant.name)[-1].who == "release"
    plant.says("acme/bergen", "promoted")  # acme/lyon is away, and catches up later
    assert plant.advance().state == "done"
    assert [(p["ring"], p["digest"], p["version"], p["verdicts"]) for p in hub.payloads()] == [("canary", NEW, 2, {"promise": "yes"}), ("rest", NEW, 2, {"promise": "yes"})]
    assert all(len(p) <= 10 for p in hub.payloads())  # GitHub takes no more
    plant.says("acme/lyon", "promoted")
    assert plant.advance().state == "done" and len(hub.heard) == 2 and len(plant.registry.history(plant.name)) == 2


def test_a_canary_that_refuses_ends_it(plant, hub):
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "rolled_back", "the versions agree on 61 of 100 windows")
    standing = plant.advance()
    assert standing.state == "stopped" and "61 of 100" in standing.sentence
    assert plant.champion() == OLD and told(hub) == [("canary", NEW, False), ("canary", OLD, True)]
    assert plant.advance() == standing and len(hub.heard) == 2
    back = hub.payloads()[-1]
    assert back["instead"] == NEW and "61 of 100" in back["why"] and back["id"] != hub.payloads()[0]["id"] and len(back) <= 10


def test_a_canary_that_comes_back_on_probation_takes_the_name_back_and_no_further_ring_is_told(plant, hub):
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "promoted")
    plant.advance()
    assert plant.champion() == NEW
    assert told(hub) == [("canary", NEW, False)], "it may come back from it still"
    plant.says("acme/oslo", "rolled_back", "4 alarms of its own")
    assert (plant.advance().state, plant.champion()) == ("stopped", OLD)
    plant.advance()
    assert [row.action for row in plant.registry.history(plant.name)] == ["promote", "promote", "rollback"]
    assert told(hub) == [("canary", NEW, False), ("canary", OLD, True)]


def test_rings_that_were_told_go_back_with_a_site_of_the_canary_that_came_late(plant, hub):
    plant.settings = plant.settings.model_copy(update={"rings": {"canary": ("acme/oslo", "acme/rome"), "rest": ("acme/bergen", "acme/lyon")}})
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "promoted")
    plant.says("acme/oslo", "promoted", "the probation is over", settled=True)
    assert plant.advance().rings == {"canary": "settled", "rest": "told"}  # acme/rome is away
    plant.says("acme/rome", "rolled_back")
    assert (plant.advance().state, plant.champion()) == ("stopped", OLD)
    assert told(hub) == [("canary", NEW, False), ("rest", NEW, False), ("canary", OLD, True), ("rest", OLD, True)]


def test_a_ring_has_promoted_when_all_of_its_sites_that_say_anything_have(plant, hub):
    plant.settings = plant.settings.model_copy(update={"rings": {"canary": ("acme/oslo", "acme/rome", "acme/turin"), "rest": ("acme/bergen",)}})
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "promoted", settled=True)
    plant.says("acme/rome", "shadow")
    assert (plant.advance().rings, plant.champion()) == ({"canary": "told"}, OLD)
    plant.says("acme/rome", "promoted")
    assert (plant.advance().rings, plant.champion()) == ({"canary": "promoted"}, NEW)
    plant.says("acme/rome", "promoted", settled=True)
    assert plant.advance().rings == {"canary": "settled", "rest": "told"}  # acme/turin is away


def test_a_ring_that_refuses_what_the_canary_is_through_with_goes_back_alone(plant, hub):
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "promoted", settled=True)
    plant.advance()
    plant.says("acme/bergen", "promoted")
    plant.says("acme/lyon", "rolled_back")
    assert (plant.advance().state, plant.champion()) == ("stopped", NEW)
    assert told(hub) == [("canary", NEW, False), ("rest", NEW, False), ("rest", OLD, True)]


@pytest.mark.parametrize("through", [True, False])
def test_a_ring_goes_back_to_the_last_release_that_has_outlived_its_probation_there(plant, hub, through):
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "promoted")
    plant.advance()
    release(plant.settings, plant.name, OTHER)
    plant.advance()
    plant.says("acme/oslo", "promoted" if through else "rolled_back", **({"settled": True} if through else {}))
    plant.says("acme/oslo", "rolled_back", digest=OTHER)
    assert plant.advance().state == "stopped"
    assert told(hub)[2:] == ([("canary", NEW, True)] if through else [])
    releases = releases_of(plant.settings)
    back = [s.reason for s in releases.steps(releases.newest()) if s.state == "back"]
    releases.close()
    assert through or "by hand" in back[0]


def test_a_ci_that_is_away_is_told_of_the_way_back_when_it_is_there_again(plant, hub):
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "rolled_back")
    hub.close()
    with pytest.raises(PartMissing):
        plant.advance()
    again = Hub(hub.port)
    try:
        assert plant.advance().state == plant.advance().state == "stopped" and told(again) == [("canary", OLD, True)]
    finally:
        again.close()


def test_a_name_that_somebody_else_has_by_now_is_left_to_them(plant, hub):
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "promoted")
    plant.advance()
    plant.registry.promote(plant.name, 3, who="ann", why="by hand")
    plant.says("acme/oslo", "rolled_back")
    assert (plant.advance().state, plant.champion()) == ("stopped", OTHER)
    assert told(hub)[-1] == ("canary", OLD, True), "and what nobody has tried is not sent to machines"


def test_a_release_is_told_once_however_often_it_is_asked_for(plant, hub):
    assert [release(plant.settings, plant.name, NEW) for _ in range(3)] == [True, False, False]
    for _ in range(3):
        plant.advance()
    assert len(hub.heard) == 1


def test_a_ci_that_is_away_is_told_when_it_is_back(plant, hub):
    release(plant.settings, plant.name, NEW)
    hub.close()
    with pytest.raises(PartMissing, match="told again when this is run again"):
        plant.advance()
    again = Hub(hub.port)
    try:
        assert plant.advance().rings == {"canary": "told"} and len(again.heard) == 1
    finally:
        again.close()


_KILLED = """
import os, signal, sys
from pdm.config import load_settings
from pdm.loop import release
real = release.dispatch
def dies(*args, **kwargs):
    real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
release.dispatch = dies
release.advance(load_settings(), None, sys.argv[1])
"""


def test_whoever_is_killed_after_telling_tells_the_same_again(plant, hub, tmp_path):
    release(plant.settings, plant.name, NEW)
    s = plant.settings
    told = {"STATE_DIR": s.state_dir, "RELEASE_URL": s.release_url, "RELEASE_TOKEN": "t0ken", "RELEASE_API": s.release_api, "WAREHOUSE_URL": s.warehouse_url,
            "RINGS": json.dumps(s.rings)}
    died = subprocess.run([sys.executable, "-c", _KILLED, plant.name], env={**os.environ, **{f"PREDMAINT_{k}": str(v) for k, v in told.items()}}, check=False, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert plant.advance().rings == {"canary": "told"}
    first, second = hub.payloads()
    assert first == second and first["id"]  # so that whoever hears it can tell


def test_two_controllers_do_not_tell_at_once(plant, hub):
    release(plant.settings, plant.name, NEW)
    releases = releases_of(plant.settings)
    with releases.alone(), pytest.raises(PartMissing, match="another process"):
        plant.advance()
    releases.close()
    assert not hub.heard and plant.advance().rings == {"canary": "told"}


def test_a_model_that_has_outlived_its_probation_is_not_refused_when_another_takes_its_place(plant):
    release(plant.settings, plant.name, NEW)
    plant.advance()
    plant.says("acme/oslo", "promoted")
    plant.says("acme/oslo", "promoted", "the probation is over", settled=True)
    plant.says("acme/bergen", "promoted")
    assert plant.advance().state == "done"
    plant.says("acme/oslo", "rolled_back", "it is not wanted any more")  # somebody deploys another one by hand
    assert (plant.advance().state, plant.champion()) == ("done", NEW)


def test_a_node_alone_tells_a_first_life_from_a_way_back(tmp_path):
    settings, rollout = Settings(state_dir=tmp_path, release_url="file:"), Rollout(tmp_path / "rollout.db")
    rollout.want((Wanted(OLD),))
    for state in ("fetched", "verified", "built", "parity", "shadow", "promoted"):
        rollout.move(OLD, state, "at first", 1, **({"name": "fan"} if state == "verified" else {}))
    rollout.settle(OLD, "the probation is over", 2)
    assert [r.state for r in reports(settings, OLD)] == ["promoted"]
    release(settings, "fan", OLD, rollback=True)
    assert advance(settings, None, "fan").state == "waiting"  # it ran once; whether it does again is not known yet
    rollout.move(OLD, "wanted", "it is wanted again")
    rollout.move(OLD, "promoted", "a rollback, asked for by name")
    rollout.close()
    assert advance(settings, None, "fan").state == "done"


def test_a_way_back_needs_no_canary(plant, hub):
    plant.says("acme/oslo", "promoted", "at first", digest=OLD)
    plant.registry.promote(plant.name, 2, who="test", why="it ran")
    release(plant.settings, plant.name, OLD, rollback=True)
    plant.advance()
    assert [(p["ring"], p["rollback"]) for p in hub.payloads()] == [("canary", True), ("rest", True)]
    plant.says("acme/oslo", "promoted", digest=OLD)
    plant.says("acme/lyon", "promoted", digest=OLD)
    assert (plant.advance().state, plant.champion()) == ("done", OLD)
    assert plant.registry.history(plant.name)[-1].action == "rollback"


def test_one_goes_back_to_a_model_as_often_as_need_be(plant, hub):
    for digest, back in ((OLD, True), (NEW, False), (OLD, True)):
        assert release(plant.settings, plant.name, digest, rollback=back) and not release(plant.settings, plant.name, digest, rollback=back)
        plant.advance()
    assert [p[:2] for p in told(hub)] == [("canary", OLD), ("rest", OLD), ("canary", NEW), ("canary", OLD), ("rest", OLD)] and len({p["id"] for p in hub.payloads()}) == 5
    assert not release(plant.settings, plant.name, NEW), "what was released before is begun again by going back to it"
    assert plant.advance().digest == OLD


def test_a_model_that_runs_before_the_registry_knows_it_gets_its_name_later(plant):
    release(plant.settings, plant.name, "4d" * 32)
    plant.advance()
    plant.says("acme/oslo", "promoted", digest="4d" * 32)
    with pytest.raises(PartMissing, match="not in MLflow yet"):
        plant.advance()
    plant.registry._client.create_model_version(plant.name, "here", tags={"digest": "4d" * 32})
    plant.advance()
    assert plant.champion() == "4d" * 32


def test_reports_of_a_node_arrive_once_and_in_full_after_a_week_without_a_network(plant, tmp_path):
    rollout, stop = Rollout(tmp_path / "site/rollout.db"), threading.Event()
    rollout.want((Wanted(NEW),))
    for t, state in enumerate(("fetched", "verified", "built", "parity", "shadow"), 1):
        rollout.move(NEW, state, f"it is {state}", t, **({"name": "fan"} if state == "verified" else {}))
    away = Reporter(tmp_path / "site/rollout.db", PostgresSink(f"postgresql://pdm@127.0.0.1:{free_port()}/none"), lambda: ["acme/lyon"], "agent", stop)
    with pytest.raises(PartMissing):
        away.turn()
    for _ in range(2):  # and one that was started anew says it all again
        assert Reporter(tmp_path / "site/rollout.db", plant.sink, lambda: ["acme/lyon"], "agent", stop).turn() == 5
    assert [(r.site, r.node, r.state, r.reason) for r in reports(plant.settings, NEW)] == [("acme/lyon", "agent", "shadow", "it is shadow")]
    rollout.move(NEW, "promoted", "done", 9)
    rollout.close()
    reporter = Reporter(tmp_path / "site/rollout.db", PostgresSink(plant.url), lambda: ["acme/lyon"], "agent", stop).start()
    wait_for(lambda: [r.state for r in reports(plant.settings, NEW)] == ["promoted"])
    reporter.stop()


def test_the_service_of_the_sinks_carries_the_steps_of_its_node_under_the_sites_of_its_machines(plant, tmp_path):
    settings = Settings(state_dir=tmp_path / "node", warehouse_url=plant.url, sinks_metrics_port=0, agent_id="cell-7")
    rollout = Rollout(settings.rollout_file)
    rollout.want((Wanted(NEW),))
    rollout.move(NEW, "fetched", "from the bucket", 1)
    row = Row(FAN, "vibration", 7, 0, 10**9, 0, 1.5, 0.5, 0.25, 0.1, 1.6, False, 0, "running", "none", None, True, False, {"h": 1.5}, {}, {},
              np.zeros(2, np.float32), OLD, "triton")
    with Journal(settings.state_dir / "journal.db") as journal, running(settings) as look:
        look()  # there is a journal, and no machine in it yet: nobody could say where this node is
        assert reports(plant.settings, NEW) == []
        journal.commit([Group(rows=[row])])
        wait_for(lambda: [(r.site, r.node, r.state) for r in reports(plant.settings, NEW)] == [("acme/oslo", "cell-7", "fetched")])
    rollout.close()


# --- one node


def test_a_node_alone_gets_the_line_of_its_type_exchanged_and_others_stay(tmp_path):
    settings = Settings(state_dir=tmp_path, release_url="file:")
    rollout = Rollout(settings.rollout_file)
    rollout.want((Wanted(OLD),))
    rollout.move(OLD, "fetched", "")
    contract = Contract(name="pump", kind="mahalanobis", channels=("h",), units=("g",), rate_hz=1000, samples=64, embedding=1, training_data="0" * 64)
    before, other = (write_bundle(settings.bundles_dir, rms_graph(1, 64, 1.0, 0), contract.model_copy(update=c)).digest for c in ({"name": "fan"}, {"name": "pump"}))
    settings.desired_file.write_text(f"# by hand\n{before}\n{other}\n")
    release(settings, "fan", NEW)
    assert follow(settings, None, "fan", timeout_s=0.0).state == "waiting"
    assert settings.desired_file.read_text() == f"# by hand\n{other}\n{NEW}\n"
    rollout.want((Wanted(NEW),))
    rollout.move(NEW, "rolled_back", "no")
    assert follow(settings, None, "fan", timeout_s=0.0).state == "stopped"
    assert settings.desired_file.read_text() == f"# by hand\n{other}\n{before} rollback\n"
    rollout.close()


@pytest.mark.parametrize("written, stays", [(f"{OTHER}\n", f"{OTHER}\n"), (f"{NEW}\n", "\n")], ids=["by somebody else since", "and nothing before"])
def test_a_node_alone_that_refuses_a_model_is_left_to_whoever_has_written_another_one(tmp_path, written, stays):
    settings, rollout = Settings(state_dir=tmp_path, release_url="file:"), Rollout(tmp_path / "rollout.db")
    release(settings, "fan", NEW)
    advance(settings, None, "fan")
    rollout.want((Wanted(NEW),))
    rollout.move(NEW, "rolled_back", "no")
    rollout.close()
    settings.desired_file.write_text(written)
    assert advance(settings, None, "fan").state == "stopped" and settings.desired_file.read_text() == stays


def test_a_file_for_each_ring_is_written_where_the_overlays_are(plant, tmp_path):
    settings = plant.settings.model_copy(update={"release_url": f"file:{tmp_path}/overlays/{{ring}}/desired"})
    (tmp_path / "overlays/canary").mkdir(parents=True)
    (tmp_path / "overlays/canary/desired").write_text(f"{OLD}\n")
    release(settings, plant.name, NEW)
    advance(settings, plant.registry, plant.name)
    assert (tmp_path / "overlays/canary/desired").read_text() == f"{NEW}\n" and not (tmp_path / "overlays/rest").exists()


def test_without_anybody_to_tell_the_name_still_follows_what_somebody_deploys(tmp_path):
    settings = Settings(state_dir=tmp_path)
    release(settings, "fan", NEW)
    assert advance(settings, None, "fan").state == "waiting" and not settings.desired_file.exists()
    rollout = Rollout(settings.rollout_file)
    rollout.want((Wanted(NEW),))
    for state in ("fetched", "verified", "built", "parity", "shadow", "promoted"):
        rollout.move(NEW, state, "by hand", **({"name": "fan"} if state == "verified" else {}))
    rollout.close()
    assert advance(settings, None, "fan").state == "done"


@pytest.mark.parametrize("call, error, says", [
    (lambda s: release(s, "fan", "latest"), InvalidInput, "64 hexadecimal digits"), (lambda s: advance(s, None, "fan"), InvalidInput, "no release of fan"),
    (lambda s: reports(s.model_copy(update={"rings": {"canary": ("acme/oslo",)}}), NEW), InvalidConfig, "come together"),
    (lambda s: Releases(s.state_dir / "file/x.db"), PartMissing, "can't be opened"), (lambda s: Releases(s.state_dir / "file"), PartMissing, "file is not a database"),
    (lambda s: Releases(s.state_dir / "newer.db"), InvalidConfig, "has schema 99, this pdm knows 1")], ids=["digest", "none", "rings", "disk", "no database", "newer"])
def test_what_makes_no_sense_is_said(tmp_path, call, error, says):
    (tmp_path / "file").write_text("something else, and more of it than a header is long")
    with closing(sqlite3.connect(tmp_path / "newer.db")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(error, match=says):
        call(Settings(state_dir=tmp_path))


# --- what goes with a bundle


@pytest.fixture
def made(tmp_path):
    contract = Contract(name="fan", kind="mahalanobis", channels=("h",), units=("g",), rate_hz=1000, samples=64, embedding=1, training_data="0" * 64)
    bundle = write_bundle(tmp_path / "made", rms_graph(1, 64, 1.0, 0), contract)
    record = CalibrationRecord(asset=FAN, model=bundle.digest, hop_s=10, scores_db=tuple(range(-20, 0)), centre_db=-10, threshold_db=-1, confirmations=3, spacing_s=10,
                               exceedance=0.05, false_alarms_per_day=1, supported=True, quiet_s=60, gap_s=100)
    (tmp_path / "made" / f"{FAN.replace('/', '.')}.calibration.json").write_text(record.to_json())
    return bundle


def test_an_excuse_and_references_lie_in_the_folder_that_is_signed_and_arrive_with_the_bundle_wherever_it_goes(made, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    (tmp_path / "key").write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "acme.oslo.hall.line.fan.reference.npz").write_bytes(b"PK..")
    excuses = [{"champion": OLD, "streams": {f"{FAN}/vibration": "warmer", "acme/lyon/hall/line/pump/vibration": "warmer"}}, {"champion": OTHER, "streams": {"x/y": "no"}}]
    monkeypatch.chdir(tmp_path)
    made = load_bundle(made.path.relative_to(tmp_path))  # as a step names it
    assert put_beside(made, json.dumps(excuses), tmp_path / "references") == [EXCUSED, "acme.oslo.hall.line.fan.reference.npz"]
    assert excuse_of(made.path.parent, made.digest) == Excuse(champion=OLD, streams={f"{FAN}/vibration": "warmer"})
    for folder in (made.path, made.path.with_name(f"{made.digest}.calibration")):
        sign(folder, tmp_path / "key")
    assert signed_by(made.path) == "key" and [r.asset for r in records_of(made)] == [FAN]
    for place in (f"file:{tmp_path}/place", "memory://release-test", f"oci-layout:{tmp_path}/layout"):
        push(made.path, place)
        there = tmp_path / place.partition(":")[0]
        came = load_bundle(fetch(place, made.digest, there))
        names = {f.name for f in (there / f"{made.digest}.calibration").iterdir()}
        assert names == {f"{FAN.replace('/', '.')}.calibration.json", EXCUSED, "acme.oslo.hall.line.fan.reference.npz", "signature"}
        assert records_of(came)[0].asset == FAN


@pytest.mark.parametrize("change, says", [({"digest": OLD}, "is about bundle 1a1a"), ({"criteria": None}, ""), (None, "no answer of the gate")], ids=["of another bundle", "its own", "no JSON"])
def test_what_the_gate_said_is_signed_with_the_bundle_that_it_is_about(made, tmp_path, change, says):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    (tmp_path / "key").write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    answer = {"digest": made.digest, "passed": True, "probation": False, "criteria": [{"name": "promise", "passed": True, "says": "no alarm"}], "judged": {}}
    (tmp_path / "result.json").write_text("" if change is None else json.dumps(answer | {k: v for k, v in change.items() if v}))
    done = CliRunner().invoke(bundle, ["sign", str(made.path), "--key", str(tmp_path / "key"), "--gate", str(tmp_path / "result.json")])
    if says:
        assert isinstance(done.exception, InvalidInput) and says in str(done.exception) and signed_by(made.path) == "nobody"
        return
    assert done.exception is None and gated(made).criteria[0].says == "no alarm"
    assert not hasattr(gated(made), "judged"), "what it was judged by is large, and stays where it is"


def test_calibrations_of_assets_that_were_held_back_from_a_model_are_handed_on_from_the_champion(made, tmp_path):
    pumps = [FAN, "acme/oslo/hall/line/held", "acme/oslo/hall/line/stood"]
    own: CalibrationRecord = read_record(made.path.with_name(f"{FAN.replace('/', '.')}.calibration.json"))
    champion, stranger = (write_bundle(tmp_path / "champion", rms_graph(1, 64, g, 0), made.contract.model_copy(update=u)) for g, u in ((3.0, {}), (4.0, {"rate_hz": 2000.0})))
    for before in (champion, stranger):
        for k, pump in enumerate(pumps):
            record = own.model_copy(update={"asset": pump, "model": before.digest, "threshold_db": 2.0 + 3 * k, "confirmations": 5})
            (tmp_path / "champion" / f"{pump.replace('/', '.')}.calibration.json").write_text(record.to_json())
        gather(before.path)
    assert put_beside(made, before=stranger) == [] and [r.asset for r in records_of(made)] == [FAN]
    assert put_beside(made, before=champion) == [f"{p.replace('/', '.')}.calibration.json" for p in pumps[1:]]
    told = {r.asset: r for r in records_of(made)}
    assert [told[p].threshold_db for p in pumps] == [-1.0, 2.0, 5.0] and told[FAN] == own  # three lower, as that of the one that both know
    assert [(told[p].supported, told[p].confirmations, told[p].scores_db[0], told[p].centre_db) for p in pumps[1:]] == [(False, 5, -23.0, -13.0)] * 2
    assert put_beside(made, before=champion) == []


def test_what_can_not_go_with_a_bundle_is_refused(made, tmp_path):
    for wrong in ("{", '[{"champion": "latest", "streams": {}}]', '{"champion": 1}'):
        with pytest.raises(InvalidInput, match="JSON list"):
            put_beside(made, wrong)
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "calibration.json").write_text("{}")
    with pytest.raises(InvalidInput, match="another file's place"):
        put_beside(made, "", tmp_path / "references")
    alone = write_bundle(tmp_path / "alone", rms_graph(1, 64, 2.0, 0), made.contract)
    with pytest.raises(InvalidBundle, match="no calibration beside it"):
        put_beside(alone)
    assert signed_by(alone.path) == "nobody"
