"""ci.yml's own logic, on this machine: its jobs run what `.ci/run` runs, set up from the cache, fail where something fails, and leave what is looked at."""

import re
import subprocess
import sys

import pytest
import yaml
from on_this_machine import ROOT, WORKFLOWS

sys.path.insert(0, str(ROOT / "tools"))
from notes import notes
from parts import part

CI = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())
ON_3_11 = {"python": "3.11"}


def words(command: str) -> set[str]:
    "The parts that a line of .ci/run names."
    return set(command.replace('"', " ").split()[1:])


def test_ci_runs_all_of_what_ci_run_runs_and_each_job_is_a_line_of_it():
    everywhere = set(re.search(r"^all=\((.*)\)$", (ROOT / ".ci/run").read_text(), re.M)[1].replace('"', " ").split())
    everywhere = everywhere - {"test"} | set(re.search(r"^TEST := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    action = yaml.safe_load((ROOT / ".github/actions/setup/action.yml").read_text())
    steps = [*action["runs"]["steps"], *(s for job in CI["jobs"].values() for s in job["steps"])]
    on_github = set().union(*(words(s["run"]) for s in steps if s.get("run", "").startswith(".ci/run")))
    assert on_github == everywhere | {"integration"}, "integration wants servers that are not here"
    for python in ("3.11", "3.12"):
        assert all(python in job["strategy"]["matrix"]["python"] for name, job in CI["jobs"].items() if name not in ("integration", "coverage"))


@pytest.mark.parametrize("of", [1, 4, 7])
def test_each_test_file_is_in_one_part_of_the_tests(of):
    files = [f for k in range(1, of + 1) for f in part(k, of)]
    assert sorted(files) == sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py"))


def test_ci_runs_as_many_parts_as_it_cuts_the_tests_into():
    job = CI["jobs"]["tests"]
    (cut,) = [s["env"]["PART"] for s in job["steps"] if "PART" in s.get("env", {})]
    assert cut == "${{ matrix.part }}/4" and job["strategy"]["matrix"]["part"] == [1, 2, 3, 4]


def test_a_part_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no part 5 of 4: expected 1 to 4"):
        part(5, 4)


def test_a_job_sets_up_from_the_cache_runs_lessons_and_leaves_its_coverage(act):
    done = act("lessons", env={"LESSONS": "nbs/signal/kinematics.ipynb"}, matrix=ON_3_11)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "make: Nothing to be done for 'setup'." in done.stdout, "what comes from the cache is not made again"
    assert (done.artifacts / "covered-lessons-3.11/data").exists(), done.stdout[-5000:]


def test_a_job_runs_its_part_of_the_tests_and_a_failing_test_fails_it_but_not_its_report(act, tmp_path):
    (tmp_path / "failing.py").write_text("def test_of_a_failure():\n    assert 1 == 2\n")
    done = act("tests", env={"TESTS": tmp_path / "failing.py"}, matrix=ON_3_11 | {"part": 4})
    assert done.returncode != 0 and "1 failed" in done.stdout, done.stdout[-5000:]
    assert 'name="test_of_a_failure"' in (done.artifacts / "junit-3.11-4/junit/pytest.xml").read_text()


def test_a_version_that_is_not_released_has_no_notes():
    changelog = "# Changelog\n\n## 0.2.0 (2026-05-01)\n\n- Two.\n\n## 0.1.0 (unreleased)\n\n- One.\n"
    assert notes("v0.2.0", changelog, "0.2.0") == "- Two.\n"
    for tag, version, why in (("v0.1.0", "0.1.0", "unreleased"), ("v0.3.0", "0.3.0", "says nothing"), ("v0.2", "0.2.0", "expected the tag v0.2.0")):
        with pytest.raises(ValueError, match=why):
            notes(tag, changelog, version)


def test_ci_run_says_what_it_cannot_do():
    done = subprocess.run([ROOT / ".ci/run", "no-such-part"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no-such-part" in done.stderr
