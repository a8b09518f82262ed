"""The command line as a script sees it: exit codes, JSON, and one sentence for each thing that is wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest

from pdm.config import load_settings
from pdm.data.synth import synthetic_recordings
from pdm.errors import InvalidConfig


def predmaint(*args, cwd=None, env=None):
    return subprocess.run([sys.executable, "-m", "pdm.cli", *map(str, args)], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    recordings = synthetic_recordings(seed=2)
    healthy = next(r for r in recordings if r.fault == "none")
    faulty = [r for r in recordings if r.fault == "inner_race"][-1]  # at the highest load
    np.save(folder / "healthy.npy", healthy.samples)
    np.save(folder / "faulty.npy", faulty.samples)
    return folder, healthy, faulty


def test_fit_score_diagnose_on_files(files):
    folder, healthy, faulty = files
    rate = ("--rate-hz", healthy.rate_hz)
    learnt = predmaint("fit", "healthy.npy", *rate, "--kind", "mahalanobis", "--out", "model", "--json", cwd=folder)
    assert learnt.returncode == 0, learnt.stderr
    assert json.loads(learnt.stdout)["kind"] == "mahalanobis"
    for name, alarm in (("healthy.npy", False), ("faulty.npy", True)):
        done = predmaint("score", "model", name, *rate, "--json", cwd=folder)
        assert done.returncode == 0 and json.loads(done.stdout)["alarm"] is alarm, done.stderr
    b = faulty.bearing
    named = predmaint("diagnose", "faulty.npy", *rate, "--rpm", faulty.rpm, "--bearing", f"{b.balls},{b.ball_diameter_mm},{b.pitch_diameter_mm}",
                      "--json", cwd=folder)
    assert named.returncode == 0 and json.loads(named.stdout)["fault"] == "inner_race", named.stderr


@pytest.mark.parametrize("args,says", [
    (("score", "nowhere", "healthy.npy"), "nowhere"),
    (("score", "nowhere", "nothing.csv"), "no"),
    (("fit", "healthy.npy", "--out", "m"), "rate"),
    (("fit", "healthy.npy", "--rate-hz", "100", "--out", "m", "--length", "200000"), "healthy windows"),
    (("diagnose", "healthy.npy", "--rate-hz", "48828", "--bearing", "nine"), "expected balls"),
    (("diagnose", "healthy.npy", "--rate-hz", "48828", "--channel", "z"), "has no channel 'z'"),
    (("demo", "--speed", "0"), "speed"),
    (("fit", "--no-such-option"), "No such option"),
])
def test_wrong_input_ends_with_one_and_a_sentence(files, args, says):
    done = predmaint(*args, cwd=files[0])
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_doctor_tells_programs_what_is_there():
    done = predmaint("doctor", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"] and {"broker: mosquitto", "engine: tritonserver", "torch"} <= {p["part"] for p in told["parts"]}


def test_doctor_ends_with_two_where_something_needed_is_missing(monkeypatch):
    import pdm.cli as cli

    monkeypatch.setattr(cli, "_PARTS", [("broker: mosquitto", lambda: "", False, "apt-get install mosquitto")])
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor"])
    assert end.value.code == 2


def test_a_wrong_setting_is_named(tmp_path, monkeypatch):
    file = tmp_path / "predmaint.toml"
    file.write_text('broker_url = "amqp://host"\n')
    monkeypatch.setenv("PREDMAINT_SETTINGS", str(file))
    with pytest.raises(InvalidConfig, match="broker_url: 'amqp' is none of embedded:"):
        load_settings()
    file.write_text("broker_url = \n")
    with pytest.raises(InvalidConfig, match="can't be read"):
        load_settings()
    monkeypatch.setenv("PREDMAINT_SETTINGS", str(tmp_path / "absent.toml"))
    with pytest.raises(InvalidConfig, match="no such file"):
        load_settings()


def test_the_environment_comes_before_the_file(tmp_path, monkeypatch):
    file = tmp_path / "predmaint.toml"
    file.write_text('engine_url = "inprocess:"\nbatch = 8\n')
    monkeypatch.setenv("PREDMAINT_SETTINGS", str(file))
    monkeypatch.setenv("PREDMAINT_BATCH", "16")
    assert (load_settings().engine_url, load_settings().batch, load_settings(batch=4).batch) == ("inprocess:", 16, 4)
