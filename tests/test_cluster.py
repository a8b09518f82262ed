"""Runs and schedules on Kubeflow Pipelines: kfp's own client, against a stand-in for its API."""

import itertools
import signal
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import trustme

kfp = pytest.importorskip("kfp", reason="pip install 'predmaint[cloud]'")
from kfp import compiler, dsl, kubernetes  # noqa: E402
from kubeflow_stand_in import Kubeflow as StandIn  # noqa: E402
from servers import wait_for  # noqa: E402

import pdm.loop.cluster as cluster_module  # noqa: E402
from pdm.config import Settings  # noqa: E402
from pdm.errors import CheckFailed, InvalidConfig, InvalidInput, PartMissing  # noqa: E402
from pdm.loop.cluster import Cluster  # noqa: E402
from pdm.loop.kubeflow import Outage  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:This client only works:FutureWarning")
NIGHTLY = "0 3 29 2 *"  # no test comes near such a start


@dsl.component(base_image="predmaint-python:0.1.0")
def train(source: str, seed: int) -> str:
    return f"{source} {seed}"


@dsl.pipeline
def retraining(source: str, seed: int = 0):
    with dsl.ParallelFor(["a", "b"]) as shard:
        train(source=shard, seed=seed)
    kubernetes.set_image_pull_policy(train(source=source, seed=seed), "IfNotPresent")  # so that there is a platform's part, too


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "retraining.yaml"
    compiler.Compiler().compile(retraining, str(path))
    return path


@pytest.fixture
def kubeflow():
    server = StandIn(token="let me in", namespace="predmaint")
    yield server
    server.stop()


def cluster_of(server: StandIn, **settings) -> Cluster:
    return Cluster.of(Settings(**{"pipeline_url": server.url, "pipeline_token": server.token, "pipeline_namespace": server.namespace,
                                  "pipeline_root": "s3://bucket/runs", **settings}))


# runs

def test_a_trigger_starts_one_run_however_often_it_is_submitted(kubeflow, package, capsys):
    cluster = cluster_of(kubeflow)
    first = cluster.submit(package, {"source": "mfpt", "seed": 3}, "drift-7")
    again = cluster_of(kubeflow).submit(package, {"source": "mfpt", "seed": 3}, "drift-7")
    assert (first.new, again.new) == (True, False) and first.id == again.id
    assert first.url == f"{kubeflow.url}/#/runs/details/{first.id}"
    (run,) = kubeflow.runs.values()
    assert run.display_name == "retrain-drift-7" and run.service_account == "predmaint-pipeline"
    assert run.runtime_config.parameters == {"source": "mfpt", "seed": 3} and run.runtime_config.pipeline_root == "s3://bucket/runs"
    (experiment,) = kubeflow.experiments.values()
    assert experiment.display_name == "predmaint" and experiment.experiment_id == run.experiment_id
    assert cluster.submit(package, {"source": "mfpt"}, "drift-8").new
    assert capsys.readouterr().out == ""  # a program may read our stdout, and kfp prints links


def test_the_pipeline_is_sent_as_kfp_itself_would_send_it(kubeflow, package):
    cluster_of(kubeflow).submit(package, {"source": "mfpt"}, "drift-7")
    ours = next(iter(kubeflow.runs.values())).pipeline_spec
    client = kfp.Client(host=kubeflow.url, existing_token=kubeflow.token, namespace=kubeflow.namespace)
    client.create_run_from_pipeline_package(str(package), {"source": "mfpt"}, run_name="by kfp", experiment_name="predmaint")
    theirs = next(run for run in kubeflow.runs.values() if run.display_name == "by kfp")
    assert ours == theirs.pipeline_spec


@pytest.mark.parametrize("state,new", [("PENDING", False), ("RUNNING", False), ("PAUSED", False), ("SUCCEEDED", False),
                                       ("FAILED", True), ("CANCELED", True), ("CANCELING", True)])
def test_only_a_lost_run_is_attempted_again(kubeflow, package, state, new):
    before = kubeflow.add_run("retrain-drift-7", state)
    run = cluster_of(kubeflow).submit(package, {"source": "mfpt"}, "drift-7")
    assert run.new is new and (run.id != before) is new


