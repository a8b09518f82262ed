"""Kubeflow Pipelines as far as its REST API (v2beta1) goes for runs, recurring runs and experiments; nothing runs, a test says how far each run is.

What it takes and gives goes through the models of kfp-server-api, the package that kfp.Client itself speaks through: a field or a query that the API
does not have is refused as the real server refuses it."""

import http.server
import itertools
import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as kfp_api

from pdm.process import free_port

_LISTS = {"experiments": kfp_api.V2beta1ListExperimentsResponse, "runs": kfp_api.V2beta1ListRunsResponse,
          "recurringruns": kfp_api.V2beta1ListRecurringRunsResponse}
_KINDS = {"experiments": kfp_api.V2beta1Experiment, "runs": kfp_api.V2beta1Run, "recurringruns": kfp_api.V2beta1RecurringRun}
_KEYS = {"experiments": "experiment_id", "runs": "run_id", "recurringruns": "recurring_run_id"}
_SERVERS_OWN = {"run_id", "recurring_run_id", "created_at", "finished_at", "state", "run_details", "error", "status"}
_ALIVE = ("PENDING", "RUNNING", "PAUSED")
_client = kfp_api.ApiClient()


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def read(data: dict, kind: type):
    "The model that JSON is of; refused where it has a field that the model has not."
    model = _client.deserialize(SimpleNamespace(data=json.dumps(data)), kind)
    if lost := set(_flat(data)) - set(_flat(_client.sanitize_for_serialization(model))):
        raise Refused(400, f"unknown field {min(lost)!r} of {kind.__name__}")
    return model


def _flat(data, path=""):
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _flat(value, f"{path}.{key}")
    elif data is not None:
        yield path


