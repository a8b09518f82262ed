"""What the loop asked for is carried out on what was released last: no calibration, and no model, is lost to another run."""

from datetime import UTC, datetime

import pytest
from graphs import rms_graph

from pdm.config import Settings
from pdm.data.archive import Archive
from pdm.data.scenario import parse
from pdm.data.spans import moment_ns
from pdm.data.training import gather
from pdm.errors import CheckFailed, InvalidInput, NotEnoughData
from pdm.loop.act import Actions, recalibrated, references_of
from pdm.loop.approved import gated
from pdm.loop.logbook import Logbook, Trigger
from pdm.loop.registry import Registry
from pdm.loop.release import release, releases_of
from pdm.model.bundle import excuse_of, load_bundle, records_of, write_bundle
from pdm.model.detector import Detector
from pdm.model.transport import gather as release_of
from pdm.model.transport import push

UNTIL = "2026-01-20"


class Hall:
    "Two pumps, both with a sensor that was glued on elsewhere on the same day."

    def __init__(self, home):
        plant = parse("""
            about: a day of maintenance
            duration: 10 d
            every: 45 min
            process: null
            vibration: {samples: 512}
            types: {pump: {rpm: 2950, seed: 38, machine: {gear_teeth: 0, noise_g: 0.15, strike_g: 1.8}}}
            assets: [{name: pump, type: pump, copies: 2, events: [{kind: remount, at: 5 d, by: 1.6}]}]
            """, "plant")
        self.archive_url, self.home = f"file:{home}/archive", home
        self.work = datetime.fromtimestamp(plant.start.timestamp() + 5 * 86_400, UTC).isoformat()
        with Archive(self.archive_url) as archive:
            for one in plant.stream():
                archive.add(one.path, one.window, "healthy")
        self.data = gather(self.archive_url, name="pump", until=self.work)
        self.pumps = self.data.assets
        self.model = Detector.fit(**self.data.fit_arguments(), kind="mahalanobis", name="pump")

    def site(self, home, **more):
        "Where nothing is released yet, and the digest of what judges there."
        settings = Settings(state_dir=home / "state", archive_url=self.archive_url, bundle_url=f"file:{home}/released", **{"release_url": "file:"} | more)
        bundle, _ = self.model.export(home / "installed", revision=1)
        references_of(self.model, self.data, release_of(bundle.path)[-1], "vibration")
        push(bundle.path, settings.bundle_url)
        return settings, bundle.digest

    def asked(self, pump, model, until=UNTIL, number=1):
        asset = self.pumps[pump]
        return Trigger(f"recalibrate-{pump}-{number}", 0, asset, "recalibrate", {
            "source": self.archive_url, "asset": asset, "stream": "vibration", "model": model, "since": self.work, "until": until, "why": f"{asset} was worked on",
            "spans": [f"{asset} {self.work} - sound"]})


@pytest.fixture(scope="module")
def hall(tmp_path_factory):
    return Hall(tmp_path_factory.mktemp("hall"))


def published(settings, digest):
    "Threshold by asset, as whoever fetches it gets it."
    folder = settings.bundle_url.removeprefix("file:")
    return {r.asset: r.threshold_db for r in records_of(load_bundle(f"{folder}/{digest}"))}


def released(settings):
    releases = releases_of(settings)
    found = [a.digest for a in releases.asked()]
    releases.close()
    return found


def test_what_the_gate_said_of_a_new_calibration_lies_beside_it_where_whoever_releases_it_can_read_it(hall, tmp_path):
    settings, old = hall.site(tmp_path)
    digest = Actions(settings).run(hall.asked(0, old))["digest"]
    said = gated(load_bundle(f"{settings.bundle_url.removeprefix('file:')}/{digest}"))
    assert said.digest == digest and {"promise", "calibration", "faults"} <= {c.name for c in said.criteria}


@pytest.mark.parametrize("until", [UNTIL, "2026-01-21"], ids=["in one look", "while the first is in shadow"])
def test_two_machines_that_were_worked_on_both_keep_their_new_calibration(hall, tmp_path, until):
    settings, old = hall.site(tmp_path)
    (one, two), before = hall.pumps, published(settings, old)
    first = Actions(settings).run(hall.asked(0, old))["digest"]
    came = published(settings, first)
    second = Actions(settings).run(hall.asked(1, old, until))["digest"]
    assert published(settings, first) == came and came[one] != before[one] and came[two] == before[two], "what was published stays as it is"
    both = published(settings, second)
    assert both[one] == came[one] and both[two] != before[two]
    folder = tmp_path / "released"
    assert load_bundle(folder / second).contract.revision > load_bundle(folder / first).contract.revision
    assert released(settings) == [first, second] and settings.desired_file.read_text().split() == [second]
    assert excuse_of(folder, second).champion == old and set(excuse_of(folder, second).streams) == {f"{one}/vibration", f"{two}/vibration"}
    assert len(list((folder / f"{second}.calibration").glob("*.reference.npz"))) == 2


def test_a_machine_is_not_calibrated_for_a_graph_that_another_one_replaces(hall, tmp_path):
    settings, old = hall.site(tmp_path)
    contract = hall.model.contract
    bundle = write_bundle(tmp_path / "trained", rms_graph(len(contract.channels), contract.samples, 1.0, 0), contract.model_copy(update={"revision": 2, "embedding": 1, "conditions": ()}))
    release(settings, "pump", bundle.digest, bundle.path)
    with pytest.raises(InvalidInput, match="another graph") as e:
        Actions(settings).run(hall.asked(0, old))
    assert e.value.exit_code == 1 and released(settings) == [bundle.digest]


