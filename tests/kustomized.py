"What kustomize renders, read as Kubernetes would read it: for the tests of the platform's and the edge's manifests. No cluster is needed."

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(os.environ.get("PREDMAINT_PLATFORM_ENV") or ROOT / ".venv-platform")
needs_tools = pytest.mark.skipif(not (TOOLS / "ready").exists(), reason="the platform's checks are not here: make platform-env")


@cache
def rendered(overlay: Path) -> list[dict]:
    kubectl = shutil.which("kubectl") or shutil.which("kubectl", path=str(TOOLS / "bin"))
    if not kubectl:
        pytest.skip("kubectl is not here: make platform-env")
    done = subprocess.run([kubectl, "kustomize", overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods(objects: list[dict]) -> Iterator[tuple[str, dict]]:
    "Name, and template of the pod, of all that runs."
    for o in objects:
        spec = o.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            yield o["metadata"]["name"], template


def containers(objects: list[dict]) -> Iterator[tuple[str, dict]]:
    for name, template in pods(objects):
        for c in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            yield f"{name}/{c['name']}", c


def listing(objects: list[dict]) -> list[str]:
    "Kind, name and namespace of each; the name of a ConfigMap without the hash that kustomize adds."
    return sorted(f"{o['kind']} {re.sub('-[a-z0-9]{10}$', '', o['metadata']['name']) if o['kind'] == 'ConfigMap' else o['metadata']['name']} "
                  f"{o['metadata'].get('namespace', '-')}" for o in objects)


def golden(name: str) -> list[str]:
    return (ROOT / "tests/golden" / name).read_text().split("\n")[:-1]


def with_tools(code: str, *args: object, text: str | None = None) -> Any:
    "What a program prints as JSON in the environment of the checks."
    done = subprocess.run([TOOLS / "bin/python", "-c", code, *map(str, args)], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def misfits(objects: dict[str, list[dict]], versions: tuple[str, ...]) -> list[str]:
    "What Kubernetes of these versions would not take, by what is rendered."
    return with_tools("""
import json, sys, kubernetes_validate
wrong = []
objects, versions = json.load(sys.stdin)
for version in versions:
    for overlay, rendered in objects.items():
        for o in rendered:
            try:
                kubernetes_validate.validate(o, version, strict=True)
            except kubernetes_validate.ValidationError as e:
                wrong.append(f"{version} {overlay} {o['kind']} {o['metadata']['name']}: {e.message}")
print(json.dumps(wrong))""", text=json.dumps([objects, versions]))


def selects(selector: dict, labels: dict) -> bool:
    return (all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
            and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])))


def allowed(policies: list[dict], direction: str, here: dict, there: dict, port: int) -> bool:
    "May one with the labels `here` send to (Egress) or hear from (Ingress) one in the same namespace with the labels `there`, as Kubernetes reads the policies?"
    side, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    mine = [p for p in policies if direction in p["policyTypes"] and selects(p["podSelector"], here)]
    return not mine or any(
        ("ports" not in rule or any(p["port"] == port for p in rule["ports"]))
        and (peers not in rule or any("namespaceSelector" not in peer and "podSelector" in peer and selects(peer["podSelector"], there) for peer in rule[peers]))
        for p in mine for rule in p.get(side, []))