class Kubeflow:
    "`runs`, `recurringruns` and `experiments` by id; `asked` holds method and path of each request."

    def __init__(self, token: str = "", namespace: str = "", port: int = 0, tls=None):
        self.token, self.namespace, self.tls = token, namespace, tls
        self.port = port or free_port()
        self.experiments: dict = {}
        self.runs: dict = {}
        self.recurringruns: dict = {}
        self.asked: list[str] = []
        self.queries: list[dict] = []
        self.failing: list[int] = []     # the next requests are answered with these codes
        self.page = 100                  # never more on a page than that
        self.before_create = lambda: None  # called before a run is made, such as to let another be made first
        self.clock = lambda: datetime.now(UTC).replace(microsecond=0)  # the real one keeps seconds
        self.lock, self.ids = threading.Lock(), itertools.count(1)
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self):
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, answer, kind = stand_in.answer(self.command, self.path, self.headers, json.loads(body) if body else None)
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                if status == 302:
                    self.send_header("Location", "/login")
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            allow_reuse_address = daemon_threads = True

            def handle_error(self, *_):  # a client that hangs up
                pass

        self.http = Server(("127.0.0.1", self.port), Handler)
        if self.tls:
            self.http.socket = self.tls.wrap_socket(self.http.socket, server_side=True)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, method: str, path: str, headers, body) -> tuple[int, object, str]:
        url = urlsplit(path)
        self.asked.append(f"{method} {url.path}")
        if self.failing and (status := self.failing.pop(0)):
            page = status in (200, 302)  # what a proxy shows to whoever has not logged in
            return (status, "<html>Log in</html>", "text/html") if page else (status, {"code": 14, "message": "told to fail"}, "application/json")
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"code": 16, "message": "Request header error: there is no user identity header"}, "application/json"
        try:
            found = re.fullmatch(r"/apis/v2beta1/(\w+)(?:/([\w-]+))?(?::(\w+))?", url.path)
            if found is None or found[1] not in _KINDS:
                return 404, "404 page not found", "text/plain"
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            return 200, _client.sanitize_for_serialization(self.act(method, *found.groups(), query, body)), "application/json"
        except Refused as e:
            return e.status, {"code": 3, "error": str(e), "message": str(e), "details": []}, "application/json"
        except ConnectionError:  # a test's wish: no answer
            raise
        except Exception as e:  # noqa: BLE001  as any server
            return 500, {"code": 13, "message": f"{type(e).__name__}: {e}"}, "application/json"

    def act(self, method, of, key, action, query, body):
        if method == "GET" and key is None:
            return self.list(of, query)
        if method == "POST" and key is None:
            if of == "runs":
                self.before_create()
            with self.lock:
                return self.create(of, read(body, _KINDS[of]))
        with self.lock:
            things = getattr(self, of)
            if key not in things:
                raise Refused(404, f"{_KINDS[of].__name__} {key} not found")
            if method == "GET":
                return things[key]
            if method == "DELETE":
                self.queries.append(query)
                del things[key]
            elif (of, action) == ("runs", "terminate"):
                if things[key].state not in _ALIVE:
                    raise Refused(400, f"Failed to terminate run {key}: it is not running")
                things[key].state = "CANCELING"
            elif of == "recurringruns" and action in ("enable", "disable"):
                things[key].mode, things[key].status = action.upper(), f"{action.upper()}D"
            else:
                raise Refused(404, f"{method} {action} is not of this API")
            return {}

    def create(self, of, thing):
        if not thing.display_name:
            raise Refused(400, "The name is empty. Please specify a valid name")
        if given := _SERVERS_OWN & {name for name in thing.openapi_types if getattr(thing, name) is not None}:
            raise Refused(400, f"{', '.join(sorted(given))} is the server's to say")
        if of == "experiments":
            if any(e.display_name == thing.display_name for e in self.experiments.values()):
                raise Refused(409, f"The experiment name {thing.display_name} already exists")
            self.check(thing.namespace)
        elif thing.experiment_id not in self.experiments:
            raise Refused(400, f"experiment {thing.experiment_id} not found")
        elif not ({"root", "pipeline_spec"} & set(thing.pipeline_spec or {})):
            raise Refused(400, "Failed to fetch the template: no pipeline spec")
        setattr(thing, _KEYS[of], f"{next(self.ids):08x}-0000-4000-8000-000000000000")
        thing.created_at = self.clock()
        if of == "runs":
            thing.state = "PENDING"
        if of == "recurringruns":
            if thing.trigger.cron_schedule and len(thing.trigger.cron_schedule.cron.split()) != 6:
                raise Refused(400, f"Expected 5 or 6 fields: {thing.trigger.cron_schedule.cron}")
            thing.status = f"{thing.mode}D"
        getattr(self, of)[getattr(thing, _KEYS[of])] = thing
        return thing

    def list(self, of, query):
        if unknown := set(query) - {"page_token", "page_size", "sort_by", "namespace", "filter", "experiment_id"}:
            raise Refused(400, f"unknown query {unknown}")
        self.check(query.get("namespace", ""))
        asked = query.get("filter", "{}").replace('"stringValue"', '"string_value"').replace('"operation": 1,', '"operation": "EQUALS",')  # either will do
        predicates = read(json.loads(asked), kfp_api.V2beta1Filter).predicates or []
        with self.lock:
            things = list(getattr(self, of).values())
        for predicate in predicates:
            assert predicate.operation == "EQUALS", "the stand-in knows no other"
            things = [t for t in things if getattr(t, predicate.key) == predicate.string_value]
        first, size = int(query.get("page_token") or 0), min(int(query.get("page_size") or 20), self.page)
        name = "recurring_runs" if of == "recurringruns" else of
        more = str(first + size) if first + size < len(things) else None
        return _LISTS[of](**{name: things[first:first + size] or None}, total_size=len(things), next_page_token=more)

    def check(self, namespace: str):
        if (namespace or "") != self.namespace:
            raise Refused(403, f"no rights in namespace {namespace!r}")

    def becomes(self, run_id: str, state: str, tasks: dict | None = None, error: str = ""):
        "How far a run is; each task brings its driver and executor, as on a cluster."
        run = self.runs[run_id]
        nodes = [("retraining-x7f2k", state), ("root-driver", "SUCCEEDED"), ("root", state)]
        for name, told in (tasks or {}).items():
            for one in told if isinstance(told, list) else [told]:
                nodes += [(f"{name}-driver", "SUCCEEDED"), (name, one), ("executor", one)]
        with self.lock:
            run.state = state
            run.error = kfp_api.GoogleRpcStatus(code=2, message=error) if error else None
            run.run_details = kfp_api.V2beta1RunDetails(task_details=[
                kfp_api.V2beta1PipelineTaskDetail(display_name=name, run_id=run_id, task_id=str(i), state=state) for i, (name, state) in enumerate(nodes)])

    def add_run(self, name: str, state: str = "RUNNING", older_s: float = 0) -> str:
        "A run that somebody else has made."
        with self.lock:
            experiment = next(iter(self.experiments), None) or self.create("experiments", kfp_api.V2beta1Experiment(display_name="predmaint", namespace=self.namespace)).experiment_id
            run = self.create("runs", kfp_api.V2beta1Run(display_name=name, experiment_id=experiment, pipeline_spec={"root": {}}))
            run.state, run.created_at = state, run.created_at - timedelta(seconds=older_s)
            return run.run_id

    def wait_asked(self, text: str, times: int = 1, timeout_s: float = 20):
        "Until it was asked this so many times."
        end = time.monotonic() + timeout_s
        while sum(text in a for a in self.asked) < times:
            assert time.monotonic() < end, f"never asked {text}: {self.asked}"
            time.sleep(0.01)
