"""The site for a laptop, as Docker's own Compose reads it. That needs no Docker daemon, and none was there."""

import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from pdm.config import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(os.environ.get("PREDMAINT_PLATFORM_ENV") or ROOT / ".venv-platform")
OURS = {"init", "agent", "sinks", "updater", "triton"}


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    programs = sorted(TOOLS.glob("lib/python*/site-packages/compose/docker-compose"))
    if not programs:
        pytest.skip("make platform-env (it brings docker-compose)")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREDMAINT_")}
    return subprocess.run([programs[0], "-f", ROOT / "edge/compose.yaml", *arguments], capture_output=True, text=True, env={**clean, **environment})


@cache
def services() -> dict[str, dict]:
    done = compose("config", "--format", "json", PREDMAINT_SITE="/srv/site")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)["services"]


def test_without_the_sites_folder_it_says_what_is_missing():
    done = compose("config")
    assert done.returncode and "PREDMAINT_SITE is missing a value: absolute path of a folder with assets.yaml and the bundles it names" in done.stderr


def test_every_service_is_held_as_a_cluster_holds_a_pod():
    for name, s in services().items():
        assert s["read_only"] is True and s["cap_drop"] == ["ALL"] and s["security_opt"] == ["no-new-privileges:true"], name
        assert int(s["mem_limit"]) >= 64 << 20 and s["pids_limit"] and not s.get("privileged") and "cap_add" not in s, name
        assert not {s.get(k) for k in ("network_mode", "pid", "ipc")} & {"host"}, name
    assert sum(int(s["mem_limit"]) for name, s in services().items() if name != "init") <= 6 << 30  # of a laptop with 8 GB


def test_every_server_has_a_health_check_of_its_own_or_of_its_image():
    in_images = {f"predmaint-{name}" for text in ("Containerfile", "Containerfile.triton")
                 for name in re.findall(r'HEALTHCHECK[^\n]*\n(?:.*\n)*?LABEL org.opencontainers.image.title="predmaint-(\w+)"', (ROOT / "edge/images" / text).read_text())}
    for name, s in services().items():
        assert s.get("healthcheck", {}).get("test") or s["image"].partition(":")[0] in in_images or name == "init", name


def test_nothing_listens_beyond_this_machine_unless_it_is_told():
    ports = [(name, p) for name, s in services().items() for p in s.get("ports", ())]
    assert {name for name, _ in ports} == {"mosquitto", "agent", "influxdb", "prometheus", "alertmanager", "grafana"}
    assert {p["host_ip"] for _, p in ports} == {"127.0.0.1"} and 8884 not in {p["target"] for _, p in ports}


def test_images_of_others_are_named_by_versions_and_ours_are_built_here():
    for name, s in services().items():
        assert ("build" in s) == (name in OURS), name
        assert re.search(r":v?\d+(\.\d+)+$", s["image"]), s["image"]
        if name in OURS:
            file, target = ROOT / s["build"]["dockerfile"], s["build"]["target"]
            assert re.search(rf"^FROM \S+ AS {target}$", file.read_text(), re.M), name


def test_secrets_are_seen_by_whom_they_are_for():
    seen = {(name, v["volume"]["subpath"]) for name, s in services().items() for v in s["volumes"] if v.get("source") == "secrets" and name != "init"}
    assert seen == {("mosquitto", "pki/servers/mosquitto"), ("agent", "pki/services/agent"), ("sinks", "tokens"), ("influxdb", "tokens"),
                    ("grafana", "tokens"), ("alertmanager", "alerts")}
    for name, s in services().items():
        assert all(v.get("read_only") for v in s["volumes"] if v.get("source") == "secrets" or v["type"] == "bind") or name == "init", name
    for name, _ in seen:  # the broker itself waits for them
        assert {"init", "mosquitto"} & set(services()[name]["depends_on"]), f"{name} may start before its secrets are there"


def test_the_programs_accept_their_settings(monkeypatch, tmp_path):
    for name in ("agent", "sinks", "updater"):
        for k, v in services()[name]["environment"].items():
            monkeypatch.setenv(k, str(tmp_path) if k == "PREDMAINT_SECRETS" else v)
        assert isinstance(load_settings(), Settings), name


def test_what_it_mounts_is_in_the_repository():
    for s in services().values():
        for v in s["volumes"]:
            if v["type"] == "bind" and v["source"].startswith(f"{ROOT}/"):
                assert Path(v["source"]).exists(), v["source"]
