"""The site's images, built with podman on a base that is made here from Debian's packages, for every test that runs containers.

`image("agent")` builds what is not built yet, and names it. podman keeps base and layers: the first time takes two minutes, later ones seconds."""

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from pdm.process import find_program

ROOT = Path(__file__).resolve().parent.parent
BASE, PACKAGES = "localhost/predmaint-base-python", "python3,python3-venv,libpython3.11,ca-certificates"  # the third for Triton's stub
HELD = ["--read-only", "--tmpfs=/tmp:rw,mode=1777", "--cap-drop=all", "--security-opt=no-new-privileges"]  # as a cluster holds a pod
# for machines without systemd, and those that may not raise their limits
_PLAIN = '[containers]\ndefault_ulimits = ["nofile=8192:8192", "nproc=4000:4000"]\n[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def done(*command: object, **environment: str) -> str:
    "What a command prints; it must succeed."
    ended = run(*command, **environment)
    assert ended.returncode == 0, f"{' '.join(map(str, command))}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    return ended.stdout.strip()


@contextmanager
def _alone() -> Iterator[None]:
    "Workers of pytest build one after another."
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def settings() -> dict[str, str]:
    "The environment in which podman can run a container here. Skips the test where it can't."
    if None in map(find_program, ("podman", "mmdebstrap")):
        pytest.skip("apt-get install --no-install-recommends podman buildah runc netavark aardvark-dns iptables catatonit uidmap mmdebstrap")
    with _alone():
        (ROOT / "build/containers.conf").write_text(_PLAIN)
        if run("podman", "image", "inspect", "--format={{.Comment}}", BASE).stdout.strip() != PACKAGES:
            tar = ROOT / "build/base.tar"
            done("mmdebstrap", "--quiet", "--variant=minbase", *(f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("doc", "locale", "man")),
                 f"--include={PACKAGES}", "bookworm", tar)
            done("podman", "import", "--message", PACKAGES, tar, BASE)
            tar.unlink()
    for environment in ({}, {"CONTAINERS_CONF": str(ROOT / "build/containers.conf")}):
        tried = run("podman", "run", "--rm", "--network=none", BASE, "true", **environment)
        if tried.returncode == 0:
            return environment
    pytest.skip(f"podman can't run containers here: {tried.stderr.strip()[-300:]}")


def podman(*arguments: object) -> str:
    return done("podman", *arguments, **settings())


def base() -> str:
    "A Python 3.11 from Debian's packages, by its digest."
    return json.loads(podman("image", "inspect", BASE))[0]["RepoDigests"][0]


def build(name: str, **given: str) -> subprocess.CompletedProcess:
    "edge/images/build.sh, as anybody would call it."
    flags = "--pull=never --network=host" + " --volume=/etc/ssl/certs:/etc/ssl/certs:ro" * Path("/etc/ssl/certs").is_dir()
    told = {"BASE": base(), "PREFIX": "localhost/", "TAG": "under-test", "IMAGE_FLAGS": flags, **settings(), **given}
    with _alone():
        return run("edge/images/build.sh", name, **told)


@cache
def image(name: str) -> str:
    "The image of that name, built: agent, sinks, updater or triton."
    ended = build(name)
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    return f"localhost/predmaint-{name}:under-test"


class Container:
    "A container of an image, held as a cluster holds it, and on this machine's network; gone when it is closed."

    def __init__(self, name: str, *arguments: str, flags: tuple[str, ...] = (), **environment: object):
        self.name = name
        told = [f"--env={k}={v}" for k, v in environment.items()]
        self.id = podman("run", "--detach", "--network=host", *HELD, *flags, *told, image(name), *arguments)

    @property
    def pid(self) -> int:
        "Of its first process; 0 when it has ended."
        return int(podman("inspect", "--format={{.State.Pid}}", self.id))

    def log(self) -> str:
        ended = run("podman", "logs", self.id, **settings())
        return ended.stdout + ended.stderr

    def run(self, *command: str) -> subprocess.CompletedProcess:
        "A command in it."
        return run("podman", "exec", self.id, *command, **settings())

    def wait(self, true, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not true():
            assert self.pid and time.monotonic() < end, f"{self.name}: {self.log()[-2000:]}"
            time.sleep(0.1)

    def stop(self) -> int:
        "As a cluster ends it: SIGTERM, and ten seconds to obey. Its exit code."
        podman("stop", "--time=10", self.id)
        return int(podman("inspect", "--format={{.State.ExitCode}}", self.id))

    def close(self) -> None:
        podman("rm", "--force", "--time=0", self.id)

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