def test_the_run_that_stands_is_found_behind_pages_of_failed_attempts(kubeflow, package):
    kubeflow.page = 2
    for _ in range(5):
        kubeflow.add_run("retrain-drift-7", "FAILED")
    standing = kubeflow.add_run("retrain-drift-7", "RUNNING")
    kubeflow.add_run("retrain-drift-70", "RUNNING", older_s=60)
    assert cluster_of(kubeflow).submit(package, {"source": "mfpt"}, "drift-7").id == standing


@pytest.mark.parametrize("ids", [itertools.count(1), itertools.count(999, -1)], ids=["the first has the lower id", "the first has the higher id"])
def test_of_runs_submitted_at_once_one_stays_and_all_wait_for_it(kubeflow, package, ids):
    submitters = 4
    barrier, kubeflow.ids = threading.Barrier(submitters), ids
    kubeflow.before_create = barrier.wait  # each has looked, and found nothing
    now = datetime.now(UTC).replace(microsecond=0)
    kubeflow.clock = lambda: now           # in the same second
    kubeflow.add_run("another", "RUNNING")

    def submit_and_wait(_):
        cluster = cluster_of(kubeflow)
        run = cluster.submit(package, {"source": "mfpt"}, "drift-7")
        submitted.release()
        return cluster.wait(run, poll_s=0.02, timeout_s=60)

    submitted = threading.Semaphore(0)
    with ThreadPoolExecutor(submitters) as pool:
        waiting = [pool.submit(submit_and_wait, i) for i in range(submitters)]
        for _ in range(submitters):
            assert submitted.acquire(timeout=60)
        live = [run.run_id for run in kubeflow.runs.values() if run.display_name == "retrain-drift-7" and run.state == "PENDING"]
        assert len(live) == 1 and sum(run.state == "CANCELING" for run in kubeflow.runs.values()) == submitters - 1
        kubeflow.becomes(live[0], "SUCCEEDED")
        outcomes = [w.result(60) for w in waiting]
    assert {(o.state, o.run.id) for o in outcomes} == {("SUCCEEDED", live[0])}


def test_a_run_that_was_made_though_the_answer_was_lost_is_not_made_again(kubeflow, package):
    cluster = cluster_of(kubeflow)
    cluster.submit(package, {"source": "mfpt"}, "warm-up")  # so that the experiment is there, and the next requests are look, create
    create = kubeflow.create

    def create_and_fail(of, thing):
        create(of, thing)
        raise ConnectionError  # it ends without an answer

    kubeflow.create = create_and_fail
    with pytest.raises(Outage):
        cluster.submit(package, {"source": "mfpt"}, "drift-7")
    kubeflow.create = create
    assert not cluster.submit(package, {"source": "mfpt"}, "drift-7").new
    assert sum(run.display_name == "retrain-drift-7" for run in kubeflow.runs.values()) == 1


def test_wrong_arguments_and_files_are_told_before_anything_is_started(kubeflow, package, tmp_path):
    cluster = cluster_of(kubeflow)
    for arguments, said in (({"source": "mfpt", "sede": 1}, "did you mean 'seed'"), ({}, "also needs source"), ({"source": "x", "zzz": 1}, "it has seed, source")):
        with pytest.raises(InvalidInput, match=said):
            cluster.submit(package, arguments, "drift-7")
    (tmp_path / "no.yaml").write_text("hello: world\n")
    for file, said in ((tmp_path / "no.yaml", "no compiled pipeline"), (tmp_path / "missing.yaml", "can't be read")):
        with pytest.raises(InvalidInput, match=said):
            cluster.submit(file, {}, "drift-7")
    assert not kubeflow.runs


# waiting

