"""What a site's own cluster fetches from Git, as kustomize renders it; no Flux is needed. The way into that Git is in tests/workflows/test_deploy_model.py."""

import re
import shutil

import kustomized
import pytest
import yaml
from kustomized import ROOT, golden, listing

from pdm.config import Settings, load_settings
from pdm.loop.deploy import Checkout
from pdm.stream.rollout import read_wanted

GITOPS = ROOT / "edge/k3s/gitops"


@pytest.fixture
def sites(tmp_path):
    "The sites' repository to begin with, and a copy of `edge` in it, as its README says."
    shutil.copytree(GITOPS / "sites-repository", tmp_path / "sites")
    shutil.copytree(ROOT / "edge", tmp_path / "sites/edge", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "sites"


def test_a_site_of_the_sites_repository_is_the_overlay_of_its_kind_with_its_rings_file(sites):
    objects = kustomized.rendered(sites / "sites/plant-1")
    assert listing(objects) == golden("edge-cpu.txt")
    (sites / "rings/canary/desired").write_text(f"{'2b' * 32}\n")
    kustomized.rendered.cache_clear()
    after = {o["metadata"]["name"]: o for o in kustomized.rendered(sites / "sites/plant-1")}
    assert after["desired"]["data"] == {"desired": f"{'2b' * 32}\n"}
    assert {name for name, o in after.items() if o not in objects} == {"desired"}, "a new digest changes nothing else, and so restarts nobody"


def test_the_settings_of_the_sites_repository_name_rings_that_are_there(sites, monkeypatch):
    monkeypatch.setenv("PREDMAINT_SETTINGS", str(sites / "predmaint.toml"))
    settings: Settings = load_settings()
    assert list(settings.rings) == ["canary", "rest"]
    for ring in settings.rings:
        assert Checkout(sites).wanted(ring) == read_wanted(ROOT / "edge/k3s/site/desired")
        assert f"PREDMAINT_BUNDLE_URL={settings.bundle_url}" in (sites / "rings" / ring / "bundles.env").read_text()


def test_flux_reads_the_repository_by_an_app_and_takes_nothing_away():
    source, site = (next(o for o in yaml.safe_load_all((GITOPS / "flux.yaml").read_text()) if o["kind"] == kind) for kind in ("GitRepository", "Kustomization"))
    assert source["spec"]["provider"] == "github" and site["spec"]["sourceRef"] == {"kind": "GitRepository", "name": source["metadata"]["name"]}
    assert (GITOPS / "sites-repository" / site["spec"]["path"]).is_dir() and site["spec"]["prune"] is False
    said = (ROOT / "edge/k3s/README.md").read_text() + (GITOPS / "flux.yaml").read_text()
    assert len(set(re.findall(r"(?:Flux |--version=v)(\d+\.\d+\.\d+)", said))) == 1, "one version of Flux, wherever it is named"
