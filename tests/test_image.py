"""The image of the pipeline's steps: built on a base that is made here, and used as Kubeflow uses it. It takes minutes, and runs on `make image-test` alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import edge_images
import pytest
import yaml
from edge_images import ROOT

IMAGE = "localhost/predmaint-python:under-test"
pytestmark = [pytest.mark.skipif(not os.environ.get("PREDMAINT_IMAGE_TEST"), reason="make image-test"), pytest.mark.timeout(1800)]
_HELD = [*edge_images.HELD, "--network=none"]


def run(*command) -> subprocess.CompletedProcess:
    return edge_images.run(*command, **edge_images.settings())


def done(*command) -> str:
    return edge_images.done(*command, **edge_images.settings())


@pytest.fixture(scope="module")
def base():
    "A Python 3.11 from Debian's packages, by its digest."
    return edge_images.base()


@pytest.fixture(scope="module")
def image(base):
    "Built by `make image`, with torch as it is here: its wheel comes from where our own came from."
    import torch

    wheels = ROOT / "build" / "wheels"
    pin = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
    index = ["--index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    done(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.11", "-d", wheels, *index, pin)
    flags = ["--pull=never", "--network=host", f"--volume={wheels}:/mnt:ro", "--build-arg=PIP_FIND_LINKS=/mnt"]
    flags += [f"--volume={certificates}:{certificates}:ro" for certificates in ["/etc/ssl/certs"] if Path(certificates).is_dir()]
    done("make", "--no-print-directory", "image", f"BASE={base}", f"IMAGE={IMAGE}", f"VARIANT={'cuda' if torch.version.cuda else 'cpu'}",
         f"IMAGE_FLAGS={' '.join(flags)}")
    return json.loads(done("podman", "image", "inspect", IMAGE))[0]


def test_a_base_that_is_named_by_a_tag_is_refused(base):
    refused = run("make", "--no-print-directory", "image", f"BASE={edge_images.BASE}:latest", f"IMAGE={IMAGE}-none", "IMAGE_FLAGS=--pull=never")
    assert refused.returncode and "expected name@sha256:<digest>" in refused.stderr + refused.stdout


def test_the_image_says_what_it_is_and_holds_nothing_of_its_making(image):
    labels = image["Labels"]
    assert labels["org.opencontainers.image.revision"] == done("git", "rev-parse", "HEAD") and "@sha256:" in labels["org.opencontainers.image.base.name"]
    assert image["Config"]["User"] == "65532:65532" and not image["Config"].get("Entrypoint") and "python" in image["RepoTags"][0]
    told = done("podman", "history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE) + json.dumps(image["Config"]["Env"])
    assert "PIP_" not in told and "UV_" not in told and "/mnt" not in told
    left = done("podman", "run", "--rm", *_HELD, IMAGE, "sh", "-c", "command -v gcc cc pip uv || true; ls -d /cache /build /opt/build /mnt/* 2>/dev/null || true")
    assert left == ""
    print(f"\n{IMAGE}: {image['Size'] / 1e9:.2f} GB")


def test_steps_run_as_nobody_on_a_root_that_they_cannot_write(image, tmp_path):
    tmp_path.chmod(0o777)
    code = ("import os, sys; from pdm.loop.steps import run_step\n"
            "for step, given in (('ingest', {'source': 'scenario:outer_race_slow?windows=200', 'stream': 'vibration', 'length': 2048}),\n"
            "                    ('train', {'data': '/out/ingest/data', 'kind': 'mahalanobis'})):\n"
            "    ended = run_step(step, given, f'/out/{step}')\n"
            "    print(os.getuid(), ended.status, ended.reason)")
    told = done("podman", "run", "--rm", *_HELD, f"--volume={tmp_path}:/out:rw", IMAGE, "python", "-c", code)
    assert [line.strip() for line in told.splitlines()] == ["65532 done"] * 2
    assert (tmp_path / "train" / "report" / "train.ipynb").stat().st_uid == 65532 and (tmp_path / "ingest" / "data").is_dir()


def test_a_component_of_kubeflow_runs_in_the_image(image, tmp_path):
    from kfp import compiler, dsl

    @dsl.component(base_image=IMAGE, install_kfp_package=False)
    def double(n: int) -> int:
        import pdm.loop.steps  # noqa: F401  as every component of ours needs it

        return 2 * n

    compiler.Compiler().compile(double, str(tmp_path / "double.yaml"))
    executor = next(iter(next(yaml.safe_load_all((tmp_path / "double.yaml").read_text()))["deploymentSpec"]["executors"].values()))["container"]
    given = {"inputs": {"parameterValues": {"n": 21}},
             "outputs": {"parameters": {"Output": {"outputFile": "kfp/outputs/Output"}}, "outputFile": "kfp/outputs.json"}}
    args = [json.dumps(given) if arg == "{{$}}" else arg for arg in executor["args"]]
    command = [*executor["command"], *args]
    told = done("podman", "run", "--rm", *_HELD, IMAGE, "sh", "-c", '"$@" >&2 && cat kfp/outputs.json', "sh", *command)
    assert json.loads(told)["parameterValues"] == {"Output": 42}
