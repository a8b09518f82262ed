"edge/SIZING.md says what a run said, and the manifests give every pod the memory that it was seen to need."

import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sizing = __import__("sizing")

RESULT = json.loads(sizing.RESULT.read_text())
TABLES = RESULT["tables"]["sizing"]


def test_the_page_is_what_the_tool_makes_of_the_dated_result():
    assert sizing.PAGE.read_text() == sizing.text(RESULT), "python tools/sizing.py"


def test_the_result_is_a_full_run_in_which_nothing_was_lost_and_nothing_doubled():
    d = TABLES["twice the load"]
    assert not RESULT["quick"] and d["for, s"] == 60
    assert d["sent"] == d["acknowledged"] == d["committed"] == d["distinct"] == d["in InfluxDB"] > 10_000
    assert d["most unacknowledged"] <= d["W x streams"]
    assert list(TABLES["memory"]) == ["1", "50", "200"] and all(m["Prometheus"]["samples a series"] >= sizing.SAMPLES for m in TABLES["memory"].values())
    second = TABLES["a second version"]
    assert second["state"] in ("parity", "shadow", "promoted") and second["MiB"]["triton"]["now"] > 1.3 * sizing.now(TABLES, "triton", 50)  # both were loaded


@pytest.mark.parametrize("pod", sizing.pods(TABLES))
def test_a_pod_asks_for_what_its_programs_had_and_may_have_the_most_that_was_seen_and_more(pod):
    asked, limit = sizing.resources(pod)
    assert asked >= sizing.now(TABLES, pod, sizing.ASSETS)
    assert limit >= sizing.MARGIN * sizing.most(TABLES, pod)


def test_what_is_assumed_of_the_board_stands_apart_from_what_was_measured_and_its_results_are_ranges():
    before, after = sizing.PAGE.read_text().split("\n## Not measured")
    assert "Orin" not in before.split("\n## Measured")[1] and "assumptions" in after
    for row in TABLES["windows"].values():
        low, high = sizing.on_the_board(row)
        assert 0 < low < high


def test_the_panels_that_the_page_names_are_on_the_dashboard():
    titles = {p.get("title") for p in json.loads((ROOT / "edge/grafana/dashboards/site.json").read_text())["panels"]}
    assert {"Age of the newest window", "Sinks behind by"} <= titles


def test_the_limits_that_the_page_counts_with_are_those_of_the_configuration():
    assert f"\nmax_connections {sizing.CONNECTIONS}\n" in (ROOT / "edge/mosquitto/mosquitto.conf").read_text()
    prometheus = yaml.safe_load_all((ROOT / "edge/k3s/base/prometheus.yaml").read_text())
    args = next(o for o in prometheus if o["kind"] == "StatefulSet")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--storage.tsdb.retention.time=30d", "--storage.tsdb.retention.size=4GB"} <= set(args)
