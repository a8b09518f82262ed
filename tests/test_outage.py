"""Three days without an uplink: a site goes on, and tells the warehouse and the people about it when they are there again.

The days are those of the windows' time stamps, one window a minute from each machine; they pass as fast as this machine can. `PREDMAINT_OUTAGE_MACHINES` says
how many machines there are (8).
"""

import json
import os
import time
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
import servers
from faults.proxy import Proxy
from servers import need, wait_for
from small_site import RATE_HZ, SAMPLES, STREAM, Site, path_of
from warehouse_servers import PostgresServer, postgres_programs

from pdm.stream.alerts import alerts_of, is_told
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.sensor_client import SensorClient

MACHINES = int(os.environ.get("PREDMAINT_OUTAGE_MACHINES", "8"))
HOUR, HOURS, JOURNAL_MB = 60, 72, 30  # an hour is 60 windows of each machine
MINUTE_NS = 60 * 10**9
NOISE = np.random.default_rng(0).normal(size=(64, 2, SAMPLES)).astype(np.float32)
ALARMS = [(0, 5 * HOUR), (1, 20 * HOUR), (0, 40 * HOUR), (2, 71 * HOUR)]  # machine, minute: for twenty minutes it is loud

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
psycopg = pytest.importorskip("psycopg", reason="the extra postgres is not installed")


class Told(servers.Alerts):
    "An Alertmanager that counts."

    def __init__(self):
        self.times = Counter()
        super().__init__()

    def take(self, alerts):
        self.times.update(named(a) for a in alerts)
        super().take(alerts)


def named(alert: dict) -> str:
    "An alert and its state: the same labels come again when it is over."
    return json.dumps([alert["labels"], alert["endsAt"]], sort_keys=True)


@pytest.fixture
def parts(make_bundle, tmp_path):
    need("mosquitto", "mosquitto")
    if not postgres_programs():
        pytest.skip("no PostgreSQL: pip install 'predmaint[embedded]'")
    site = Site(tmp_path / "site", make_bundle(samples=SAMPLES, rate_hz=RATE_HZ), MACHINES)
    (site.folder / "rms.json").write_text(site.record.model_copy(update={"hop_s": 60.0, "spacing_s": 60.0, "quiet_s": 600.0, "gap_s": 600.0}).to_json())
    with ExitStack() as stack:
        def made(part, end):
            stack.callback(end, part)
            return part

        influx = made(servers.Influx(tmp_path / "influx", retention="365d"), servers.Influx.close)
        warehouse = made(PostgresServer(next(iter(postgres_programs().values())), "-c", "fsync=off"), PostgresServer.remove)
        told, broker = made(Told(), Told.kill), made(EmbeddedBroker(tmp_path / "broker"), EmbeddedBroker.close)
        links = [made(Proxy(f"127.0.0.1:{port}"), Proxy.close) for port in (warehouse.port, told.port)]
        yield site, broker, influx, warehouse, told, links


def test_three_days_without_an_uplink_are_caught_up_with_the_newest_first_and_every_alarm_is_told_once(parts, record_property):
    site, broker, influx, warehouse, told, (uplink, hook) = parts
    start_ns = time.time_ns() // MINUTE_NS * MINUTE_NS - (HOURS + 2) * HOUR * MINUTE_NS
    url = warehouse.url("postgres").replace(f":{warehouse.port}", f":{uplink.port}")
    sinks = {"tsdb_url": influx.url, "influx_token": influx.token, "warehouse_url": url, "alert_urls": (f"http://127.0.0.1:{hook.port}",), "sinks_metrics_port": 0}

    def ask(sql):
        with psycopg.connect(warehouse.url("postgres")) as db:
            return db.execute(sql).fetchall()

    with site.agent(broker.url, journal_max_gb=JOURNAL_MB / 1000), site.service("sinks", broker.url, **sinks), \
            SensorClient(broker.url, "gateway") as client, site.reader() as journal:
        streams = [client.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"], window=64) for i in range(MACHINES)]

        def pass_by(minutes):
            for minute in minutes:
                for i, s in enumerate(streams):
                    loud = any(i == machine and since <= minute < since + 20 for machine, since in ALARMS)
                    s.send(NOISE[minute % len(NOISE)] * (20 if loud else 1), t0_ns=start_ns + minute * MINUTE_NS, timeout_s=60)
            client.flush(60)

        def of_influx():
            series = influx.query("SELECT count(score) FROM health")
            return series[0]["values"][0][1] if series else 0

        pass_by(range(HOUR))
        wait_for(lambda: ask("SELECT FROM pg_tables WHERE schemaname = 'pdm'") and ask("SELECT count(*) FROM pdm.verdict") == [(HOUR * MACHINES,)], 60)
        began = time.monotonic()
        for how in ("hole", "cut"):  # half of the time nobody answers, and half of it everybody refuses
            getattr(uplink, how)()
            getattr(hook, how)()
            first = HOUR if how == "hole" else HOUR * (HOURS // 2 + 1)
            pass_by(range(first, first + HOUR * HOURS // 2))
        seconds, total = time.monotonic() - began, HOUR * (HOURS + 1) * MACHINES
        assert client.counts["acknowledged"] == total == sum(len(journal.verdicts(path_of(i), STREAM)) for i in range(MACHINES))
        wait_for(lambda: of_influx() == total, 60)
        assert ask("SELECT count(*) FROM pdm.verdict") == [(HOUR * MACHINES,)] and not told.times
        bytes_each = site.journal_file.stat().st_size / total
        assert site.journal_file.stat().st_size <= JOURNAL_MB * 1e6

        (before,), = ask("SELECT max(xmin::text::bigint) FROM pdm.verdict")
        uplink.heal()
        hook.heal()
        began = time.monotonic()
        pass_by(range(HOUR * (HOURS + 1), HOUR * (HOURS + 2)))
        total += HOUR * MACHINES
        wait_for(lambda: ask("SELECT count(*) FROM pdm.verdict") == [(total,)], 120)
        caught_up = time.monotonic() - began
        # xmin is the transaction that wrote a row, so it says in which order they came
        (first,), = ask(f"SELECT min(xmin::text::bigint) FROM pdm.verdict WHERE xmin::text::bigint > {before}")
        came = [minute for minute, in ask(f"SELECT (t0_ns - {start_ns}) / {MINUTE_NS} FROM pdm.verdict WHERE xmin::text::bigint = {first}")]
        assert min(came) > HOUR * (HOURS - 12), "the newest come first"
        assert ask("SELECT count(DISTINCT (asset, stream, epoch, seq)) FROM pdm.verdict") == [(total,)]
        events = [e for e in journal.events() if is_told(e)]
        assert {e.kind for e in events} >= {"raised", "cleared"} and sum(e.kind == "raised" for e in events) == len(ALARMS)
        wait_for(lambda: sum(told.times.values()) >= sum(len(alerts_of(e)) for e in events), 60)
        assert told.times == Counter(named(a) for e in events for a in alerts_of(e))
        assert ask("SELECT count(*) FROM pdm.event") == [(len(journal.events()),)]
        wait_for(lambda: of_influx() == total, 60)
    record_property("outage", {"windows": total, "windows_per_s": round(total / seconds), "journal_bytes_per_window": round(bytes_each), "caught_up_s": round(caught_up, 1)})
    print(f"{total} windows, {total / seconds:.0f}/s, {bytes_each:.0f} bytes of journal each; caught up within {caught_up:.1f} s")
