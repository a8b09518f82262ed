"The stores of a site, each a part that can be killed and a place to look into past its sink."

import sqlite3
import time
from collections import Counter
from pathlib import Path

import servers
from warehouse_servers import BigQueryServer, PostgresServer, bigquery_environment, postgres_programs

from pdm.data.archive import Archive
from pdm.data.parquet import HEALTHY
from pdm.data.window import AssetPath
from pdm.process import find_program
from pdm.stream.journal import Event, Row
from pdm.stream.runner import DeadLetters

from .people import NUL
from .proxy import Proxy

LEVELS = ("enterprise", "site", "area", "line", "asset")


class Store:
    "What all of them have: a name, which is its sink's, and what that sink has refused."
    name = ""
    settings: dict[str, str]  # that lead a sink here

    def __init__(self, dead: DeadLetters):
        self._dead = dead

    def keys(self) -> Counter:
        "How often each window stands there, by (asset, stream, epoch, seq)."
        raise NotImplementedError

    def events(self) -> Counter:
        "The same of the events, by (asset, stream, episode, kind, t_ns)."
        raise NotImplementedError

    def refused(self) -> set[tuple]:
        "The keys of windows and events among the dead letters of its sink."
        return {(r.asset, r.stream, r.epoch, r.seq) if r.kind in ("verdict", "raw") else (r.asset, r.stream, r.episode, r.kind, r.t_ns)
                for r in self._dead.read(self.name)}

    def wants(self, record: Row | Event) -> bool:
        "Whether that belongs there."
        return True

    def refuses(self, record: Row | Event) -> bool:
        "Whether it may refuse that."
        return False


class Sqlite(Store):
    name = "sqlite"

    def __init__(self, dead: DeadLetters, path: Path):
        super().__init__(dead)
        self.path, self.settings = path, {"tsdb_url": "sqlite:"}

    def _ask(self, sql: str) -> Counter:
        if not self.path.exists():
            return Counter()
        db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=30)
        try:
            return Counter(db.execute(sql).fetchall())
        except sqlite3.OperationalError:  # its tables are not there yet
            return Counter()
        finally:
            db.close()

    def keys(self) -> Counter:
        return self._ask("SELECT asset, stream, epoch, seq FROM verdict")

    def events(self) -> Counter:
        return self._ask("SELECT asset, stream, episode, kind, t_ns FROM event")


class Archived(Store):
    "The archive of raw windows, a folder: of each window whose verdict it takes an interest in, once."
    name = "archive"

    def __init__(self, dead: DeadLetters, folder: Path):
        super().__init__(dead)
        self.settings = {"archive_url": f"file:{folder}"}
        self._archive = Archive(self.settings["archive_url"])

    def keys(self) -> Counter:
        return Counter((str(path), w.stream, w.epoch, w.seq) for path, w in self._archive.read())

    def events(self) -> Counter:
        return Counter()

    def wants(self, record: Row | Event) -> bool:
        if not isinstance(record, Row):
            return False
        why = self._archive.keep.why(AssetPath.parse(record.asset), record, record.episode is not None, record.p_value, "sensor_fault" not in record.flags)
        example = record.state == "running" and not {"late", "maintenance"} & set(record.flags)  # of health, as the judge takes it
        return why is not None and (why != HEALTHY or example)


class Server(Store):
    "A store that is a server, behind a link, and a part of the site."

    def __init__(self, dead: DeadLetters, folder: Path):
        super().__init__(dead)
        self.folder, self.started = folder, False

    def start(self) -> None:
        if self.started:
            self._restart()
        else:
            self._first_start()
        self.started = True

    def _first_start(self) -> None:
        raise NotImplementedError

    def _restart(self) -> None:
        self.server.start()

    def kill(self) -> None:
        self.server.kill()

    @property
    def alive(self) -> bool:
        return self.server.child.alive

    @property
    def pid(self) -> int:
        return self.server.child.pid

    def stop(self) -> None:
        if self.started:
            self.server.remove()

    @property
    def address(self) -> str:
        "Where the server listens, for the link to it."
        return f"127.0.0.1:{self.server.port}"

    def reached_by(self, link: Proxy) -> None:
        "Let the settings lead over that link."
        raise NotImplementedError


