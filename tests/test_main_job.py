"""The main job with its real parts: Triton where its environment is, a real broker, an agent that is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from servers import alive, wait_for

from pdm.config import Settings
from pdm.demo import STREAM, Sent, _assets, _detector, _path, count, gather, replay
from pdm.site import Site
from pdm.stream.journal import JournalReader
from pdm.stream.sensor_client import SensorClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def data():
    return gather(tenth=True)


@pytest.fixture
def site(data, tmp_path):
    detector, _ = _detector(data, "mahalanobis", tmp_path, "rig")
    bundle, record = detector.export(tmp_path / "bundles")
    from pdm.model.bundle import read_record

    assets = _assets("run-0001", data, bundle, read_record(record), tmp_path / "calibrations")
    with Site(tmp_path / "site", Settings(), assets) as site:
        yield site


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A demo that is done, with its detector: its folder and its summary."
    from pdm.demo import run

    folder = tmp_path_factory.mktemp("first")
    return folder, run(folder, kind="mahalanobis", tenth=True, generated=True, speed=4)


def test_kills_of_agent_and_broker_lose_nothing_double_nothing_and_keep_the_alarm(site, data):
    if site.triton is None:
        print("without Triton:", site.parts["engine"])
    outer = next(r for r in data.replay if r.fault == "outer_race")
    asset, sent = str(_path("run-0001", outer)), Sent({}, {})
    with SensorClient(site.broker_url, resend_s=1.0) as client:
        sender = threading.Thread(target=replay, args=(client, data.replay, "run-0001", 0.5, sent))
        sender.start()
        wait_for(site.journal.exists)
        with JournalReader(site.journal) as reader:
            raised = wait_for(lambda: [e for e in reader.events() if e.asset == asset and e.kind == "raised"])
            site.agent.kill()
            before = reader.verdicts(asset, STREAM)[-1]
            site.start_agent()
            time.sleep(0.7)
            site.broker.restart()
            sender.join(60)
            assert not sender.is_alive()
            client.flush(60)
            windows = count(site, sent, "run-0001")
            assert windows["sent"] == windows["acknowledged"] == windows["journaled"] == windows["stored"] > 100
            assert windows["duplicated"] == windows["lost"] == 0

            after = [row for row in reader.verdicts(asset, STREAM) if row.id > before.id and "late" not in row.flags]
            assert after, "nothing came after the agent's restart"
            assert before.alarm and after[0].alarm and after[0].episode == before.episode == raised[0].episode
            assert len([e for e in reader.events() if e.asset == asset and e.kind == "raised"]) == 1
            if site.triton is not None:
                assert Counter(row.engine for row in reader.verdicts(asset, STREAM))["triton"] > 0


@pytest.mark.parametrize("how", [None, signal.SIGINT, signal.SIGTERM], ids=["normal end", "ctrl-c", "sigterm"])
def test_the_demo_leaves_nothing_behind(first, tmp_path, how):
    temporary, family = tmp_path / "tmp", {}
    temporary.mkdir()
    for detector in first[0].glob("detector-*"):
        shutil.copytree(detector, tmp_path / "out" / detector.name)
    command = [sys.executable, "-m", "pdm.cli", "demo", "--out", str(tmp_path / "out"), "--kind", "mahalanobis", "--tenth", "--generated", "--json"]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)})
    me, sent = psutil.Process(demo.pid), False
    while demo.poll() is None:
        try:
            family |= {p.pid: p for p in me.children(recursive=True)}
        except psutil.NoSuchProcess:
            break
        if how is not None and not sent and (tmp_path / "out/site/data/journal.db").exists():
            time.sleep(0.5)
            demo.send_signal(how)
            sent = True
        time.sleep(0.1)
    out, err = demo.communicate(timeout=60)
    assert len(family) >= (3 if how is None else 2)  # broker, agent and sinks at least; who is told to end while they start has no sinks yet
    if how is None:
        assert demo.returncode == 0, err
        summary = json.loads(out)
        assert summary["data"]["synthetic"] and summary["windows"]["lost"] == 0
        assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
        page = (tmp_path / "out/report.html").read_text()
        assert "generated" in page.lower() and "http://" not in page.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")
    else:
        assert demo.returncode == 130 and "Traceback" not in err, err
    wait_for(lambda: not any(map(alive, family.values())))
    assert not list(temporary.glob("pdm*"))
    assert not [f for f in Path("/dev/shm").glob("pdm*") for pid in (demo.pid, *family) if f"-{pid}-" in f.name]


def test_a_second_run_stands_beside_the_first_and_fits_nothing(first):
    from pdm.demo import run

    folder, first = first
    second = run(folder, kind="mahalanobis", tenth=True, generated=True, speed=4)
    assert first["model"]["fitted_now"] and not second["model"]["fitted_now"]
    assert first["model"]["digest"] == second["model"]["digest"]
    for summary in (first, second):
        w = summary["windows"]
        assert w["sent"] == w["acknowledged"] == w["journaled"] == w["stored"] and w["duplicated"] == w["lost"] == 0
    with JournalReader(folder / "site/data/journal.db") as reader:
        assert reader.counts()["verdict"] == first["windows"]["sent"] + second["windows"]["sent"]
