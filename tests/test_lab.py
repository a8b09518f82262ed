"""`make lab` as a person meets it: JupyterLab in a browser, the launcher run from its menu, and a panel whose picture follows the machines."""

import json
import os
import shutil
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from pdm.process import Child, find_program, free_port

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "only-for-this-test"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab, started by the Makefile's own recipe, with a person's folders of its own. Its address."
    home, port = tmp_path_factory.mktemp("home"), free_port()
    env = {name: str(home / name.lower()) for name in
           ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    calm = home / "jupyterlab_settings_dir/@jupyterlab/docmanager-extension/plugin.jupyterlab-settings"
    calm.parent.mkdir(parents=True)
    calm.write_text('{"autosave": false}')  # this is the tree under test: nothing in it is saved but by the test below
    flags = f"--no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={TOKEN}{' --allow-root' if os.geteuid() == 0 else ''}"
    made = [part for target in (".venv/ready", ".venv-triton/ready", "hooks") for part in ("-o", target)]  # they are there, or the tests would not run
    address = f"http://127.0.0.1:{port}"

    def answers():
        try:
            return urlopen(f"{address}/api/status?token={TOKEN}", timeout=2).status == 200
        except (URLError, OSError):
            return False

    with Child(["make", *made, "lab", f"LAB_FLAGS={flags}"], home / "lab.log", {**env, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}, cwd=ROOT) as child:
        child.wait_ready(answers, 90)
        yield address
        urlopen(Request(f"{address}/api/shutdown?token={TOKEN}", method="POST"), timeout=10)
        until = time.monotonic() + 30
        while child.alive and time.monotonic() < until:  # with it end the kernels, and with them what they have started
            time.sleep(0.1)


@pytest.mark.timeout(600)
def test_the_launcher_shows_a_fault_that_gets_its_name(lab):
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: make setup")
    chromium = find_program("chromium")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    pictures = ROOT / "build/lab"
    pictures.mkdir(parents=True, exist_ok=True)
    asked = set()
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking",
                                                                         "--disable-component-update", "--disable-sync", "--no-first-run"])
        page = browser.new_page(viewport={"width": 1300, "height": 1100})
        page.set_default_timeout(120_000)  # a busy machine takes minutes for what else is done in seconds
        page.on("request", lambda r: asked.add(r.url.split("/")[2] if "//" in r.url else ""))
        page.goto(f"{lab}/?token={TOKEN}")  # as the browser is opened: it lands on the launcher
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # the notebook's own sign says idle before there is a kernel
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        choice = page.locator(".widget-dropdown select")
        choice.wait_for()
        page.wait_for_function("document.querySelectorAll('.widget-dropdown select option').length >= 3")
        choice.select_option("lab/site/hall/line/pump/vibration")
        panel = page.locator(".jp-OutputArea-output:has(.widget-dropdown)")
        panel.get_by_text("outer race").wait_for()
        picture = panel.locator("img")
        picture.scroll_into_view_if_needed()
        before = picture.get_attribute("src")
        page.wait_for_function("before => { const i = document.querySelector('.jp-OutputArea-output img.widget-image'); return i && i.src != before && i.naturalWidth > 500 }", arg=before)
        page.screenshot(path=str(pictures / "panel.png"))
        panel.get_by_role("button", name="stop").click()
        panel.get_by_text("stopped").wait_for()
        errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-OutputArea-output [class*=ansi-red]").all_inner_texts()
        browser.close()
    assert not errors
    assert {host for host in asked if host} == {lab.removeprefix("http://")}  # nothing of the outside is asked for


def test_what_jupyterlab_saves_is_clean(lab):
    folder = ROOT / "build/lab/saved"
    folder.mkdir(parents=True, exist_ok=True)
    cell = {"cell_type": "code", "execution_count": 7, "id": "a", "metadata": {"scrolled": True}, "source": "1", "outputs": [
        {"output_type": "execute_result", "execution_count": 7, "metadata": {}, "data": {"text/plain": "1"}},
        {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "b"}, "text/plain": "VBox()"}}]}
    content = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3 (mine)"}, "language_info": {"name": "python"}},
               "nbformat": 4, "nbformat_minor": 5}
    try:
        urlopen(Request(f"{lab}/api/contents/build/lab/saved/x.ipynb?token={TOKEN}", method="PUT",
                        data=json.dumps({"type": "notebook", "content": content}).encode()), timeout=20)
        saved = json.loads((folder / "x.ipynb").read_text())
    finally:
        shutil.rmtree(folder)
    cell = saved["cells"][0]
    assert (cell["execution_count"], cell["metadata"], list(saved["metadata"])) == (None, {}, ["kernelspec"])
    assert [o["output_type"] for o in cell["outputs"]] == ["execute_result"]  # a widget's view shows nothing to whoever comes later
