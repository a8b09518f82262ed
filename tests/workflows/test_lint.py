"""Every workflow, and every action of our own, as three programs read them that know GitHub's rules: no job need have run to find what they find."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from on_this_machine import ROOT, STAND_INS, USES, WORKFLOWS, sources

BIN = Path(sys.executable).parent
FILES = [pytest.param(f, id=str(f.relative_to(ROOT / ".github"))) for f in sources()]


def run(*command) -> tuple[int, str]:
    done = subprocess.run([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def test_actionlint_finds_nothing():
    "It reads the shell in them too, where shellcheck is installed."
    code, said = run(BIN / "actionlint", "-color=false")
    assert code == 0, said


def test_zizmor_finds_nothing():
    "Untrusted input in a shell, rights that are not needed, actions and images that are not pinned, credentials that are left lying."
    code, said = run(BIN / "zizmor", "--offline", "--no-progress", ".github")
    assert code == 0, said


def test_workflows_are_what_githubs_schema_allows():
    code, said = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS.glob("*.yml"))
    assert code == 0, said


def test_actions_of_our_own_and_stand_ins_are_what_githubs_schema_allows():
    code, said = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-actions", *(f for f in sources() if f.name == "action.yml"),
                     *STAND_INS.rglob("action.yml"))
    assert code == 0, said


@pytest.mark.parametrize("file", FILES)
def test_an_action_of_others_is_pinned_by_commit_and_says_its_version(file):
    for line in file.read_text().splitlines():
        if "uses:" in line and "uses: ./" not in line and not line.lstrip().startswith("#"):
            found = USES.search(line)
            assert found and len(found[3]) == 40 and int(found[3], 16) and (found[4] or "").startswith("v"), f"expected owner/name@<commit> # vX.Y.Z: {line.strip()}"


def test_an_action_is_the_same_commit_wherever_it_is_used():
    commits: dict[str, set[str]] = {}
    for file in sources():
        for name, _, ref, version in USES.findall(file.read_text()):
            commits.setdefault(name, set()).add(f"{ref} {version}")
    assert {name: refs for name, refs in commits.items() if len(refs) > 1} == {}


@pytest.mark.parametrize("file", [p for p in FILES if p.values[0].parent == WORKFLOWS])
def test_a_workflow_gives_no_right_but_by_job_has_a_concurrency_group_and_an_end(file):
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {} and workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120 and job["permissions"], name


@pytest.mark.parametrize("folder", [p.parent for p in STAND_INS.rglob("action.yml")], ids=lambda p: str(p.relative_to(STAND_INS)))
def test_a_stand_in_calls_itself_one_and_stands_in_for_something(folder):
    name = str(folder.relative_to(STAND_INS))
    assert yaml.safe_load((folder / "action.yml").read_text())["name"] == f"stand-in for {name}"
    assert any(f"uses: {name}@" in f.read_text() for f in sources()), f"no workflow uses {name}"
