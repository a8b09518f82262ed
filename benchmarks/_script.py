"""The script that people write before they look for anything else, kept short and honest: it is what benchmarks/edge.py measures the edge against.

Subscribe, turn each window into the features that everybody takes, ask PyOD's isolation forest, write one point to InfluxDB, next. It knows no
acknowledgement but the broker's, no batch, no journal: what is under way when it dies is gone.

    python _script.py HOST PORT TOPIC INFLUX_URL TOKEN BUCKET HEALTHY.npy
"""

import sys

import cbor2
import numpy as np
import paho.mqtt.client as mqtt
from influxdb_client import InfluxDBClient, Point
from influxdb_client.client.write_api import SYNCHRONOUS
from pyod.models.iforest import IForest
from scipy.stats import kurtosis, skew


def features(x: np.ndarray) -> np.ndarray:
    "Of a window [channel, sample]: mean, RMS, peak, crest, skewness, kurtosis and the energy in eight bands, channel after channel."
    rms = np.sqrt(np.mean(x**2, axis=1))
    peak = np.max(np.abs(x), axis=1)
    power = np.abs(np.fft.rfft(x, axis=1)) ** 2
    bands = [np.log(band.sum(axis=1) + 1e-12) for band in np.array_split(power, 8, axis=1)]
    return np.concatenate([x.mean(axis=1), rms, peak, peak / rms, skew(x, axis=1), kurtosis(x, axis=1), *bands])


def main(host: str, port: str, topic: str, url: str, token: str, bucket: str, healthy: str) -> None:
    model = IForest(n_estimators=100, random_state=0)
    model.fit(np.stack([features(x) for x in np.load(healthy)]))
    writer = InfluxDBClient(url=url, token=token, org="-").write_api(write_options=SYNCHRONOUS)

    def on_connect(client, userdata, flags, reason, properties):
        client.subscribe(topic, qos=1)

    def on_message(client, userdata, message):
        window = cbor2.loads(message.payload)
        shape, samples = window["samples"].value
        x = np.frombuffer(samples.value, np.float32).reshape(shape)
        score = float(model.decision_function(features(x)[None])[0])
        asset = message.topic.split("/")[-3]
        point = Point("health").tag("asset", asset).field("score", score).field("anomaly", int(score > model.threshold_)).time(window["t0_ns"])
        writer.write(bucket=bucket, record=point)

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_connect, client.on_message = on_connect, on_message
    client.connect(host, int(port))
    client.loop_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
