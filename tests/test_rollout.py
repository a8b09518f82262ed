"""From a digest in a file to verdicts of another model: nothing is lost on the way, nothing is judged half, and what is not fit comes back."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import rms_graph
from servers import wait_for
from small_site import RATE_HZ, SAMPLES, Hand, Site, key_of, message, path_of, window

from pdm.config import load_assets
from pdm.data.window import decode_ack
from pdm.errors import InvalidConfig, PartMissing
from pdm.model.bundle import EXCUSED, Contract, Excuse, write_bundle
from pdm.model.signature import Trust, sign, verify
from pdm.process import Child
from pdm.rollout_cli import with_line
from pdm.serve.engine import Engine, InProcess
from pdm.serve.triton import TritonEngine
from pdm.signal.diagnose import diagnose
from pdm.stream.agent import Agent
from pdm.stream.alarms import Command
from pdm.stream.journal import Journal
from pdm.stream.judge import Judge
from pdm.stream.rollout import STATES, Rollout, Wanted, status
from pdm.stream.shadow import Shadow
from pdm.stream.updater import Updater
from pdm.stream.updater import running as updater_running
from pdm.stream.versions import Follower, Models, installed, versions_of

pytestmark = pytest.mark.timeout(180)


class Line:
    "A site with two fans, an agent whose bus is in the test's hand, and releases for them. The score of a window is its RMS times the bundle's gain."

    def __init__(self, folder: Path, make_bundle):
        self.site = Site(folder, make_bundle(samples=SAMPLES, rate_hz=RATE_HZ))
        self.settings = self.site.settings("embedded:", unsigned_bundles=True, shadow_windows=40, rollout_free_mb=1)
        self.bundles, self.file = self.settings.state_dir / "bundles", self.settings.state_dir / "rollout.db"
        self.records = load_assets(self.settings.assets)
        self.gains = {self.site.bundle.digest: 1.0}
        self.sent = 0
        self.examples = np.stack([window(n).samples for n in range(20)])
        self.settings.state_dir.mkdir(parents=True, exist_ok=True)
        self.rollout = Rollout(self.file)

    def release(self, gain: float = 1.0, graph: bytes | None = None, calibrated: bool = True, **contract) -> str:
        "A bundle for the fans, among the bundles of this node."
        fields = {**self.site.bundle.contract.model_dump(), "revision": len(self.gains), **contract}
        bundle = write_bundle(self.bundles, graph or rms_graph(2, SAMPLES, gain, 0), Contract(**fields), self.examples[..., :fields["samples"]])
        beside = bundle.path.with_name(f"{bundle.digest}.calibration")
        if calibrated:
            beside.mkdir(exist_ok=True)
            (beside / "calibration.json").write_text(self.site.record.model_copy(update={"model": bundle.digest, "supported": False}).to_json())
            for i in range(2):
                record = self.site.record.model_copy(update={"model": bundle.digest, "asset": path_of(i)})
                (beside / f"{path_of(i).replace('/', '.')}.calibration.json").write_text(record.to_json())
        self.gains[bundle.digest] = gain
        return bundle.digest

    def want(self, *lines: str) -> None:
        self.settings.desired_file.write_text("\n".join(lines))

    def start(self, engine: Engine | None = None) -> None:
        self.bus, self.journal = Hand(), Journal(self.site.journal_file)
        self.engine = engine or InProcess()
        self.models = Models(self.engine)
        self.follower = Follower(self.file, self.records, self.models, self.bundles, compared=lambda *told: self.agent.metrics.compared(*told))
        self.agent = Agent(self.bus, self.journal, self.follower.own(self.journal), diagnose, batch=8)
        self.agent.start()
        self.follower.start(self.agent)

    def stop(self) -> None:
        self.agent.stop(2.0)
        self.follower.stop()
        self.engine.close()
        self.models.close()
        self.journal.close()

    def served(self) -> list[str]:
        "The digests in the repository of the agent's Triton."
        return sorted(f.read_text().split()[1] for f in self.engine.server.repository.glob("*/*/digest"))

    def send(self, windows: int, level: float = 1.0) -> None:
        "So many windows of each fan, and wait until they are acknowledged."
        for _ in range(windows):
            self.bus.unread.append([message(window(self.sent, level=level), i) for i in range(2)])
            self.sent += 1
        wait_for(lambda: self.acked() == [self.sent - 1] * 2)

    def acked(self) -> list[int]:
        acks = {t: decode_ack(p)[1] for t, p in self.bus.told if t.endswith("/ack")}
        return list(acks.values())

    def until(self, true, level: float = 1.0):
        "Send windows until something holds."
        end = time.monotonic() + 60
        while not (found := true()):
            assert time.monotonic() < end, f"waited in vain: {self.rollout.candidates()}"
            self.send(4, level)
        return found

    def follow(self, digest: str, state: str, name: str = "motor") -> None:
        "What an updater would do, up to a state."
        self.rollout.want((Wanted(digest),))
        for s in STATES[1:STATES.index(state) + 1]:
            self.rollout.move(digest, s, **({"name": name} if s == "verified" else {}))

    def verdicts(self) -> list:
        with self.site.reader() as reader:
            return [r for i in range(2) for r in reader.verdicts(*key_of(i))]

    def check_every_verdict(self) -> set[str]:
        "Each window has one verdict, and it is what the bundle that is named in it says. Which bundles those are."
        rows = self.verdicts()
        assert sorted((r.asset, r.seq) for r in rows) == sorted((path_of(i), n) for i in range(2) for n in range(self.sent))
        for r in rows:
            x = window(r.seq, level=self.level(r.seq)).samples.astype(np.float64)
            assert r.score == pytest.approx(self.gains[r.model] * np.sqrt((x**2).mean(axis=1)).mean(), rel=1e-4), (r.seq, r.model[:8])
        return {r.model for r in rows}

    def level(self, seq: int) -> float:
        return 1.0


@pytest.fixture
def line(make_bundle, tmp_path):
    made = Line(tmp_path / "site", make_bundle)
    made.start()
    yield made
    made.stop()
    made.rollout.close()


def test_a_promoted_challenger_takes_over_warm_and_each_verdict_is_of_the_version_it_names(line):
    line.level = lambda seq: 4.0  # in alarm
    new = line.release(1.2)
    line.follow(new, "shadow")
    line.until(lambda: (c := line.rollout.compared(new)) and c.windows >= 40, level=4.0)
    line.rollout.move(new, "promoted", "as the test says")
    line.until(lambda: line.rollout.observed()["motor"][0] == new, level=4.0)
    line.send(20, level=4.0)
    assert line.check_every_verdict() == {line.site.bundle.digest, new}
    assert all(r.alarm for r in line.verdicts() if r.model == new)  # a monitor that begins anew would have to see three windows first
    with line.site.reader() as reader:
        assert [e.kind for e in reader.events(path_of(0)) if e.kind in ("raised", "cleared")] == ["raised"]
    assert line.rollout.beside() == {"motor": ""} and line.agent.shadows["motor"].versions[key_of(0)].digest == line.site.bundle.digest
    states = {key: s for key, (_, s) in line.rollout.states("").items()}
    assert states[key_of(0)]["t"] is not None


def test_twenty_exchanges_under_load_lose_no_window_and_mix_no_versions(line):
    digests = [line.release(1.0 + 0.05 * n) for n in range(3)]
    going, stop = [], threading.Event()

    def load():
        while not stop.is_set():
            if line.bus.unread:
                time.sleep(0.001)
                continue
            line.bus.unread.append([message(window(line.sent), i) for i in range(2)])
            line.sent += 1
            going.append(line.sent)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for n in range(20):
            digest = digests[n % 3]
            line.follow(digest, "promoted") if n < 3 else line.rollout._run("motor", digest, None, n)
            wait_for(lambda digest=digest: line.rollout.observed().get("motor", ("",))[0] == digest)
    finally:
        stop.set()
        thread.join()
    wait_for(lambda: line.acked() == [line.sent - 1] * 2)
    assert line.check_every_verdict() >= set(digests)


def test_a_rollback_gives_the_former_version_its_own_warm_monitors_back(line):
    new = line.release(1.1)
    line.send(30)
    line.follow(new, "promoted")
    line.until(lambda: line.rollout.observed().get("motor", ("",))[0] == new)
    line.until(lambda: (c := line.rollout.compared(new)) and c.windows >= 10)
    line.rollout.move(new, "rolled_back", "as the test says")
    line.until(lambda: line.rollout.observed()["motor"][0] == "")
    line.send(5)
    assert line.check_every_verdict() == {line.site.bundle.digest, new}
    assert not line.agent.shadows
    with line.site.reader() as reader:
        calibration, state = reader.states()[key_of(0)]
    assert calibration == line.site.record.digest
    assert state["t"] == window(line.sent - 1).t_ns  # it saw the windows that the other one judged, too


def test_an_agent_that_was_killed_before_the_exchange_begins_with_what_was_promoted_and_its_warm_monitors(line):
    new = line.release(1.1)
    line.follow(new, "shadow")
    line.until(lambda: line.rollout.states(new))
    line.stop()
    line.rollout.move(new, "promoted", "while no agent was there")
    line.start()
    line.send(5)
    assert {r.model for r in line.verdicts()[-3:]} == {new}
    o = line.agent._judge.owned[key_of(0)]
    assert o.version.digest == new and o.version.monitor.to_state()["t"] == window(line.sent - 1).t_ns


def test_a_release_that_is_damaged_after_it_was_promoted_leaves_what_is_installed_at_work(line):
    new = line.release(1.1)
    line.follow(new, "promoted")
    line.until(lambda: line.rollout.observed().get("motor", ("",))[0] == new)
    line.stop()
    (line.bundles / new / "model.onnx").write_bytes(b"not a graph")
    line.start()
    line.send(5)
    assert line.verdicts()[-1].model == line.site.bundle.digest
    wait_for(lambda: (c := line.rollout.compared(new)) and "was changed" in c.failed)  # and the updater is told why


def updater_of(line, **changes) -> Updater:
    return Updater(line.settings.model_copy(update=changes), line.rollout, line.records, InProcess())


def environment(line, **settings: object) -> dict[str, str]:
    "Of an updater that is a process of its own."
    known = {"STATE_DIR": line.settings.state_dir, "ASSETS": line.settings.assets, "UNSIGNED_BUNDLES": "true", **settings}
    return {**os.environ, **{f"PREDMAINT_{k}": str(v) for k, v in known.items()}}


def run(line, updater, digest, state, level=1.0):
    "Step and send until the candidate is in a state."

    def there():
        updater.step()
        return (c := line.rollout.candidate(digest)) is not None and c.state == state

    line.until(there, level)
    return line.rollout.candidate(digest)


def test_a_sound_challenger_goes_the_whole_way_by_itself(line):
    new = line.release(1.05)
    line.want(new)
    updater = updater_of(line, probation_minutes=0.02)
    run(line, updater, new, "promoted")
    line.until(lambda: updater.step() or line.rollout.candidate(new).settled)
    assert [s.after for s in line.rollout.audit(new)] == [*STATES[1:7], "promoted"]
    assert all(s.reason for s in line.rollout.audit(new))
    assert line.check_every_verdict() == {line.site.bundle.digest, new}
    shown = status(line.rollout, (Wanted(new),))
    assert shown["running"]["motor"]["digest"] == new == shown["running"]["motor"]["in_agent"] and shown["reason"] == ""
    wait_for(lambda: not line.agent.shadows)  # the former champion is let go


def edited(change) -> bytes:
    "The graph of the fans, changed."
    model = onnx.load_from_string(rms_graph(2, SAMPLES, 1.0, 0))
    change(model.graph, onnx.helper.make_node)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def nan_above(level: float) -> bytes:
    "A graph whose score is not a number where the signal is louder: 0 times infinity."

    def change(graph, node):
        for n in graph.node:
            n.input[:] = ["hurt_gain" if i == "gain" else i for i in n.input]
        graph.initializer.extend([onnx.helper.make_tensor("level", onnx.TensorProto.FLOAT, [], [level]),
                                  onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0])])
        for n in reversed([node("ReduceMax", ["window"], ["largest"], keepdims=0), node("Greater", ["largest", "level"], ["loud"]),
                           node("Cast", ["loud"], ["one_or_none"], to=onnx.TensorProto.FLOAT), node("Div", ["one_or_none", "zero"], ["infinite_or_nan"]),
                           node("Where", ["loud", "infinite_or_nan", "gain"], ["infinite_gain"]), node("Mul", ["infinite_gain", "zero"], ["nan_or_none"]),
                           node("Add", ["gain", "nan_or_none"], ["hurt_gain"])]):
            graph.node.insert(0, n)

    return edited(change)


def slow(rounds: int) -> bytes:
    "A graph that counts before it scores."

    def change(graph, node):
        helper, proto = onnx.helper, onnx.TensorProto
        body = helper.make_graph([node("Add", ["n", "step"], ["n_out"]), node("Identity", ["go"], ["go_out"])], "count",
                                 [helper.make_tensor_value_info("i", proto.INT64, []), helper.make_tensor_value_info("go", proto.BOOL, []),
                                  helper.make_tensor_value_info("n", proto.FLOAT, [])],
                                 [helper.make_tensor_value_info("go_out", proto.BOOL, []), helper.make_tensor_value_info("n_out", proto.FLOAT, [])],
                                 [helper.make_tensor("step", proto.FLOAT, [], [1.0])])
        for n in graph.node:
            n.input[:] = ["late_gain" if i == "gain" else i for i in n.input]
        graph.initializer.extend([helper.make_tensor("rounds", proto.INT64, [], [rounds]), helper.make_tensor("yes", proto.BOOL, [], [True]),
                                  helper.make_tensor("nothing", proto.FLOAT, [], [0.0])])
        for n in reversed([node("Loop", ["rounds", "yes", "nothing"], ["counted"], body=body), node("Mul", ["counted", "nothing"], ["none"]),
                           node("Add", ["gain", "none"], ["late_gain"])]):
            graph.node.insert(0, n)

    return edited(change)


@pytest.mark.parametrize("kind, cause, level", [("always in alarm", "agreement", 1.05), ("noisy", "agreement", 1.05), ("not a number", "errors", 1.6),
                                                ("slow", "latency", 1.05)])
def test_a_challenger_that_is_not_fit_is_rolled_back_in_its_shadow_and_says_why(line, kind, cause, level):
    bad = {"always in alarm": lambda: line.release(9.0), "noisy": lambda: line.release(1.9),
           "not a number": lambda: line.release(graph=nan_above(4.3)),  # louder than the canary
           "slow": lambda: line.release(graph=slow(40_000))}[kind]()
    line.want(bad)
    updater = updater_of(line)
    c = run(line, updater, bad, "rolled_back", level)
    last = line.rollout.audit(bad)[-1]
    assert (last.before, last.details["cause"]) == ("shadow", cause), last
    line.level = lambda seq: level
    assert line.check_every_verdict() == {line.site.bundle.digest}
    updater.step()
    assert line.rollout.candidate(bad) == c  # and it is not tried again
    wait_for(lambda: not line.agent.shadows)


def test_an_alarm_rate_that_jumps_after_promotion_brings_the_former_version_back(line):
    bad = line.release(9.0)
    line.follow(bad, "promoted")
    line.want(bad)
    updater = updater_of(line)
    run(line, updater, bad, "rolled_back")
    line.until(lambda: line.rollout.observed()["motor"][0] == "")
    line.send(3)
    assert line.verdicts()[-1].model == line.site.bundle.digest
    assert line.rollout.audit(bad)[-1].details["cause"] in ("agreement", "alarms")


def test_a_challenger_that_is_blind_to_a_fault_that_is_there_is_not_promoted(line):
    line.send(20, level=4.0)
    assert line.verdicts()[-1].alarm
    blind = line.release(0.2)
    line.want(blind)
    c = run(line, updater_of(line), blind, "rolled_back", level=4.0)
    assert "the versions agree on" in c.reason or "does not say so" in c.reason


_KILLED = textwrap.dedent("""
    import os, signal, sys
    from pdm.config import load_assets, load_settings
    from pdm.serve.engine import InProcess
    from pdm.stream.rollout import Rollout
    from pdm.stream.updater import Updater
    settings, before = load_settings(), sys.argv[1] == "before"
    class Dies(Rollout):
        def move(self, digest, after, *args, **changes):
            if before and after == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)
            super().move(digest, after, *args, **changes)
            if after == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.candidate(digest)
    rollout = Dies(settings.state_dir / "rollout.db")
    updater = Updater(settings, rollout, load_assets(settings.assets), InProcess())
    while True:
        updater.step()
