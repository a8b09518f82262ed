"What a look at a plant sees of its past."

import numpy as np
import pytest

from pdm.config import Settings
from pdm.data.archive import Archive
from pdm.data.window import AssetPath, Window
from pdm.loop.controller import Controller
from pdm.loop.drift import Reference
from pdm.loop.logbook import Logbook
from pdm.loop.lookout import Lookout
from pdm.loop.observed import Observed
from pdm.loop.policy import parse_policy
from pdm.stream.records import Event

ASSET, HOUR = "acme/munich/hall-2/line-1/pump-1", 3600 * 10**9
DAY = 24 * HOUR


def quiet(days: float, model_since_ns: int, events: tuple[Event, ...]) -> Observed:
    t_ns = np.arange(HOUR, round(days * DAY), HOUR, dtype=np.int64)
    n, no = len(t_ns), np.zeros(len(t_ns), bool)
    return Observed(ASSET, "vibration", "d" * 64, 3600.0, t_ns, np.full(n, 0.5), np.ones(n), np.full(n, 0.5), no, np.full(n, "running"), no, no, no,
                    np.zeros((n, 2), np.float32), {}, {}, events, model_since_ns)  # fmt: skip


def test_work_that_is_entered_late_ends_what_is_held_though_another_model_judges_since(tmp_path):
    said = [Event(ASSET, "vibration", "e1", "raised", 7 * DAY, 0, 1, {})]
    settings, policy = Settings(state_dir=tmp_path, assets=tmp_path / "none.yaml"), parse_policy("")
    with Logbook(settings.logbook_file) as book:
        held = book.hold(ASSET, 7 * DAY, None, "it looks like a fault", "loop", 7 * DAY, "fault")

        def read(settings, since_ns, until_ns):
            return [quiet(10, 9 * DAY, tuple(said)).between(since_ns, until_ns)]

        loop = Controller(settings, policy, book, lambda trigger: {"exit_code": 0}, Lookout(settings, policy, read).at)
        first = loop.step(10 * DAY)
        assert {h.id: h.state for h in book.held()} == {held.id: "open"} and first.seen[0].observed.t_ns[0] == 9 * DAY, "the new model's windows alone are judged"
        said.append(Event(ASSET, "", "", "maintenance", 8 * DAY, 0, -1, {"what": "bearing replaced", "by": "igor"}))
        loop.step(10 * DAY + HOUR)
        now = {h.id: h for h in book.held()}[held.id]
        assert (now.state, now.until_ns, now.turned_by) == ("kept", 8 * DAY, "igor")


@pytest.mark.parametrize("worked, news", [(True, False), (False, True)], ids=["people came", "nobody came"])
def test_raw_windows_from_before_people_came_say_what_the_shaft_did_then(tmp_path, worked, news):
    settings, path = Settings(state_dir=tmp_path, archive_url=f"file:{tmp_path}/archive"), AssetPath.parse(ASSET)
    rng, t = np.random.default_rng(2), np.arange(2560) / 25_600
    with Archive(settings.archive_url) as archive:
        for seq, t_ns in enumerate(range(HOUR, 12 * DAY, HOUR)):
            shakes = 0.02 if t_ns < 8 * DAY else 0.2  # twice a turn; people come on the tenth day
            x = 0.05 * rng.standard_normal(2560) + shakes * np.cos(4 * np.pi * 25 * t)
            archive.add(path, Window("vibration", 1, seq, 0, t_ns, 25_600.0, ("h",), ("g",), x[None].astype(np.float32), {"speed_rpm": 1500.0}), "healthy")
    o = quiet(12, 0, (Event(ASSET, "", "", "maintenance", 10 * DAY + HOUR // 2, 0, -1, {"what": "remounted"}),) if worked else ())
    found = Lookout(settings, parse_policy(""))._looked(o, Reference.of(o.between(None, 7 * DAY)), 12 * DAY, None)
    assert found.windows == 24 and found.shaft_db[0][1] > 4 and (not found.work_db or found.work_db[0][1] > 4) == news, found
