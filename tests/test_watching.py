"The loop that watches goes on whatever becomes of its reports."

import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from servers import free_port

from pdm.config import Settings
from pdm.drift_cli import REPORTS, controller_of, report, watching
from pdm.loop.logbook import Logbook
from pdm.stream.records import Row
from pdm.stream.sinks import SqliteStore

ASSET = "acme/munich/hall-2/line-1/pump-1"


def site(folder, verdicts: int) -> Settings:
    settings = Settings(state_dir=folder / "state", pipeline_root=f"file:{folder}/runs", loop_metrics_port=free_port(), assets=folder / "none.yaml")
    store = SqliteStore(settings.state_dir / "store.db")
    now_ns = time.time_ns()
    store.write([Row(ASSET, "vibration", 1, k, now_ns - k * 10**9, now_ns - k * 10**9, 1.0, 0.5, 0.5, 0.0, 2.0, False, 0, "running", "none", None, True, False, {}, {"rms_h": 1.0}, {},
                     np.zeros(2, np.float32), "d" * 64, "triton", id=k + 1) for k in range(verdicts)])  # fmt: skip
    store.close()
    return settings


def numbers(settings: Settings) -> dict[str, float]:
    text = urlopen(f"http://127.0.0.1:{settings.loop_metrics_port}/metrics", timeout=10).read().decode()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))}


def watched(settings: Settings, until) -> dict[str, float]:
    with watching(settings) as failed:
        end = time.monotonic() + 60
        while not until(found := numbers(settings)):
            failed()
            assert time.monotonic() < end, found
            time.sleep(0.1)
        time.sleep(0.3)
        failed()
        return found


def test_a_plant_that_has_said_nothing_yet_is_looked_at_and_has_no_report(tmp_path):
    found = watched(site(tmp_path, 0), lambda n: n.get('pdm_loop_evaluations_total{fired="false"}', 0) >= 1)
    assert found["pdm_loop_report_failures_total"] == 0 and not (tmp_path / "runs" / "drift").exists()


def test_a_report_that_fails_is_counted_and_the_loop_goes_on(tmp_path, monkeypatch, caplog):
    settings = site(tmp_path, 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a disk that is gone"))
    watched(settings, lambda n: n.get("pdm_loop_report_failures_total", 0) >= 1)
    assert "the report" in caplog.text and "a disk that is gone" in caplog.text
    with Logbook(settings.logbook_file) as book:
        assert len(book.evaluations()) == 1, "what was seen is written down all the same"


def test_a_report_reads_its_own_evaluation_and_the_oldest_report_goes(tmp_path, monkeypatch):
    settings = site(tmp_path, 3)
    for name in ("state_dir", "pipeline_root", "assets"):  # for the notebook's kernel
        monkeypatch.setenv(f"PREDMAINT_{name.upper()}", str(getattr(settings, name)))
    now_ns = time.time_ns()
    with Logbook(settings.logbook_file) as book:
        step = controller_of(settings, book).decide(now_ns)
        book.add_evaluations([step.rows[0]._replace(t_ns=now_ns - 400 * 86_400 * 10**9)])
        book._db.execute("UPDATE evaluation SET details = 'cut of' WHERE t_ns < ?", (now_ns,))
    reports = tmp_path / "runs" / "drift"
    for k in range(REPORTS):
        (reports / f"2025{k:04d}T000000").mkdir(parents=True)
    (reports / "somebody's notes").mkdir()
    page = report(settings, now_ns)
    left = sorted(f.name for f in reports.iterdir())
    assert len(left) == REPORTS + 1 and left[0] == "20250001T000000" and "somebody's notes" in left
    assert Path(page.removeprefix("file:")).read_text().count("pump-1") >= 1
    with Logbook(settings.logbook_file) as book:
        assert book._db.execute("SELECT count(*) FROM evaluation").fetchone() == (2,), "what was seen is not forgotten"