""")


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_updater_that_is_killed_at_each_transition_goes_on_where_it_was(line, when, tmp_path):
    new = line.release(1.05)
    line.want(new)
    env = environment(line, SHADOW_WINDOWS=40, ROLLOUT_FREE_MB=1)
    line.send(2)
    way = STATES[1:7]
    for before, after in zip(("wanted", *way), way, strict=False):
        with Child([sys.executable, "-c", _KILLED, when, after], tmp_path / "updater.log", env=env) as updater:
            line.until(lambda updater=updater: not updater.alive)
            assert updater.process.returncode == -signal.SIGKILL
        assert line.rollout.candidate(new).state == (before if when == "before" else after)
    run(line, updater_of(line), new, "promoted")
    line.until(lambda: line.rollout.observed()["motor"][0] == new)
    line.send(3)
    assert tuple(s.after for s in line.rollout.audit(new)) == way  # each once
    assert line.check_every_verdict() == {line.site.bundle.digest, new}


def test_two_updaters_of_one_node_exclude_each_other(line):
    settings = line.settings.model_copy(update={"updater_metrics_port": 0})
    with updater_running(settings) as failed:
        with pytest.raises(InvalidConfig, match="another updater works on"), updater_running(settings):
            pass
        failed()


def test_the_updaters_page_says_what_is_desired_what_is_running_and_why(line):
    from urllib.request import urlopen

    from pdm.process import free_port

    line.want("ab" * 32)
    port = free_port()
    with updater_running(line.settings.model_copy(update={"updater_metrics_port": port})):
        shown = wait_for(lambda: json.load(urlopen(f"http://127.0.0.1:{port}/rollout", timeout=5)))
        assert shown["desired"] == ["ab" * 32] and "predmaint triton deploy" in wait_for(
            lambda: json.load(urlopen(f"http://127.0.0.1:{port}/rollout", timeout=5))["reason"])
        assert 'pdm_rollout_candidate{digest="abababababab",name="",state="wanted"} 1.0' in urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()


def test_a_bundle_without_a_calibration_or_one_that_would_lose_a_promise_never_comes_to_judge(line):
    updater = updater_of(line)
    for digest, reason in ((line.release(1.3, calibrated=False), "has no calibration"),):
        line.want(digest)
        updater.step()
        c = run(line, updater, digest, "rolled_back")
        assert reason in c.reason
    lent = line.release(1.4)
    for i in range(2):
        (line.bundles / f"{lent}.calibration" / f"{path_of(i).replace('/', '.')}.calibration.json").unlink()
    line.want(lent)
    assert "would lose its promise" in run(line, updater, lent, "rolled_back").reason
    assert line.check_every_verdict() == {line.site.bundle.digest}


# bundles that are no good, and disks that are full


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    "Private and public keys of two people, by name."
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in ("release", "stranger"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / name).write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return folder


def signed(line, digest: str, key: Path) -> str:
    for folder in (digest, f"{digest}.calibration"):
        sign(line.bundles / folder, key)
    return digest


def unsigned(line, keys):
    return line.release(1.3)


def by_a_stranger(line, keys):
    return signed(line, line.release(1.31), keys / "stranger")


def with_a_changed_byte(line, keys):
    digest = signed(line, line.release(1.32), keys / "release")
    file = line.bundles / digest / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    return digest


def with_a_file_too_many(line, keys):
    digest = signed(line, line.release(1.33), keys / "release")
    (line.bundles / digest / "run_me.py").write_text("print('hello')")
    return digest


def with_a_calibration_slipped_in(line, keys):
    digest = signed(line, line.release(1.34), keys / "release")
    file = line.bundles / f"{digest}.calibration" / "calibration.json"
    file.write_text(file.read_text().replace('"threshold_db":6.0', '"threshold_db":60.0'))
    return digest


def with_no_graph(line, keys):
    return signed(line, line.release(graph=b"not a graph"), keys / "release")


def of_another_graph(line, keys):
    return signed(line, line.release(graph=rms_graph(3, SAMPLES, 1.0, 0)), keys / "release")


def for_another_machine(line, keys):
    return signed(line, line.release(1.35, name="pump"), keys / "release")


def for_another_rate(line, keys):
    return signed(line, line.release(1.36, rate_hz=2048.0), keys / "release")


def older(line, keys):
    first = signed(line, line.release(1.37, revision=7), keys / "release")
    line.follow(first, "promoted")
    line.rollout.settle(first, "as the test says")
    wait_for(lambda: line.rollout.observed().get("motor", ("",))[0] == first)
    return signed(line, line.release(1.38, revision=6), keys / "release")


@pytest.mark.parametrize("bad, says", [
    (unsigned, "not signed"), (by_a_stranger, "nobody that is trusted"), (with_a_changed_byte, "model.onnx"), (with_a_file_too_many, "run_me.py"),
    (with_a_calibration_slipped_in, "calibration.json"), (with_no_graph, "cannot read the graph"), (of_another_graph, "its contract says"),
    (for_another_machine, "no stream here takes pump"), (for_another_rate, "no stream here takes motor"), (older, "is older")], ids=lambda x: getattr(x, "__name__", "says"))
def test_a_bundle_that_is_no_good_never_comes_to_judge_and_is_not_tried_again(line, keys, bad, says):
    updater = updater_of(line, trusted_keys=(keys / "release.pub",), unsigned_bundles=False)
    digest = bad(line, keys)
    before = line.rollout.running()
    line.want(digest)
    c = run(line, updater, digest, "rolled_back")
    assert says in c.reason
    steps = len(line.rollout.audit(digest))
    updater.step()
    assert len(line.rollout.audit(digest)) == steps and line.rollout.running() == before
    line.send(2)
    assert digest not in line.check_every_verdict()


def test_a_key_that_is_revoked_brings_what_it_had_signed_back_to_what_was_before(line, keys, tmp_path):
    revoked = tmp_path / "revoked"
    revoked.write_text("# nobody yet\n")
    updater = updater_of(line, trusted_keys=(keys / "release.pub",), unsigned_bundles=False, revoked_keys=revoked)
    new = signed(line, line.release(1.05), keys / "release")
    line.want(new)
    run(line, updater, new, "promoted")
    line.until(lambda: line.rollout.observed()["motor"][0] == new)
    revoked.write_text(f"{verify(line.bundles / new, Trust(keys=(keys / 'release.pub',))).fingerprint}  # the laptop was stolen\n")
    updater.step()
    c = line.rollout.candidate(new)
    assert c.state == "rolled_back" and "revoked" in c.reason
    line.until(lambda: line.rollout.observed()["motor"][0] == "")
    line.send(2)
    assert line.verdicts()[-1].model == line.site.bundle.digest


def test_nobody_trusted_is_a_setting_that_can_be_corrected_and_no_verdict_on_the_bundle(line, keys):
    new = signed(line, line.release(1.05), keys / "release")
    line.want(new)
    updater = updater_of(line, unsigned_bundles=False)
    for _ in range(3):
        updater.step()
    c = line.rollout.candidate(new)
    assert c.state == "fetched" and "trusted_keys" in c.reason
    run(line, updater_of(line, trusted_keys=(keys / "release.pub",), unsigned_bundles=False), new, "promoted")


_SMALL_DISK = textwrap.dedent("""
    import resource, signal
    from pdm.config import load_assets, load_settings
    from pdm.serve.engine import InProcess
    from pdm.stream.rollout import Rollout
    from pdm.stream.updater import Updater
    settings = load_settings()
    rollout = Rollout(settings.state_dir / "rollout.db")
    updater = Updater(settings, rollout, load_assets(settings.assets), InProcess())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    for _ in range(3):
        updater.step()