def test_waiting_tells_how_far_each_step_is_and_how_the_run_ends(kubeflow, package):
    cluster = cluster_of(kubeflow)
    run = cluster.submit(package, {"source": "mfpt"}, "drift-7")
    steps = [("RUNNING", {"train": ["SUCCEEDED", "RUNNING"]}, ""), ("SUCCEEDED", {"train": ["SUCCEEDED", "SUCCEEDED"], "train-2": "SUCCEEDED"}, "")]
    told = []

    def progress(tasks):
        told.append(dict(tasks))
        if steps:
            kubeflow.becomes(run.id, *steps.pop(0))

    outcome = cluster.wait(run, progress, poll_s=0.02)
    assert (outcome.state, outcome.ended, outcome.error) == ("SUCCEEDED", True, "")
    assert told == [{}, {"train": "RUNNING"}, {"train": "SUCCEEDED", "train-2": "SUCCEEDED"}] and outcome.tasks == told[-1]


def test_a_failed_run_says_why(kubeflow, package):
    cluster = cluster_of(kubeflow)
    run = cluster.submit(package, {"source": "mfpt"}, "drift-7")
    kubeflow.becomes(run.id, "FAILED", {"train": ["SUCCEEDED", "FAILED"]}, error="train: exit code 1")
    outcome = cluster.wait(run)
    assert (outcome.state, outcome.tasks["train"]) == ("FAILED", "FAILED") and "exit code 1" in outcome.error


def test_waiting_goes_on_through_an_outage(kubeflow, package):
    cluster = cluster_of(kubeflow)
    run = cluster.submit(package, {"source": "mfpt"}, "drift-7")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cluster.wait, run, poll_s=0.02)
        kubeflow.wait_asked(f"GET /apis/v2beta1/runs/{run.id}")
        kubeflow.failing += [503, 500, 429]
        kubeflow.wait_asked(f"GET /apis/v2beta1/runs/{run.id}", 5)
        kubeflow.stop()  # nobody listens
        time.sleep(0.2)
        kubeflow.becomes(run.id, "SUCCEEDED")
        kubeflow.start()
        assert waiting.result(60).state == "SUCCEEDED"


def test_patience_with_an_outage_ends_and_the_way_back_is_told(kubeflow, package):
    cluster = cluster_of(kubeflow)
    run = cluster.submit(package, {"source": "mfpt"}, "drift-7")
    kubeflow.failing += [503] * 1000
    with pytest.raises(PartMissing, match=f"may go on: .*{run.id}"):
        cluster.wait(run, patience_s=0.2, poll_s=0.02)
    kubeflow.failing.clear()


def test_when_time_is_up_the_run_goes_on(kubeflow, package):
    cluster = cluster_of(kubeflow)
    run = cluster.submit(package, {"source": "mfpt"}, "drift-7")
    kubeflow.becomes(run.id, "RUNNING", {"train": "RUNNING"})
    outcome = cluster.wait(run, timeout_s=0.1, poll_s=0.02)
    assert (outcome.state, outcome.ended, dict(outcome.tasks)) == ("RUNNING", False, {"train": "RUNNING"}) and run.url in outcome.error
    assert kubeflow.runs[run.id].state == "RUNNING"


def test_after_ctrl_c_the_run_goes_on_and_can_be_followed(kubeflow, package):
    run = cluster_of(kubeflow).submit(package, {"source": "mfpt"}, "drift-7")
    kubeflow.becomes(run.id, "RUNNING")
    code = (f"from pdm.config import Settings; from pdm.loop.cluster import *\n"
            f"cluster = Cluster.of(Settings(pipeline_url={kubeflow.url!r}, pipeline_token={kubeflow.token!r}, pipeline_namespace='predmaint'))\n"
            f"outcome = cluster.wait(ClusterRun({run.id!r}, {run.url!r}, 'drift-7', True), poll_s=0.05)\nprint(outcome.state, outcome.error)")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kubeflow.wait_asked(f"GET /apis/v2beta1/runs/{run.id}", 2, timeout_s=60)  # it has heard the first answer
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "") and out.startswith("RUNNING") and run.url in out
    assert kubeflow.runs[run.id].state == "RUNNING"


# who may ask, and what answers

