"The site, as `make docs` leaves it, visited in Chromium; and what its reference is made of. Without a site it is built here (minutes)."

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import docs  # noqa: E402
import reference  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = ["index.html", "tutorials.html", "how-to-guides.html", "explanations.html", "reference.html", "tutorials/first_alarm.html", "explanations/calibration.html", "signal/kinematics.html",
         "model/detector.html", "runbooks.html", *(f"reference/{name}.html" for name in reference.PAGES)]


@pytest.fixture(scope="module")
def site():
    out = ROOT / "_docs"
    newest = max(p.stat().st_mtime for p in [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "nbs").glob("*.yml"), ROOT / "nbs/styles.css", *(ROOT / "tools").glob("*.py")]
                 if p.name != "nbdev.yml")
    if not (out / "index.html").exists() or (out / "index.html").stat().st_mtime < newest:
        subprocess.run([sys.executable, ROOT / "tools/docs.py"], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                                                                    "--disable-sync", "--no-first-run"])
        yield browser
        browser.close()


class Visit:
    "A browser's tab that remembers what a page complained of, and what it asked for elsewhere."
    def __init__(self, chromium, served, **how):
        self.served, self.complaints, self.elsewhere = served, [], []
        self.tab = chromium.new_page(**how)
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.tab.on("response", lambda r: self.complaints.append(f"{r.status} {r.url}") if r.status >= 400 and not r.url.endswith("/favicon.ico") else None)
        self.tab.on("request", lambda r: self.elsewhere.append(r.url) if not r.url.startswith((served, "data:")) else None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tab.close()

    def go(self, name):
        self.tab.goto(self.served + name, wait_until="load")
        return self.tab


@pytest.fixture(params=["light", "dark"])
def visit(chromium, served, request):
    with Visit(chromium, served, color_scheme=request.param, viewport={"width": 1400, "height": 1000}) as v:
        yield v


def test_the_main_pages_show_without_an_error_or_a_request_elsewhere(visit):
    for name in PAGES:
        tab = visit.go(name)
        assert tab.locator("main h1").first.is_visible(), name
    assert visit.elsewhere == []
    assert [c for c in visit.complaints if "favicon" not in c and "404 (File not found)" not in c] == []


def test_search_finds_the_detector_and_leads_to_it(chromium, served):
    with Visit(chromium, served, viewport={"width": 1400, "height": 1000}) as visit:
        tab = visit.go("index.html")
        tab.locator("#quarto-search input").fill("Detector")
        first = tab.locator("#quarto-search .search-result", has_text="Detector").first
        first.wait_for()
        first.click()
        tab.wait_for_load_state("load")
        assert "Detector" in tab.locator("main").inner_text()
        assert visit.elsewhere == []


def test_dark_mode_is_chosen_by_hand_and_stays(chromium, served):
    def brightness(tab):
        return sum(map(int, tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")))

    with Visit(chromium, served, color_scheme="light", viewport={"width": 1400, "height": 1000}) as visit:
        tab = visit.go("index.html")
        assert brightness(tab) > 600
        tab.locator(".quarto-color-scheme-toggle").first.click()
        tab.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
        assert brightness(tab) < 200
        assert brightness(visit.go("signal/kinematics.html")) < 200


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(chromium, served, name):
    with Visit(chromium, served, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2) as visit:
        tab = visit.go(name)
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= 390
        shot = ROOT / "build/site" / f"phone_{name.removesuffix('.html').replace('/', '_')}.png"
        shot.parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=shot)


def test_formulas_are_drawn_by_the_browser_itself(chromium, served):
    with Visit(chromium, served) as visit:
        tab = visit.go("explanations/calibration.html")
        assert tab.locator("math[display=block] mfrac").count() > 0
        assert "\\(" not in tab.locator("main").inner_text()


def test_no_link_of_the_site_is_broken(site):
    wrong, away = docs.faults(site)
    assert wrong == []
    assert away  # there are some, and they are listed


def test_a_broken_link_and_a_request_elsewhere_are_found(tmp_path):
    (tmp_path / "other.html").write_text('<h2 id="there">there</h2>')
    (tmp_path / "index.html").write_text(
        '<a href="other.html#there">fine</a><a href="other.html#gone">no heading</a><a href="gone.html">no page</a>'
        '<a href="https://github.com/predmaint/predmaint/blob/main/pdm/cli.py#L999999">no line</a><a href="https://elsewhere.example">away</a>'
        '<script src="https://cdn.example/x.js"></script>')
    (tmp_path / "a.css").write_text('@import url(https://fonts.example/f);')
    wrong, away = docs.faults(tmp_path)
    assert len(wrong) == 5
    for said in ("other.html#gone", "gone.html", "L999999", "fetches https://cdn.example/x.js", "a.css fetches https://fonts.example/f"):
        assert sum(said in w for w in wrong) == 1, said
    assert away == ["https://elsewhere.example"]


def test_the_reference_names_each_command_setting_metric_and_alert():
    from typer.main import get_command

    from pdm.cli import app
    from pdm.config import Settings
    from pdm.loop.controller import LoopMetrics
    from pdm.stream.metrics import AgentMetrics, SinkMetrics

    def paths(command, path="predmaint"):
        yield path
        for name, sub in getattr(command, "commands", {}).items():
            yield from paths(sub, f"{path} {name}")

    cli, settings, metrics = (reference.PAGES[n]() for n in ("cli", "settings", "metrics"))
    assert [p for p in paths(get_command(app)) if p != "predmaint" and f"`{p}`\n" not in cli] == []
    assert [s for s in Settings.model_fields if f"`PREDMAINT_{s.upper()}`" not in settings] == []
    assert [name for name, _, _, meaning in reference.fields(Settings) if not meaning] == []
    exported = {m.name for service in (AgentMetrics(), SinkMetrics(), LoopMetrics()) for m in service.registry.collect()}
    assert [m for m in exported if f"`{m}`" not in metrics and f"`{m}_total`" not in metrics and f"`{m}_info`" not in metrics] == []


def test_the_reference_names_each_public_name_of_each_module():
    import importlib
    api = reference.PAGES["api"]()
    for dotted in ("pdm.model.detector", "pdm.stream.alarms", "pdm.loop.policy", "pdm.errors"):
        section = api.split(f"### {dotted}\n")[1].split("\n##")[0]
        assert [n for n in importlib.import_module(dotted).__all__ if f"[`{n}`]" not in section] == []


def test_each_alert_leads_to_its_runbook():
    headings = {line[3:] for cell in json.loads((ROOT / "nbs/runbooks.ipynb").read_text())["cells"] for line in "".join(cell["source"]).splitlines() if line.startswith("## ")}
    named = [line.split("]")[0][3:] for line in reference.PAGES["alerts"]().splitlines() if line.startswith("| [")]
    assert len(named) > 20 and set(named) <= headings


def test_the_readme_leads_from_the_root_where_the_home_page_leads_from_its_folder():
    assert "](nbs/tutorials/" in docs.readme()
    assert "](tutorials/" not in docs.readme()