""")


def test_a_disk_that_is_full_while_a_bundle_is_staged_costs_nothing_but_time(line, tmp_path):
    def heavy(graph, node):
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2**20, np.float32), "ballast"))

    new = line.release(graph=edited(heavy))
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for folder in (new, f"{new}.calibration"):
        (line.bundles / folder).rename(shelf / folder)
    line.want(new)
    subprocess.run([sys.executable, "-c", _SMALL_DISK], env=environment(line, BUNDLE_URL=f"file:{shelf}"), check=True, timeout=60)
    c = line.rollout.candidate(new)
    assert c.state == "wanted" and "can't be written" in c.reason
    assert [p.name for p in line.bundles.iterdir() if not p.name.startswith(".fetching")] == []  # nothing half
    run(line, updater_of(line, bundle_url=f"file:{shelf}"), new, "promoted")
    assert line.check_every_verdict() <= {line.site.bundle.digest, new}


# what is rare, and happens


def at_work(line, digest: str, settled: bool = True) -> str:
    "Promote without an updater, and wait until the agent has it."
    line.follow(digest, "promoted")
    if settled:
        line.rollout.settle(digest, "as the test says")
    line.until(lambda: line.rollout.observed().get("motor", ("",))[0] == digest)
    return digest


def test_a_rollback_that_was_asked_for_is_not_undone_because_it_disagrees_with_what_it_replaces(line):
    good, bad = at_work(line, line.release(1.05)), at_work(line, line.release(9.0), settled=False)
    updater = updater_of(line)
    line.want(f"{good} rollback")
    run(line, updater, good, "promoted")
    line.until(lambda: (updater.step(), line.rollout.candidate(good).settled or line.rollout.running()["motor"].digest == bad)[1])
    assert line.rollout.running()["motor"].digest == good


def excused(line, digest: str, champion: str, fans=(0, 1)) -> str:
    "A release that says of a champion's alarms on these fans that they are none."
    streams = {"/".join(key_of(i)): "the hall is warmer, for all of them" for i in fans}
    (line.bundles / f"{digest}.calibration" / EXCUSED).write_text(Excuse(champion=champion, streams=streams).to_json())
    return digest


def test_a_challenger_that_is_silent_where_the_champion_alarms_at_a_changed_world_is_promoted_and_stays(line, keys):
    line.send(20, level=4.0)
    assert line.verdicts()[-1].alarm
    new = signed(line, excused(line, line.release(0.2), line.site.bundle.digest), keys / "release")
    line.want(new)
    updater = updater_of(line, trusted_keys=(keys / "release.pub",), unsigned_bundles=False, probation_minutes=0.02)
    c = run(line, updater, new, "promoted", level=4.0)
    assert "the champion is no measure on 2 streams: the hall is warmer" in c.reason
    updater = updater_of(line, trusted_keys=(keys / "release.pub",), unsigned_bundles=False, probation_minutes=0.02)  # that was started anew, and reads it again
    line.until(lambda: updater.step() or line.rollout.candidate(new).settled, level=4.0)
    with line.site.reader() as reader:
        assert [e.kind for e in reader.events(path_of(0)) if e.kind in ("raised", "cleared")] == ["raised", "cleared"]


@pytest.mark.parametrize("champion, fans", [("this", (0,)), ("another", (0, 1))], ids=["a fan that is not named", "another champion"])
def test_an_excuse_holds_for_the_streams_and_the_champion_that_it_names(line, champion, fans):
    line.send(20, level=4.0)
    new = excused(line, line.release(0.2), line.site.bundle.digest if champion == "this" else "ab" * 32, fans)
    line.want(new)
    c = run(line, updater_of(line), new, "rolled_back", level=4.0)
    last = line.rollout.audit(new)[-1]
    assert (last.before, last.details["cause"]) == ("shadow", "agreement")
    assert ("/".join(key_of(1)) in c.reason) or champion == "another"


@pytest.mark.parametrize("fans", [(0, 1), (0,)], ids=["both fans", "one of them"])
def test_a_promise_may_be_lost_only_where_windows_were_held_back_and_the_release_says_so(line, fans):
    new = line.release(0.9)
    for i in (0, 1):
        file = line.bundles / f"{new}.calibration" / f"{path_of(i).replace('/', '.')}.calibration.json"
        told = json.loads(file.read_text())
        assert told["supported"]
        file.write_text(json.dumps(told | {"supported": False}))
    held = {"/".join(key_of(i)): "its bearing wears out" for i in fans}
    (line.bundles / f"{new}.calibration" / EXCUSED).write_text(Excuse(champion=line.site.bundle.digest, streams={}, held=held).to_json())
    line.want(new)
    c = run(line, updater_of(line), new, "promoted" if len(fans) == 2 else "rolled_back")
    assert len(fans) == 2 or f"{path_of(1)}/vibration would lose its promise" in c.reason


def test_alarms_of_its_own_count_on_a_stream_that_is_excused_as_anywhere(line):
    line.send(20)
    new = excused(line, line.release(9.0), line.site.bundle.digest)  # always in alarm, where the champion is silent
    line.want(new)
    run(line, updater_of(line), new, "rolled_back")
    assert line.rollout.audit(new)[-1].details["cause"] == "alarms"


@pytest.mark.parametrize("how", ["slipped in", "changed", "not an excuse"])
def test_an_excuse_that_nobody_has_signed_or_that_is_none_is_refused_with_its_release(line, keys, how):
    new = line.release(0.2)
    file = line.bundles / f"{new}.calibration" / EXCUSED
    if how == "changed":
        excused(line, new, line.site.bundle.digest, (0,))
    elif how == "not an excuse":
        file.write_text('{"champion": "latest", "streams": {}}')
    signed(line, new, keys / "release")
    if how != "not an excuse":
        excused(line, new, line.site.bundle.digest)
    line.want(new)
    updater = updater_of(line, trusted_keys=(keys / "release.pub",), unsigned_bundles=False)
    c = run(line, updater, new, "rolled_back", level=4.0)
    assert EXCUSED in c.reason and line.rollout.audit(new)[-1].before == "fetched"


def test_two_versions_of_one_stolen_key_both_go(line, keys, tmp_path):
    revoked = tmp_path / "revoked"
    first, second = (signed(line, line.release(gain), keys / "release") for gain in (1.05, 1.1))
    at_work(line, first)
    at_work(line, second, settled=False)
    revoked.write_text(verify(line.bundles / first, Trust(keys=(keys / "release.pub",))).fingerprint)
    updater_of(line, trusted_keys=(keys / "release.pub",), unsigned_bundles=False, revoked_keys=revoked).step()
    assert line.rollout.running()["motor"].digest == ""


def test_a_version_that_was_refused_and_is_the_way_back_all_the_same_does_not_bar_the_next_one(line):
    first, second = at_work(line, line.release(1.05)), at_work(line, line.release(1.1), settled=False)
    updater = updater_of(line)
    line.want(first)
    assert "is older" in run(line, updater, first, "rolled_back").reason
    line.rollout.move(second, "rolled_back", "as the test says")
    assert line.rollout.running()["motor"].digest == first
    third = line.release(1.15)
    line.want(third)
    line.until(lambda: (updater.step(), line.rollout.candidate(third).state in ("shadow", "promoted"))[1])
    assert line.rollout.candidate(first).state == "promoted"


def test_a_champion_that_comes_to_probation_again_is_compared_again(line):
    new = at_work(line, line.release(1.1), settled=False)
    line.until(lambda: line.rollout.compared(new))
    for state in ("wanted", *STATES[1:7]):
        line.rollout.move(new, state, "its engine was built again")
    line.until(lambda: line.rollout.compared(new))


def test_a_champion_does_not_answer_for_a_former_version_that_can_not_be_loaded_any_more(line):
    first, second = at_work(line, line.release(1.05)), at_work(line, line.release(1.1), settled=False)
    line.stop()
    (line.bundles / first / "model.onnx").write_bytes(b"not a graph")
    line.start()
    updater = updater_of(line, probation_minutes=0.02)
    line.until(lambda: (updater.step(), (c := line.rollout.candidate(second)).settled or c.state == "rolled_back")[1])
    assert line.rollout.running()["motor"].digest == second


def test_two_lines_for_one_type_of_asset_do_not_take_turns(line):
    first, second = at_work(line, line.release(1.05)), at_work(line, line.release(1.1))
    line.want(f"{first} rollback", f"{second} rollback")
    updater = updater_of(line)
    for _ in range(40):
        updater.step()
    assert len([s for s in line.rollout.audit() if s.after == "promoted" != s.before]) <= 3


def test_a_champion_whose_engine_is_built_again_stays_champion_while_another_one_is_on_its_way(line):
    first, second = at_work(line, line.release(1.05)), line.release(1.1)
    updater = updater_of(line, shadow_windows=10**6)
    line.want(second)
    run(line, updater, second, "shadow")
    line.rollout.move(first, "wanted", "its engine is gone")
    line.until(lambda: (updater.step(), line.rollout.candidate(first).state in ("promoted", "rolled_back"))[1])
    assert line.rollout.running()["motor"].digest == first and line.rollout.candidate(first).state == "promoted"
    assert line.rollout.candidate(second).state == "shadow"


def test_an_engine_that_was_built_again_is_taken_up_by_an_agent_that_is_at_work(line):
    new = line.release(1.1)
    line.follow(new, "verified")
    graph = onnx.load(line.bundles / new / "model.onnx")
    for name in ("first", "again"):
        file, graph.doc_string = line.settings.state_dir / f"{name}.onnx", name
        onnx.save(graph, file)
        for state in STATES[3:7]:
            line.rollout.move(new, state, name, artifact={"path": str(file), "precision": "fp32", "tolerance": 1e-3})
        line.until(lambda file=file: file in [artifact.path for _, artifact in list(line.models._loaded) if artifact])
        line.send(4)
        line.rollout.move(new, "wanted", "its engine is gone")
    wait_for(lambda: [a.path.stem for _, a in list(line.models._loaded) if a] == ["again"])  # and the one before is let go
    assert line.check_every_verdict() == {line.site.bundle.digest, new}


def test_the_engines_of_all_that_runs_are_kept_up_not_only_of_the_first(line):
    digests = {"motor": line.release(1.05), "pump": line.release(1.1, name="pump")}
    line.follower.stop()
    for name, digest in digests.items():
        line.follow(digest, "promoted", name)
        line.rollout._db.execute("UPDATE candidate SET settled = 1, artifact = ? WHERE digest = ?",
                                 (json.dumps({"path": "gone.onnx", "precision": "fp16", "tolerance": 1e-3}), digest))
    updater_of(line).step()
    assert all("its engine is gone" in line.rollout.audit(d)[-1].reason for d in digests.values())


def test_a_shadow_that_hangs_lets_go_of_the_monitors_that_it_has_given_away(line):
    class Late:
        def __init__(self, model):
            self.model, self.contract, self.go = model, model.contract, threading.Event()

        def infer(self, windows, conditions=None):
            self.go.wait(30)
            return self.model.infer(windows, conditions)

    versions = versions_of(installed(line.records), line.records, InProcess().load)
    late = Late(next(iter(versions.values())).model)
    for v in versions.values():
        v.model = late
    shadow = Shadow(versions, {key: o.version for key, o in line.agent._judge.owned.items()}, {})
    line.agent.shadows["by hand"] = shadow
    line.send(1)
    del line.agent.shadows["by hand"]
    given = shadow.take(0.1)
    before = [v.monitor.to_state() for v in given.values()]
    late.go.set()
    shadow._thread.join(10)
    assert [v.monitor.to_state() for v in given.values()] == before


@pytest.mark.parametrize("command", [{"action": "clear"}, {"action": "maintenance", "what": "bearing replaced"}], ids=lambda c: c["action"])
def test_what_people_do_about_an_alarm_holds_for_the_version_beside_too(line, command):
    line.follow(line.release(1.1), "shadow")
    line.until(lambda: (s := line.agent.shadows.get("motor")) and s.versions[key_of(0)].monitor.to_state()["alarm"], level=4.0)
    line.agent.command(Command(asset=path_of(0), by="anna", **command))
    states = [line.agent.shadows["motor"].versions[key_of(i)].monitor.to_state() for i in range(2)]
    assert [s["alarm"] for s in states] == [False, True]


def test_an_alarm_that_stands_is_not_told_again_by_an_agent_that_was_killed_before_the_exchange(line):
    line.level = lambda seq: 4.0
    new = line.release(1.1)
    line.follow(new, "shadow")
    line.until(lambda: line.verdicts() and line.verdicts()[-1].alarm and line.rollout.states(new), level=4.0)
    line.send(10, level=4.0)
    wait_for(lambda: all(s["t"] == window(line.sent - 1).t_ns for _, s in line.rollout.states(new).values()))
    line.stop()
    line.rollout.move(new, "promoted", "while no agent was there")
    line.start()
    line.send(5, level=4.0)
    assert line.verdicts()[-1].model == new
    with line.site.reader() as reader:
        assert [e.kind for e in reader.events(path_of(0)) if e.kind in ("raised", "escalated", "cleared")] == ["raised"]


def test_what_was_installed_is_warm_again_when_it_was_rolled_back_to_while_no_agent_was_there(line):
    new = at_work(line, line.release(1.1), settled=False)
    line.until(lambda: line.rollout.states("") and line.agent.shadows)
    line.send(10)
    line.stop()
    line.rollout.move(new, "rolled_back", "while no agent was there")
    line.start()
    assert line.agent._judge.owned[key_of(0)].version.monitor.to_state()["t"] == window(line.sent - 1).t_ns


def test_a_model_that_is_let_go_leaves_no_fallback_to_be_alarmed_by(line):
    class Away(InProcess):
        "An engine of another kind that is not there."

        def load(self, bundle, artifact=None):
            raise PartMissing("away")

    class Elsewhere:
        name, url, load, unload = "triton", "grpc://away", Away.load, lambda *a: None

    told, canaries = [], []
    models = Models(Elsewhere(), lambda digest, active, why: told.append((digest, active)), lambda *look: canaries.append(look))
    models.load(line.site.bundle)
    models.keep_only([])
    assert told == [(line.site.bundle.digest, "inprocess"), (line.site.bundle.digest, "")]
    assert canaries and set(canaries) == {(line.site.bundle.digest, False)}


def test_the_page_shows_how_far_two_versions_agree_while_both_are_there(line):
    def agreement():
        return line.agent.metrics.registry.get_sample_value("pdm_shadow_agreement_ratio", {"name": "motor"})

    new = line.release(1.05)
    assert agreement() is None
    line.follow(new, "shadow")
    assert line.until(agreement) == 1.0  # both on quiet windows
    line.rollout.move(new, "rolled_back", "enough")
    wait_for(lambda: agreement() is None)


def test_an_updater_keeps_no_model_in_its_memory(line):
    updater = updater_of(line)
    for gain in (1.05, 1.1):
        new = line.release(gain)
        line.want(new)
        run(line, updater, new, "shadow")
    assert updater._engine._models == {}


def test_a_graph_that_can_be_read_and_not_executed_is_refused_and_the_updater_goes_on(line):
    def change(graph, node):
        for n in graph.node:
            n.input[:] = ["hurt_gain" if i == "gain" else i for i in n.input]
        graph.initializer.extend([onnx.helper.make_tensor("sevens", onnx.TensorProto.INT64, [2], [-1, 7]), onnx.helper.make_tensor("none", onnx.TensorProto.FLOAT, [], [0.0])])
        for n in reversed([node("Reshape", ["window", "sevens"], ["weeks"]), node("ReduceMax", ["weeks"], ["largest"], keepdims=0), node("Mul", ["largest", "none"], ["no"]),
                           node("Add", ["gain", "no"], ["hurt_gain"])]):
            graph.node.insert(0, n)

    bad = line.release(graph=edited(change))
    line.want(bad)
    assert "cannot execute" in run(line, updater_of(line), bad, "rolled_back").reason


class Direct:
    "What a follower asks of an agent, at once."

    def __init__(self, owned):
        self.judge, self.shadows = Judge(owned, diagnose), {}

    def order(self, exchange):
        exchange(self.judge)


def test_streams_that_a_new_version_does_not_take_are_judged_as_installed_again(line, make_bundle):
    line.follower.stop()
    other = make_bundle(samples=SAMPLES // 2, rate_hz=RATE_HZ)
    (line.site.folder / "half.json").write_text(line.site.record.model_copy(update={"model": other.digest}).to_json())
    line.site.write([{"path": path_of(0), "streams": {"vibration": {"bundle": str(line.site.bundle.path), "calibration": "rms.json"}}},
                     {"path": path_of(1), "streams": {"vibration": {"bundle": str(other.path), "calibration": "half.json"}}}])
    follower = Follower(line.file, load_assets(line.settings.assets), Models(InProcess()), line.bundles)
    follower._agent = direct = Direct(follower.own(line.journal))
    digests = lambda: [direct.judge.owned[key_of(i)].version.digest for i in range(2)]  # noqa: E731
    whole, half = line.release(1.1), line.release(1.2, samples=SAMPLES // 2, graph=rms_graph(2, SAMPLES // 2, 1.2, 0))
    for digest, expected in ((whole, [whole, other.digest]), (half, [line.site.bundle.digest, half])):
        line.follow(digest, "promoted")
        follower.look()
        assert digests() == expected
    line.rollout.move(half, "rolled_back", "as the test says")
    follower.look()
    assert digests() == [whole, other.digest]
    follower.stop()


def in_shadow_of(line, agent):
    "A bundle in its shadow, a follower that looks when it is told to, and the agent of that kind whose versions it exchanges."
    new = line.release(1.1)
    line.follow(new, "shadow")
    line.follower.stop()
    follower = Follower(line.file, line.records, line.models, line.bundles)
    follower._agent = direct = agent(follower.own(line.journal))
    follower.look()
    return new, follower, direct


def test_a_switch_that_falls_between_two_looks_at_the_rollout_is_seen_whole(line, monkeypatch):
    new, follower, direct = in_shadow_of(line, Direct)
    warm = direct.shadows["motor"].versions
    beside = Rollout.beside

    def late(self):
        monkeypatch.undo()
        other = threading.Thread(target=lambda: Rollout(line.file).move(new, "promoted", "between"))
        other.start()
        other.join(0.5)
        return beside(self)

    monkeypatch.setattr(Rollout, "beside", late)
    follower.look()
    wait_for(lambda: follower.look() or direct.judge.owned[key_of(0)].version.digest == new)
    assert direct.judge.owned[key_of(0)].version is warm[key_of(0)]
    follower.stop()


def test_an_exchange_that_is_done_late_ends_the_shadow_that_was_there(line):
    class Slow(Direct):
        def order(self, exchange):
            super().order(exchange)
            raise PartMissing("not written down in time")

    new, follower, direct = in_shadow_of(line, Slow)
    shadow = direct.shadows["motor"]
    line.rollout.move(new, "rolled_back", "as the test says")
    line.follow(line.release(1.2), "promoted")
    with pytest.raises(PartMissing):
        follower.look()
    shadow._thread.join(5)
    assert not shadow._thread.is_alive()
    follower.stop()


def test_a_calibration_that_names_no_bundle_is_no_bar_on_the_way_back_to_what_is_installed(line):
    (line.site.folder / "rms.json").write_text(line.site.record.model_copy(update={"model": ""}).to_json())
    line.records = load_assets(line.settings.assets)
    at_work(line, line.release(1.1))
    line.want(f"{line.site.bundle.digest} rollback")
    assert run(line, updater_of(line), line.site.bundle.digest, "promoted").reason == "a rollback, asked for by name"
    line.until(lambda: line.rollout.observed()["motor"][0] == line.site.bundle.digest)


def test_a_builder_that_is_away_is_waited_for_and_not_asked_without_end(line):
    pytest.importorskip("pdm.serve.tensorrt")
    new = line.release(1.05)
    line.want(new)
    updater, built = updater_of(line, engine_profile="jetson"), []
    build = updater._build
    updater._build = lambda c: (built.append(c), build(c))
    for _ in range(8):
        updater.step()
    c = line.rollout.candidate(new)
    assert (c.state, len(built)) == ("verified", 1) and "no builder works on" in c.reason


def test_a_comment_that_touches_its_digest_does_not_keep_the_line(line):
    assert with_line(f"{'ab' * 32}# the old one\n", Wanted("cd" * 32), ["ab" * 32]).split() == ["cd" * 32]


def test_an_error_that_nobody_has_foreseen_stops_one_candidate_and_not_the_updater(line):
    def change(graph, node):
        for n in graph.node:
            n.input[:] = ["looked_up" if i == "gain" else i for i in n.input]
        graph.initializer.extend([onnx.helper.make_tensor("level", onnx.TensorProto.FLOAT, [], [20.0]), onnx.helper.make_tensor("table", onnx.TensorProto.FLOAT, [1], [1.0])])
        for n in reversed([node("ReduceMax", ["window"], ["largest"], keepdims=0), node("Greater", ["largest", "level"], ["loud"]),
                           node("Cast", ["loud"], ["place"], to=onnx.TensorProto.INT64), node("Gather", ["table", "place"], ["looked_up"])]):
            graph.node.insert(0, n)

    line.examples[12] *= 50  # where the graph looks for a second element that is not there; the canary is not as loud
    bad, good = line.release(graph=edited(change)), line.release(1.05, name="pump")
    line.want(bad, good)
    updater = updater_of(line)
    for _ in range(6):
        updater.step()
    c = line.rollout.candidate(bad)
    assert c.state in ("verified", "built") and "Gather" in c.reason
    assert line.rollout.candidate(good).state == "rolled_back"  # no pump here: it was looked at


def test_a_probation_that_ran_out_while_nobody_compared_goes_on_until_somebody_has(line):
    new = line.release(1.1)
    line.stop()
    line.follow(new, "promoted")
    line.start()
    updater = updater_of(line, probation_minutes=0)
    wait_for(lambda: line.rollout.compared(new))
    for _ in range(3):
        updater.step()
    assert not line.rollout.candidate(new).settled and "is there traffic?" in line.rollout.candidate(new).reason
    line.until(lambda: (updater.step(), line.rollout.candidate(new).settled)[1])


def test_a_step_is_told_once_however_many_precisions_are_tried(line):
    new, told = line.release(1.05), []
    line.follow(new, "verified")
    updater = Updater(line.settings, line.rollout, line.records, InProcess(), stepped=told.append)
    verified = line.rollout.candidate(new)
    for precision in ("int8", "fp16", "fp32"):
        updater._move(verified, "built", precision)
    assert [c.state for c in told] == ["built"]


def test_an_agent_that_stops_on_a_full_disk_stops(line, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    line.follow(line.release(1.1), "shadow")
    line.until(lambda: line.agent.shadows)
    monkeypatch.setattr(line.follower._rollout, "keep", full)
    line.follower.stop()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        line.follower._rollout.running()


@pytest.mark.parametrize("damage", [b"this is no database, and was not one for a long time" * 100, None], ids=["overwritten", "torn"])
def test_a_damaged_file_of_the_rollout_is_put_aside_and_the_line_goes_on_with_what_is_installed(line, damage):
    new = line.release(1.1)
    line.follow(new, "promoted")
    line.until(lambda: line.rollout.observed().get("motor", ("",))[0] == new)
    line.stop()
    line.rollout.close()
    with line.file.open("r+b") as f:
        f.seek(0 if damage else 4096)
        f.write(damage or os.urandom(8 * 4096))
    line.start()
    line.rollout = Rollout(line.file)
    line.send(3)
    assert line.verdicts()[-1].model == line.site.bundle.digest
    assert len(list(line.file.parent.glob("rollout.db.damaged-*"))) >= 1
    line.want(new)
    run(line, updater_of(line), new, "promoted")  # what is desired comes again


# with the real tritonserver


@pytest.fixture
def triton_line(make_bundle, tmp_path):
    try:
        engine = TritonEngine("embedded:")
    except PartMissing as e:
        pytest.skip(f"make triton-env ({e})")
    made = Line(tmp_path / "site", make_bundle)
    made.start(engine)
    yield made
    made.stop()
    made.rollout.close()


@pytest.mark.integration
def test_triton_killed_at_each_step_of_a_rollout_loses_no_window_and_ends_with_the_new_version_served(triton_line):
    line = triton_line
    line.until(lambda: line.verdicts() and line.verdicts()[-1].engine == "triton")
    killed = set()

    def kill(state):
        if state not in killed and line.engine.server.alive:
            killed.add(state)
            os.kill(line.engine.server.pid, signal.SIGKILL)

    new = line.release(1.05)
    line.want(new)
    updater = updater_of(line, probation_minutes=0.05)

    def there():
        updater.step()
        c = line.rollout.candidate(new)
        if c.state in ("shadow", "promoted"):
            kill(c.state)
        if c.state == "promoted" and line.rollout.observed()["motor"][0] == new:
            kill("exchanged")
        return c.state == "promoted" and len(killed) == 3

    line.until(there)
    line.until(lambda: line.verdicts()[-1].engine == "triton" and line.verdicts()[-1].model == new)
    line.until(lambda: updater.step() or line.rollout.candidate(new).settled)
    line.send(4)
    assert line.check_every_verdict() == {line.site.bundle.digest, new}
    assert {r.engine for r in line.verdicts()} == {"triton", "inprocess"}
    wait_for(lambda: line.served() == [new])  # the former one is retired
