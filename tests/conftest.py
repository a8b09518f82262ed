"""Fixtures that several tests share, by room."""

import hypothesis
import numpy as np
import pytest
from graphs import rms_graph

# how long an example takes says nothing here: a busy machine stalls for seconds
hypothesis.settings.register_profile("pdm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("pdm")

# pdm.serve: a bundle whose scores can be checked by hand, and that needs no training


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory):
    "A function that writes a bundle of `rms_graph`."
    from pdm.model.bundle import Condition, Contract, write_bundle

    folder = tmp_path_factory.mktemp("bundles")

    def make(gain=1.0, conditions=0, channels=("h", "v"), samples=64, **contract):
        ranges = tuple(Condition(name=f"c{i}", unit="1", low=0, high=1) for i in range(conditions))
        return write_bundle(folder, rms_graph(len(channels), samples, gain, conditions), Contract(
            **{"name": "motor", "kind": "mahalanobis", "channels": channels, "units": ("g",) * len(channels), "rate_hz": 25600.0,
               "samples": samples, "conditions": ranges, "embedding": len(channels) + 1, "training_data": "0" * 64, **contract}))

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle):
    "Two channels of 64 samples; the score is the mean of the channels' RMS."
    return make_bundle()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    "A tracking server: slow to start, and shared by all that name their models apart."
    import servers

    server = servers.Mlflow(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.close()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
