"What `predmaint bundle fetch` does on a new node when the release is late, incomplete, or an earlier call was killed."

import fcntl
import shutil
import sys
from pathlib import Path

import pytest
from servers import wait_for
from typer.testing import CliRunner

from pdm.bundle_cli import bundle as app
from pdm.errors import InvalidBundle, InvalidConfig
from pdm.model.bundle import CalibrationRecord
from pdm.process import Child

FAN = "acme/lyon/hall-2/line-1/fan-1"


class Node:
    "A node with asset records, and the place that bundles come from, which has nothing so far."

    def __init__(self, folder: Path, bundle):
        self.place, self.folder, self.digest, self._from = folder / "place", folder / "node", bundle.digest, bundle.path
        self.place.mkdir()
        self.folder.mkdir()
        record = CalibrationRecord(asset=FAN, model=bundle.digest, hop_s=10, scores_db=(0.0, 1.0), centre_db=0.0, threshold_db=1.0, confirmations=3,
                                   spacing_s=10, exceedance=0.047, false_alarms_per_day=1, supported=True, quiet_s=60, gap_s=60)
        self._record = record.to_json()
        self.env = {"PREDMAINT_ASSETS": f"{folder}/assets.yaml", "PREDMAINT_BUNDLE_URL": f"file:{self.place}", "PREDMAINT_UNSIGNED_BUNDLES": "true"}
        self.bundle = self.folder / bundle.digest
        self.log = folder / "fetch.log"
        self.name("fan-1")

    def name(self, calibration: str):
        "Have the asset records name this calibration."
        self.folder.with_name("assets.yaml").write_text(
            f"assets:\n- path: {FAN}\n  streams: {{vibration: {{bundle: node/{self.digest}, calibration: node/{self.digest}.calibration/{calibration}.json}}}}\n")

    def publish(self, damaged: bool = False):
        records = self.place / f"{self.digest}.calibration"
        records.mkdir(exist_ok=True)
        (records / "fan-1.json").write_text(self._record)
        shutil.copytree(self._from, self.place / self.digest, dirs_exist_ok=True)
        if damaged:
            (self.place / self.digest / "model.onnx").write_bytes(b"half of it")

    def fetch(self):
        done = CliRunner().invoke(app, ["fetch"], env=self.env)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout

    def waiting(self) -> Child:
        "The command as a process, that waits for as long as a test lasts."
        code = "from pdm.bundle_cli import bundle; bundle(['fetch', '--wait', '100'])"
        return Child([sys.executable, "-c", code], self.log, self.env)

    @property
    def left(self) -> list[Path]:
        return list(self.folder.glob(".unproven-*"))


@pytest.fixture
def node(tmp_path, make_bundle):
    return Node(tmp_path, make_bundle())


@pytest.mark.parametrize("damaged,why", [(None, "has no bundle"), (True, "is being published right now")], ids=["not published", "half published"])
def test_what_is_published_late_is_waited_for_and_that_is_said_once(node, damaged, why):
    if damaged:
        node.publish(damaged=True)
    with pytest.raises(InvalidBundle, match=why):
        node.fetch()
    with node.waiting() as child:
        wait_for(lambda: "waiting, 100 s at most" in node.log.read_text())
        node.publish()
        assert child.process.wait(60) == 0
    assert node.log.read_text().count("waiting") == 1 and node.bundle.is_dir() and not node.left


def test_a_calibration_that_was_never_released_is_named_and_what_is_here_stays_untouched(node):
    node.publish()
    node.fetch()
    node.name("fan-2")
    before = {p: p.stat().st_ino for p in node.folder.rglob("*.*") if p.is_file()}
    for _ in range(2):
        with pytest.raises(InvalidConfig, match=r"names a calibration of bundle .* that was not released with it: there is fan-1.json"):
            node.fetch()
    assert {p: p.stat().st_ino for p in node.folder.rglob("*.*") if p.is_file()} == before


def test_a_calibration_that_is_released_later_is_brought(node):
    node.publish()
    node.fetch()
    node.name("fan-2")
    shutil.copy(node.place / f"{node.digest}.calibration/fan-1.json", node.place / f"{node.digest}.calibration/fan-2.json")
    assert "is here" in node.fetch()
    assert (node.folder / f"{node.digest}.calibration/fan-2.json").is_file()


@pytest.mark.parametrize("whole", [False, True], ids=["before it was whole", "at its very end"])
def test_what_a_killed_fetch_has_left_aside_is_cleared_away_by_the_next(node, whole):
    node.publish()
    if whole:
        node.fetch()
    shutil.copytree(node.place, node.folder / ".unproven-killed")
    node.fetch()
    assert not node.left and node.bundle.is_dir()


def test_what_another_fetch_has_under_way_is_left_alone(node):
    node.publish()
    (node.folder / ".unproven-theirs").mkdir()
    with (node.folder / ".bringing").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with node.waiting() as child:
            wait_for(lambda: str(node.folder / ".bringing") in opened(child.pid))
            assert node.left and not node.bundle.exists()
            fcntl.flock(theirs, fcntl.LOCK_UN)
            assert child.process.wait(60) == 0
    assert not node.left and node.bundle.is_dir()


def opened(pid: int) -> list[str]:
    "The files that a process has open."
    return [str(p.readlink()) for p in Path(f"/proc/{pid}/fd").iterdir() if p.is_symlink()]
