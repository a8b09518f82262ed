"""The retraining pipeline, for Kubeflow and for a laptop: the same definition, compiled for either.

Every component is a few words to `pdm.loop.pipeline`, which runs the step's notebook. What may be cached takes the digest of its data, never a path, and every
setting that its inputs were made with, used or not: of an input artifact, Kubeflow's cache knows only the name. A shard says which champion it has, where that
is to be calibrated anew. What looks at the world (`look`, `package`, `gate`, `promote`) is never cached.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from kfp import dsl, kubernetes
from kfp.dsl import Dataset, Input, Model, Output

from pdm.config import Settings

# --- components: their source is what runs in the pod, so each says all that it needs ---


def look(source: str, kinds: list, name: str, per: str, most_assets: int, stream: str, since: str, until: str, spans: list, assets: list) -> list:
    from pdm.loop.pipeline import look

    return look(source, kinds, name=name, per=per, most_assets=most_assets, stream=stream, since=since, until=until, spans=spans, assets=assets)


def ingest(
    shard: dict, source: str, length: int, stream: str, windows_per_asset: int, seed: int, since: str, spans: list,
    made: Output[Dataset]
) -> NamedTuple("Ingested", [("digest", str)]):  # type: ignore[valid-type]
    from pdm.config import load_settings
    from pdm.loop.pipeline import task

    given = dict(source=source, name=shard["name"], assets=shard["assets"], source_digest=shard["digest"], length=length, stream=stream,
                 windows_per_asset=windows_per_asset, seed=seed, since=since, until=shard["until"], spans=spans, dask_address=load_settings().dask_address)
    return (task("ingest", shard["name"], given, made)["digest"],)


def train(
    shard: dict, kind: str, digest: str, false_alarms_per_day: float, epochs: int, seed: int, data: Input[Dataset], made: Output[Model]
) -> None:
    from pdm.loop.pipeline import task

    given = dict(data=f"{data.path}/data", name=shard["name"], kind=kind, false_alarms_per_day=false_alarms_per_day, epochs=epochs, seed=seed)
    task("train", shard["name"], given, made, [data], kind)


def evaluate(
    shard: dict, digest: str, kinds: list, false_alarms_per_day: float, epochs: int, seed: int, data: Input[Dataset], models: Input[list[Model]],
    made: Output[Model]
) -> None:
    from pdm.loop.pipeline import task

    given = dict(data=f"{data.path}/data", detectors=[f"{m.path}/detector" for m in models], seed=seed)
    task("evaluate", shard["name"], given, made, [data, *models])


def export(
    stream: str, shard: dict, digest: str, kinds: list, false_alarms_per_day: float, epochs: int, seed: int, data: Input[Dataset], model: Input[Model], made: Output[Model]
) -> None:
    from pdm.loop.pipeline import task

    task("export", shard["name"], dict(data=f"{data.path}/data", detector=f"{model.path}/detector", stream=stream), made, [data, model])


def package(
    shard: dict, excused: str, data: Input[Dataset], models: Input[list[Model]], chosen: Input[Model], exported: Input[Model], made: Output[Model]
) -> NamedTuple("Packaged", [("digest", str)]):  # type: ignore[valid-type]
    from pdm.loop.pipeline import task

    return (task("package", shard["name"], dict(exported=exported.path, excused=excused), made, [data, *models, chosen, exported])["digest"],)


def gate(
    shard: dict, frozen: str, spans: list, seed: int, data: Input[Dataset], packaged: Input[Model], made: Output[Model]
) -> bool:
    from pdm.loop.pipeline import task

    given = dict(data=f"{data.path}/data", packaged=packaged.path, frozen=frozen, spans=spans, seed=seed)
    return task("gate", shard["name"], given, made, [data, packaged])["passed"]


def promote(shard: dict, digest: str, wanted: bool, gated: Input[Model]) -> None:
    from pdm.loop.pipeline import promote

    promote(shard["name"], digest, gated.path, wanted)


def record(status: dsl.PipelineTaskFinalStatus, trigger: str) -> None:
    from pdm.loop.pipeline import record

    record(trigger, status.state, status.error_message or "")


# --- how they run, and in which order ---

# of the settings' ConfigMap; the last three say what machine the gate judges for
_KEYS = ("PIPELINE_ROOT", "TRACKING_URL", "BUNDLE_URL", "ARCHIVE_URL", "DASK_ADDRESS", "SIGNING_KEY", "SIGNING_CERTIFICATE",
         "ENGINE_PROFILE", "ENGINE_PRECISION", "BUNDLE_MAX_MB")  # fmt: skip
_SECRETS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")


def build(settings: Settings, here: bool = False) -> Any:
    "The pipeline, as these settings want its steps to run on a cluster: image, requests, node pool; or on this machine."

    def component(function: Callable[..., Any]) -> Any:
        made = dsl.component(function, base_image=settings.pipeline_image, install_kfp_package=False)
        looks = function in (look, package, gate, promote)

        def place(**given: Any) -> dsl.PipelineTask:
            task = made(**given)
            task.set_cpu_request(settings.pipeline_cpu).set_memory_request(settings.pipeline_memory).set_memory_limit(settings.pipeline_memory)
            if not here:
                task.set_retry(num_retries=2, backoff_duration="20s", backoff_factor=2)  # what is not the infrastructure's fault ends at once when tried again
            if looks:
                task.set_caching_options(False)
            if function is train and settings.pipeline_gpu:
                gpu, _, count = settings.pipeline_gpu.partition("=")
                task.set_accelerator_type(gpu).set_accelerator_limit(count)
            if function is train and settings.pipeline_node_pool:
                label, _, value = settings.pipeline_node_pool.partition("=")
                kubernetes.add_node_selector(task, label, value)
                kubernetes.add_toleration(task, key=label, operator="Equal", value=value, effect="NoSchedule")
            return in_cluster(task)

        return place

    def in_cluster(task: dsl.PipelineTask) -> dsl.PipelineTask:
        kubernetes.use_field_path_as_env(task, "PREDMAINT_RUN_ID", "metadata.labels['pipeline/runid']")
        kubernetes.use_config_map_as_env(task, "predmaint-settings", {k: k for k in (f"PREDMAINT_{key}" for key in _KEYS)}, optional=True)
        kubernetes.use_secret_as_env(task, "predmaint-secrets", {k: k for k in _SECRETS}, optional=True)
        kubernetes.use_secret_as_volume(task, "predmaint-signing", "/etc/predmaint/signing", optional=True)
        return task

    steps = {f.__name__: component(f) for f in (look, ingest, train, evaluate, export, package, gate, promote)}
    at_the_end = dsl.component(record, base_image=settings.pipeline_image, install_kfp_package=False)

    @dsl.pipeline(name="chain", description="From the windows of the assets of a shard to a champion of theirs")
    def chain(shard: dict, source: str, kinds: list, length: int, stream: str, windows_per_asset: int, false_alarms_per_day: float, epochs: int,
              seed: int, since: str, spans: list, frozen: str, promotes: bool, excused: str):  # fmt: skip
        data = steps["ingest"](shard=shard, source=source, length=length, stream=stream, windows_per_asset=windows_per_asset, seed=seed,
                               since=since, spans=spans)  # fmt: skip
        made = data.outputs["made"]
        how = dict(shard=shard, digest=data.outputs["digest"], false_alarms_per_day=false_alarms_per_day, epochs=epochs, seed=seed, data=made)
        with dsl.ParallelFor(kinds) as kind:
            trained = steps["train"](kind=kind, **how)
        models = trained.outputs["made"]
        chosen = steps["evaluate"](kinds=kinds, models=dsl.Collected(models), **how).outputs["made"]
        exported = steps["export"](stream=stream, kinds=kinds, model=chosen, **how).outputs["made"]
        packaged = steps["package"](shard=shard, excused=excused, data=made, models=dsl.Collected(models), chosen=chosen, exported=exported)
        gated = steps["gate"](shard=shard, frozen=frozen, spans=spans, seed=seed, data=made, packaged=packaged.outputs["made"])
        with dsl.If(gated.outputs["Output"] == True, "passed"):  # noqa: E712  the local runner decides by an unnamed output only
            steps["promote"](shard=shard, digest=packaged.outputs["digest"], wanted=promotes, gated=gated.outputs["made"])

    @dsl.pipeline(name="retraining", description="Models for all assets of a source: one for each shard of them")
    def retraining(
        source: str,
        name: str = "motor",
        per: str = "all",
        most_assets: int = 100,
        kinds: list = ["mahalanobis", "iforest", "conv_ae"],  # noqa: B006
        length: int = 0,
        stream: str = "",
        windows_per_asset: int = 400,
        false_alarms_per_day: float = 1.0,
        epochs: int = 60,
        seed: int = 0,
        since: str = "",
        until: str = "",
        spans: list = [],  # noqa: B006
        frozen: str = "",
        promotes: bool = True,
        excused: str = "",
        assets: list = [],  # noqa: B006
        trigger: str = "",
    ):
        end = in_cluster(at_the_end(trigger=trigger).set_caching_options(False))
        with dsl.ExitHandler(end, "retraining"):
            shards = steps["look"](source=source, kinds=kinds, name=name, per=per, most_assets=most_assets, stream=stream, since=since, until=until, spans=spans,
                                    assets=assets)  # fmt: skip
            with dsl.ParallelFor(shards.output, parallelism=20) as shard:
                chain(shard=shard, source=source, kinds=kinds, length=length, stream=stream, windows_per_asset=windows_per_asset,
                      false_alarms_per_day=false_alarms_per_day, epochs=epochs, seed=seed, since=since, spans=spans, frozen=frozen,
                      promotes=promotes, excused=excused)  # fmt: skip

    return retraining