def test_a_wrong_token_and_a_strange_namespace_are_told_apart_from_an_outage(kubeflow):
    for settings in ({"pipeline_token": "stolen"}, {"pipeline_namespace": "others"}):
        with pytest.raises(PartMissing, match="pipeline_token.*pipeline_namespace") as e:
            cluster_of(kubeflow, **settings).schedules()
        assert not isinstance(e.value, Outage)


def test_in_a_pod_the_token_is_read_from_its_file_anew(kubeflow, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("an old one")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    cluster = cluster_of(kubeflow, pipeline_token="")
    with pytest.raises(PartMissing):
        cluster.schedules()
    (tmp_path / "token").write_text(kubeflow.token)
    assert cluster.schedules() == []


@pytest.mark.parametrize("status,error", [(302, PartMissing), (200, InvalidConfig)])
def test_a_login_page_is_no_answer(kubeflow, status, error):
    kubeflow.failing.append(status)
    with pytest.raises(error, match="pipeline_token|login page"):
        cluster_of(kubeflow).schedules()


def test_an_address_that_leads_elsewhere_is_a_wrong_setting(kubeflow):
    with pytest.raises(InvalidConfig, match="something else than Kubeflow Pipelines"):
        cluster_of(kubeflow, pipeline_url=f"{kubeflow.url}/grafana").schedules()


def test_nobody_there_is_a_missing_part(kubeflow, package, capfd):
    cluster = cluster_of(kubeflow)
    kubeflow.stop()
    with pytest.raises(PartMissing, match="can't be reached"):
        cluster.submit(package, {"source": "mfpt"}, "drift-7")
    assert capfd.readouterr() == ("", "")  # nor do libraries complain beside us
    kubeflow.start()


def test_a_private_authority_is_believed_where_it_is_named(package, tmp_path, monkeypatch):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = StandIn(token="let me in", tls=context)
    try:
        with pytest.raises(PartMissing, match="(?i)certificate.*SSL_CERT_FILE"):
            cluster_of(server).schedules()
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert cluster_of(server).submit(package, {"source": "mfpt"}, "drift-7").new
    finally:
        server.stop()


# schedules

def test_a_schedule_is_made_once_and_replaced_only_by_another(kubeflow, package):
    cluster = cluster_of(kubeflow)
    first = cluster.schedule(package, {"source": "mfpt"}, NIGHTLY, "nightly")
    (made,) = kubeflow.recurringruns.values()
    assert (made.trigger.cron_schedule.cron, made.no_catchup, str(made.max_concurrency), made.status) == (f"0 {NIGHTLY}", True, "1", "ENABLED")
    asked = len(kubeflow.asked)
    assert cluster_of(kubeflow).schedule(package, {"source": "mfpt"}, f"0 {NIGHTLY}", "nightly") == first
    assert {a.split()[0] for a in kubeflow.asked[asked:]} == {"GET"}
    other = cluster.schedule(package, {"source": "femto"}, NIGHTLY, "nightly")
    assert list(kubeflow.recurringruns) == [other] and other != first
    assert [(s.name, s.cron, s.enabled) for s in cluster.schedules()] == [("nightly", f"0 {NIGHTLY}", True)]
    assert [a.split()[0] for a in kubeflow.asked if a.split()[0] != "GET"][-2:] == ["POST", "DELETE"]  # never without one
    assert kubeflow.queries == [{"propagation_policy": "ORPHAN"}]  # what it has started goes on


def test_schedules_are_exchanged_while_neither_is_about_to_start_anything(kubeflow, package, monkeypatch):
    cluster = cluster_of(kubeflow)
    monkeypatch.setattr(cluster_module, "_QUIET_S", 0.5)
    start = (datetime.now(UTC) + timedelta(seconds=1)).replace(microsecond=0)
    cluster.schedule(package, {"source": "mfpt"}, f"{start.second} * * * * *", "nightly")
    made = kubeflow.create
    times = []
    kubeflow.create = lambda of, thing: (times.append(datetime.now(UTC)), made(of, thing))[1]
    wait_for(lambda: datetime.now(UTC) > start - timedelta(seconds=0.4))
    cluster.schedule(package, {"source": "femto"}, NIGHTLY, "nightly")
    assert times[0] >= start + timedelta(seconds=0.5)


def test_a_schedule_that_a_person_holds_stays_held(kubeflow, package):
    cluster = cluster_of(kubeflow)
    first = cluster.schedule(package, {"source": "mfpt"}, NIGHTLY, "nightly")
    kfp.Client(host=kubeflow.url, existing_token=kubeflow.token, namespace="predmaint").disable_recurring_run(first)
    assert cluster.schedule(package, {"source": "mfpt"}, NIGHTLY, "nightly") == first
    cluster.schedule(package, {"source": "femto"}, NIGHTLY, "nightly")
    assert [s.enabled for s in cluster.schedules()] == [False] and len(kubeflow.recurringruns) == 1


@pytest.mark.parametrize("ids", [itertools.count(1), itertools.count(999, -1)], ids=["the first has the lower id", "the first has the higher id"])
def test_of_schedules_made_at_once_exactly_one_stands(kubeflow, package, ids):
    barrier, kubeflow.ids = threading.Barrier(2), ids
    now = datetime.now(UTC).replace(microsecond=0)
    kubeflow.clock = lambda: now
    kubeflow.add_run("another", "RUNNING")
    look = kubeflow.list

    def look_together(of, query):
        found = look(of, query)
        if of == "recurringruns" and first.acquire(blocking=False):
            barrier.wait(20)  # both have looked, and found nothing
        return found

    first, kubeflow.list = threading.Semaphore(2), look_together

    def schedule(source):
        try:
            return cluster_of(kubeflow).schedule(package, {"source": source}, NIGHTLY, "nightly")
        except CheckFailed:
            return None

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(schedule, ["mfpt", "femto"]))
    (standing,) = kubeflow.recurringruns.values()
    assert standing.recurring_run_id in results and standing.status == "ENABLED"