def test_what_a_ring_has_refused_is_no_ground_to_build_on(hall, tmp_path):
    settings, old = hall.site(tmp_path)
    first = Actions(settings).run(hall.asked(0, old))["digest"]
    releases = releases_of(settings)
    releases.note(releases.newest(), "here", "refused", "it was in alarm")
    releases.close()
    second = Actions(settings).run(hall.asked(1, old, "2026-01-21"))
    before = published(settings, old)
    after = published(settings, second["digest"])
    assert (second["before"], after[hall.pumps[0]]) == (old, before[hall.pumps[0]]) and after[hall.pumps[1]] != before[hall.pumps[1]] and first != second["digest"]


def test_what_was_put_to_work_by_hand_since_the_last_release_is_what_is_calibrated(hall, tmp_path):
    settings, old = hall.site(tmp_path)
    Actions(settings).run(hall.asked(0, old))
    by_hand, _ = hall.model.export(tmp_path / "by-hand", revision=2 * 10**9)
    push(by_hand.path, settings.bundle_url)
    assert Actions(settings).run(hall.asked(1, by_hand.digest))["before"] == by_hand.digest


def test_a_calibration_that_was_asked_for_again_after_a_kill_is_the_same_release(hall, tmp_path):
    settings, old = hall.site(tmp_path)
    first, again = (Actions(settings).run(hall.asked(0, old)) for _ in range(2))
    assert first == again and released(settings) == [first["digest"]]


def test_where_nobody_is_told_no_published_calibration_is_overwritten(hall, tmp_path):
    settings, old = hall.site(tmp_path, release_url="")
    first = Actions(settings).run(hall.asked(0, old))["digest"]
    came = published(settings, first)
    with pytest.raises(InvalidInput, match="published already") as e:
        Actions(settings).run(hall.asked(1, old))
    assert e.value.exit_code == 1 and published(settings, first) == came


@pytest.mark.parametrize(("since", "until", "learnt"), [("2026-01-08", None, True), ("2026-01-11", "2026-01-12", True), (UNTIL, None, False), ("2025-12-01", "2026-01-01", False)])
def test_what_is_held_back_while_it_runs_is_not_released(hall, tmp_path, monkeypatch, since, until, learnt):
    settings, old = hall.site(tmp_path)

    def meanwhile(*given):
        with Logbook(settings.logbook_file) as book:
            book.hold(hall.pumps[0], moment_ns(since), until and moment_ns(until), "its bearing is worn", "mia", moment_ns(UNTIL))
        return recalibrated(*given)

    monkeypatch.setattr("pdm.loop.act.recalibrated", meanwhile)
    if learnt:
        with pytest.raises(CheckFailed, match=f"held back by now.*{hall.pumps[0]}"):
            Actions(settings).run(hall.asked(0, old))
    else:
        Actions(settings).run(hall.asked(0, old))
    assert len(released(settings)) == 1 - learnt
    assert Actions(settings).run(hall.asked(1, old))["exit_code"] == 0  # it says nothing of another machine


@pytest.mark.parametrize("told", [False, True], ids=["while it ran", "before it began"])
def test_a_new_model_is_released_unless_what_it_learnt_is_held_back_since(hall, tmp_path, monkeypatch, told):
    settings, old = hall.site(tmp_path, tracking_url="sqlite:", release_url="", pipeline_root=f"file:{tmp_path / 'runs'}")
    registry, bundle = Registry.of(settings), load_bundle(f"{settings.bundle_url.removeprefix('file:')}/{old}")
    other, _ = hall.model.export(tmp_path / "other", revision=2)
    for path in (bundle.path, other.path):
        registry.register(path)
        registry.promote("pump", who="ann", why="it passed")
    with Logbook(settings.logbook_file) as book:
        book.hold(hall.pumps[0], moment_ns(hall.work), None, "its bearing is worn", "mia", moment_ns(UNTIL))
        spans = [str(s) for s in book.spans()] if told else []
    ended = {"exit_code": 0, "reason": "", "shards": {"pump": {"status": "champion", "digest": other.digest, "spans": spans}}}
    monkeypatch.setattr("pdm.loop.act.run_local", lambda *_: ended)
    asked = Trigger("retrain-1", 0, "pump", "retrain", {"name": "pump", "since": hall.work, "until": UNTIL, "assets": [], "spans": []})
    for _ in range(2):  # the second time, after a kill, another one is the champion, and stays it
        assert Actions(settings).run(asked)["exit_code"] == (0 if told else 3)
        assert registry.champion("pump").digest == (other.digest if told else old)


def test_a_fault_that_was_dated_back_while_a_run_waited_is_not_learnt(hall, tmp_path):
    settings, old = hall.site(tmp_path)
    waits = hall.asked(0, old)
    with Logbook(settings.logbook_file) as book:
        book.hold(hall.pumps[0], moment_ns(hall.work), None, "the bearing was mounted askew", "mia", moment_ns(UNTIL))
    with pytest.raises(NotEnoughData):
        Actions(settings).run(waits)
    assert released(settings) == []