class Influx(Server):
    "It keeps points for so many days: an older one is refused."
    name, days = "influx", 5 * 365

    @staticmethod
    def missing() -> str:
        return "" if find_program("influxd") and find_program("nginx") else "apt-get install influxdb nginx-light"

    def _first_start(self) -> None:
        self.server = servers.Influx(self.folder, retention=f"{self.days}d")

    @property
    def alive(self) -> bool:
        return all(child.alive for child in self.server.children)

    @property
    def pid(self) -> int:
        return self.server.children[0].pid

    def stop(self) -> None:
        if self.started:
            self.server.close()

    def reached_by(self, link: Proxy) -> None:
        self.settings = {"tsdb_url": self.server.url.replace(self.address, link.address), "influx_token": self.server.token}

    def _ask(self, fields: str, measurement: str) -> list[tuple[dict, list]]:
        assets = [name for series in self.server.query(f"SHOW TAG VALUES FROM {measurement} WITH KEY = asset") for _, name in series["values"]]
        return [(series["tags"], point) for name in assets  # one after the other, since a query has its time
                for series in self.server.query(f"SELECT {fields} FROM {measurement} WHERE asset = '{name}' GROUP BY *") for point in series["values"]]

    def refuses(self, record: Row | Event) -> bool:
        return record.t_ns < time.time_ns() - self.days * 86_400 * 10**9

    def keys(self) -> Counter:
        return Counter((_asset(tags), tags["stream"], epoch, seq) for tags, (_, epoch, seq) in self._ask("epoch, seq", "health"))

    def events(self) -> Counter:
        return Counter((_asset(tags), tags.get("stream", ""), tags.get("episode", ""), tags["kind"], t) for tags, (t, _) in self._ask("seq", "event"))


def _asset(tags: dict) -> str:
    return "/".join(tags[level] for level in LEVELS)


class Postgres(Server):
    "It can't hold a text with a NUL in it."
    name = "postgres"

    @staticmethod
    def missing() -> str:
        return "" if postgres_programs() else "pip install 'predmaint[embedded]'"

    def _first_start(self) -> None:
        self.server = PostgresServer(next(iter(postgres_programs().values())), "-c", "fsync=off")  # a kill takes nothing that the kernel has

    def reached_by(self, link: Proxy) -> None:
        self.settings = {"warehouse_url": self.server.url("postgres").replace(self.address, link.address)}

    def _ask(self, sql: str) -> Counter:
        import psycopg

        with psycopg.connect(self.server.url("postgres")) as db:
            if not db.execute("SELECT FROM pg_tables WHERE schemaname = 'pdm'").fetchall():
                return Counter()
            return Counter(db.execute(sql).fetchall())

    def refuses(self, record: Row | Event) -> bool:
        return NUL in "".join(getattr(record, "conditions", {})) + "".join(map(str, getattr(record, "details", {}).values()))

    def keys(self) -> Counter:
        return self._ask("SELECT asset, stream, epoch, seq FROM pdm.verdict")

    def events(self) -> Counter:
        return self._ask("SELECT asset, stream, episode, kind, t_ns FROM pdm.event")


class BigQuery(Server):
    "The emulator, where its environment was made."
    name = "bigquery"

    @staticmethod
    def missing() -> str:
        return "" if bigquery_environment() else "make bigquery-env"

    def _first_start(self) -> None:
        self.server = BigQueryServer(bigquery_environment())

    def reached_by(self, link: Proxy) -> None:
        self.settings = {"warehouse_url": self.server.url("site").replace(self.address, link.address)}

    def keys(self) -> Counter:
        return Counter(self.server.ask("SELECT asset, stream, epoch, seq FROM site.verdict"))

    def events(self) -> Counter:
        return Counter(self.server.ask("SELECT asset, stream, episode, kind, t_ns FROM site.event"))