def test_what_an_interrupted_exchange_left_is_cleared_away(kubeflow, package):
    cluster = cluster_of(kubeflow)
    cluster.schedule(package, {"source": "mfpt"}, NIGHTLY, "nightly")
    forget = cluster._forget
    cluster._forget = lambda _: (_ for _ in ()).throw(Outage("killed between the two"))
    with pytest.raises(Outage):
        cluster.schedule(package, {"source": "femto"}, NIGHTLY, "nightly")
    assert len(kubeflow.recurringruns) == 2
    cluster._forget = forget
    newest = cluster.schedule(package, {"source": "femto"}, NIGHTLY, "nightly")
    assert list(kubeflow.recurringruns) == [newest]


def test_only_our_schedules_are_listed_and_taken_away(kubeflow, package):
    cluster = cluster_of(kubeflow)
    cluster.schedule(package, {"source": "mfpt"}, NIGHTLY, "nightly")
    client = kfp.Client(host=kubeflow.url, existing_token=kubeflow.token, namespace="predmaint")
    experiment = next(iter(kubeflow.experiments))
    client.create_recurring_run(experiment, "somebody's", cron_expression="0 0 9 ? * 2-6", params={"source": "x"}, pipeline_package_path=str(package))
    assert [s.name for s in cluster.schedules()] == ["nightly"]
    assert (cluster.unschedule("nightly"), cluster.unschedule("nightly")) == (1, 0)
    client.create_recurring_run(experiment, "by the hour", interval_second=3600, params={"source": "x"}, pipeline_package_path=str(package))
    ours = cluster.schedule(package, {"source": "mfpt"}, NIGHTLY, "by the hour")  # a name is taken over, whatever has it
    assert [s.id for s in cluster.schedules()] == [ours] and len(kubeflow.recurringruns) == 2
    assert cluster.unschedule("by the hour") == 1
    assert [r.display_name for r in kubeflow.recurringruns.values()] == ["somebody's"]


def test_a_wrong_cron_is_told_by_field_and_nothing_is_scheduled(kubeflow, package):
    with pytest.raises(InvalidInput, match="its hour is wrong"):
        cluster_of(kubeflow).schedule(package, {"source": "mfpt"}, "0 25 * * *", "nightly")
    assert kubeflow.asked == []
