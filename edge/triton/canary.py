"""Does Triton answer, and with numbers? For probes: `python3 -I canary.py [--address 127.0.0.1:8000] [--timeout 4]`.

A server whose stub has died says that it is ready, and its models, too; only an inference tells. So each model version that is loaded
scores one window here. Exit code 0: all of them have answered, or none is loaded and the server is ready. 1: one sentence says who has not.
It runs in Triton's own image, whose Python has little else: standard library only.

The agent starts a dead stub again by itself within seconds. A liveness probe leaves it that time: every 10 s, three failures.
"""

import argparse
import http.client
import json
import math
import sys
import time
from typing import Any


class Refused(Exception):
    "No, and why: a sentence for people."


def ask(address: str, end: float, method: str, path: str, body: Any = None) -> Any:
    "What Triton's HTTP API says to that, as JSON. Raises `Refused`."
    left = end - time.monotonic()
    if left <= 0:
        raise Refused("the time is up")
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=left)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        said = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as e:
        raise Refused(f"no answer to {method} {path} ({e or type(e).__name__})") from e
    finally:
        connection.close()
    if answer.status != 200:
        raise Refused(f"{method} {path} is answered with {answer.status}: {said[:300]}")
    try:
        return json.loads(said) if said else None
    except ValueError as e:
        raise Refused(f"{method} {path} is answered with what is no JSON: {said[:300]}") from e


def values(tensor: dict, shape: list) -> list:
    "A window of tones, the same at each call; of all else nothing is known, which zeros say."
    if tensor["name"] != "window":
        return [0.0] * math.prod(shape)
    return [math.sin(0.07 * i) + math.sin(1.3 * i) / 2 for i in range(math.prod(shape))]


def score(address: str, end: float, name: str, version: str) -> None:
    "Let a model version score one window. Raises `Refused` where the answer is not whole."
    model = f"/v2/models/{name}/versions/{version}"
    told = ask(address, end, "GET", model)
    inputs = []
    for tensor in told["inputs"]:
        shape = [1, *map(int, tensor["shape"][1:])]
        inputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": values(tensor, shape)})
    answers = {o["name"]: o for o in ask(address, end, "POST", f"{model}/infer", {"inputs": inputs})["outputs"]}
    for output in told["outputs"]:
        got = answers.get(output["name"], {})
        data = got.get("data") or []
        if len(data) != math.prod([1, *map(int, output["shape"][1:])]):
            raise Refused(f"{output['name']} has {len(data)} values, {output['shape']} were expected")
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in data):
            raise Refused(f"{output['name']} has values that are not finite")


def main() -> str:
    "What is wrong; empty if nothing is."
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:8000", help="of Triton's HTTP API")
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds for all of it")
    given = parser.parse_args()
    end = time.monotonic() + given.timeout
    try:
        ask(given.address, end, "GET", "/v2/health/ready")
        models = ask(given.address, end, "POST", "/v2/repository/index", {"ready": True})
    except Refused as e:
        return f"Triton at {given.address}: {e}"
    for model in models:
        try:
            score(given.address, end, model["name"], model["version"])
        except Refused as e:
            return f"model {model['name']}, version {model['version']}: {e}"
    return ""


if __name__ == "__main__":
    sys.exit(main() or 0)
