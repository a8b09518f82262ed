"Certificates as others see them, and what a person may do wrong with them. Who gets past the broker with them: test_mosquitto.py."

import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from servers import need
from typer.testing import CliRunner

from pdm.data.window import AssetPath
from pdm.errors import CheckFailed, InvalidInput
from pdm.pki import DAYS, SKEW, init, issue, kind_of, revoke, secret, status
from pdm.pki_cli import pki as app
from pdm.process import lock_file

FAN = "acme/lyon/hall-2/line-1/fan-1"


@pytest.fixture
def pki(tmp_path):
    folder = tmp_path / "pki"
    init(folder)
    return folder


def openssl(*args):
    "What OpenSSL says, and whether it agrees."
    (program,) = need("openssl", "openssl")
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def verified(pki, where, authority, purpose, *more):
    authority = pki / "authorities" / authority
    return openssl("verify", "-x509_strict", "-CAfile", authority / "ca.crt", "-CRLfile", authority / "ca.crl", "-crl_check", "-purpose", purpose, *more, where / "tls.crt")


def test_openssl_takes_each_certificate_for_its_purpose_alone(pki):
    issue(pki, FAN)
    issue(pki, "agent")
    issue(pki, "mosquitto", ["edge.lyon.example", "10.0.0.5", "fd00::5", "*.lyon.example"])
    of = {"assets": pki / "assets" / FAN, "services": pki / "services/agent", "server": pki / "servers/mosquitto"}
    taken = {(name, authority, purpose): verified(pki, where, authority, purpose)[0]
             for name, where in of.items() for authority in ("assets", "services") for purpose in ("sslclient", "sslserver")}
    assert {k for k, good in taken.items() if good} == {("assets", "assets", "sslclient"), ("services", "services", "sslclient"), ("server", "services", "sslserver")}
    for host, good in (("edge.lyon.example", True), ("other.lyon.example", True), ("edge.paris.example", False)):
        assert verified(pki, of["server"], "services", "sslserver", "-verify_hostname", host)[0] is good
    for ip, good in (("10.0.0.5", True), ("fd00::5", True), ("10.0.0.6", False)):
        assert verified(pki, of["server"], "services", "sslserver", "-verify_ip", ip)[0] is good


def test_openssl_refuses_what_is_revoked_and_takes_what_is_not(pki):
    issue(pki, FAN)
    old = shutil.copytree(pki / "assets" / FAN, pki / "old")
    issue(pki, FAN)
    assert verified(pki, old, "assets", "sslclient")[0]  # a renewal does not end what was there
    revoke(pki, FAN, old=True, reason="replaced")
    good, said = verified(pki, old, "assets", "sslclient")
    assert not good and "certificate revoked" in said
    assert verified(pki, pki / "assets" / FAN, "assets", "sslclient")[0]


def test_a_clock_that_is_a_day_behind_takes_a_new_certificate_and_a_new_list(pki):
    issue(pki, FAN)
    revoke(pki, FAN)
    issue(pki, FAN)
    yesterday = datetime.now(UTC) - SKEW + timedelta(minutes=5)
    assert verified(pki, pki / "assets" / FAN, "assets", "sslclient", "-attime", round(yesterday.timestamp()))[0]


def test_the_list_of_revoked_ones_lasts_as_long_as_its_authority(pki):
    issue(pki, FAN, days=DAYS["authority"] - 1)
    late = datetime.now(UTC) + timedelta(days=DAYS["authority"] - 2)
    assert verified(pki, pki / "assets" / FAN, "assets", "sslclient", "-attime", round(late.timestamp()))[0]


def test_each_list_has_a_higher_number_than_the_one_before_and_keeps_what_it_had(pki):
    numbers, serials = [], []
    for i in range(3):
        entry, _ = issue(pki, f"{FAN}{i}")
        revoke(pki, f"{FAN}{i}", reason=("unspecified", "stolen", "retired")[i])
        crl = x509.load_pem_x509_crl((pki / "authorities/assets/ca.crl").read_bytes())
        numbers.append(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
        serials.append(entry.serial)
        assert [r.serial_number for r in crl] == serials
    assert numbers == [2, 3, 4]


def test_nobody_else_may_read_a_key(pki):
    issue(pki, FAN)
    issue(pki, "mosquitto", ["10.0.0.5"])
    keys = list(pki.rglob("*.key"))
    assert len(keys) == 4 and {k.stat().st_mode & 0o777 for k in keys} == {0o600} and pki.stat().st_mode & 0o777 == 0o700


def test_an_authority_that_has_lost_its_key_is_not_made_anew(pki):
    (pki / "authorities/assets/ca.key").unlink()
    with pytest.raises(InvalidInput, match="put the rest back from a backup"):
        init(pki)
    with pytest.raises(InvalidInput, match="ca.key is not a private key"):
        issue(pki, FAN)


def test_a_first_making_that_was_killed_is_finished_by_the_next(pki):
    (pki / "authorities/services/ca.crt").unlink()  # the last file that is written
    assert init(pki) == ["services"]
    issue(pki, "agent")
    assert verified(pki, pki / "services/agent", "services", "sslclient")[0]


def test_a_pair_of_which_one_half_is_new_is_issued_again(pki):
    issue(pki, FAN)
    where = pki / "assets" / FAN
    certificate = (where / "tls.crt").read_bytes()
    issue(pki, FAN)
    (where / "tls.crt").write_bytes(certificate)  # the power went between the two files
    assert {e.state for e in status(pki) if e.name == FAN} == {"broken"}
    assert issue(pki, FAN, renew_before=30)[1]
    assert {(e.state, e.older) for e in status(pki) if e.name == FAN} == {("valid", 2)}


def test_a_timer_renews_what_is_due_what_was_revoked_and_what_has_other_names(pki):
    issue(pki, "mosquitto", ["edge.lyon.example"])
    assert not issue(pki, "mosquitto", renew_before=30)[1]
    assert not issue(pki, "mosquitto", ["edge.lyon.example"], renew_before=30)[1]
    assert issue(pki, "mosquitto", ["edge.lyon.example", "10.0.0.5"], renew_before=30)[1]
    revoke(pki, "mosquitto")
    entry, made = issue(pki, "mosquitto", renew_before=30)
    assert made and entry.hosts == ("edge.lyon.example", "10.0.0.5")
    assert issue(pki, "mosquitto", renew_before=30, now=datetime.now(UTC) + timedelta(days=DAYS["server"] - 29))[1]


def test_two_at_once_do_not_write_the_same_folder(pki):
    with lock_file(pki / ".lock"), pytest.raises(CheckFailed, match="another `predmaint pki` is at work"):
        issue(pki, FAN)


def test_a_wrong_folder_is_named_and_not_made(tmp_path):
    for call in (lambda: issue(tmp_path / "typo", "agent"), lambda: revoke(tmp_path / "typo", "agent"), lambda: status(tmp_path / "typo"), lambda: issue(tmp_path, "agent")):
        with pytest.raises(InvalidInput, match="holds no authorities: make them with `predmaint pki init .*, or correct the folder"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda crl: crl.unlink(), lambda crl: crl.write_text("no list")], ids=["lost", "broken"])
@pytest.mark.parametrize("authority", ["assets", "services"])
def test_a_list_of_revoked_ones_that_is_lost_or_broken_is_named_and_goes_to_no_broker(pki, authority, damage):
    issue(pki, "mosquitto", ["10.0.0.5"])
    issue(pki, FAN)
    there = (pki / f"servers/mosquitto/{authority}.crl").read_bytes()
    damage(pki / "authorities" / authority / "ca.crl")
    for call in (lambda: issue(pki, "mosquitto", renew_before=30), lambda: status(pki), lambda: revoke(pki, FAN), lambda: secret(pki, "mosquitto", "tls")):
        with pytest.raises(InvalidInput, match=f"{authority}/ca.crl is not a list of revoked certificates .*put it back"):
            call()
    assert (pki / f"servers/mosquitto/{authority}.crl").read_bytes() == there


def test_a_server_whose_folder_was_moved_to_its_place_stays_one(pki):
    issue(pki, "mosquitto", ["edge.lyon.example"])
    (pki / "servers/mosquitto").rename(pki / "carried")
    entry, made = issue(pki, "mosquitto", renew_before=30)
    assert made and (entry.kind, entry.hosts, entry.older) == ("server", ("edge.lyon.example",), 1)
    (pki / "servers/mosquitto").rename(pki / "carried again")
    assert len(revoke(pki, "mosquitto")) == 2 and not (pki / "services").exists()


def test_a_revocation_that_was_interrupted_reaches_the_broker_by_the_next_call(pki):
    issue(pki, "mosquitto", ["10.0.0.5"])
    issue(pki, FAN)
    kept = shutil.copytree(pki / "assets" / FAN, pki / "kept")
    before = (pki / "servers/mosquitto/assets.crl").read_bytes()
    (serial,) = revoke(pki, FAN)
    shutil.copytree(kept, pki / "assets" / FAN, dirs_exist_ok=True)  # as if the power had gone once the list was signed
    (pki / "servers/mosquitto/assets.crl").write_bytes(before)
    with pytest.raises(InvalidInput, match="has not a certificate that could be revoked"):
        revoke(pki, FAN)
    assert [r.serial_number for r in x509.load_pem_x509_crl((pki / "servers/mosquitto/assets.crl").read_bytes())] == [serial]
    assert not list((pki / "assets" / FAN).glob("tls.*"))


def test_the_earlier_certificates_are_not_revoked_while_the_newest_is_not_in_order(pki):
    issue(pki, FAN)
    issue(pki, FAN)
    (pki / "assets" / FAN / "tls.key").unlink()  # the power went before the pair was whole, or it was moved
    with pytest.raises(InvalidInput, match="is broken, so an earlier one may be all that works"):
        revoke(pki, FAN, old=True)
    issue(pki, FAN)
    assert len(revoke(pki, FAN, old=True)) == 2


@pytest.mark.parametrize("reason,again", [("stolen", False), ("retired", False), ("replaced", True)])
def test_a_timer_does_not_bring_back_what_was_stolen_or_retired(pki, reason, again):
    issue(pki, FAN)
    revoke(pki, FAN, reason=reason)
    code, printed = run("issue", pki, FAN, "--renew-before", 30)
    assert code == 0 and ("issued" in printed, "was revoked" in printed) == (again, not again)
    assert (pki / "assets" / FAN / "tls.key").exists() == again
    assert issue(pki, FAN)[1]  # a person may


def test_who_revokes_an_asset_hears_which_of_its_streams_have_certificates_of_their_own(pki):
    for below in ("", "/vibration", "/current", "1/vibration"):
        issue(pki, FAN + below)
    revoke(pki, f"{FAN}/current")
    (pki / "assets" / FAN / "vibration").rename(pki / "carried")  # it counts all the same
    code, printed = run("revoke", pki, FAN, "--reason", "stolen")
    assert code == 0 and f"stay valid: {FAN}/vibration." in printed
    assert "stay valid" not in run("revoke", pki, f"{FAN}/vibration")[1]


def test_a_certificate_for_the_services_door_is_for_the_services_alone(pki):
    for name in ("reader", "scada", "predmaint-agent"):
        with pytest.raises(InvalidInput, match=f"the services are agent and sinks, and {name} is none"):
            issue(pki, name)
    assert issue(pki, "sinks")[1]


def test_nothing_outlives_its_authority(pki):
    with pytest.raises(InvalidInput, match="longer than the authority lives, 3650 days"):
        issue(pki, FAN, days=DAYS["authority"] + 1)


@pytest.mark.parametrize("identity,hosts,why", [
    ("Agent", (), "neither a path"), ("agent.example", (), "neither a path"), ("", (), "neither a path"), ("a/b/c", (), "a line has 4"),
    ("a/b/c/d/e/f/g", (), "a line has 4"), ("a/b/c/d/+", (), "can't be a level"), ("a/b/../d/e", (), "can't begin with a dot"), ("a/b/c/d/tls.key", (), "tls.key is a file"),
    ("a/b/c/ca.crt/e", (), "ca.crt is a file"), ("a/b/c/d/e/tls.crt", (), "tls.crt is a file"), ("a/b/c/d/e\x1b[2J", (), "can't be seen"),
    ("a/b/c/d/e\u202e", (), "can't be seen"), ("a/b/c/d/\udc80", (), "can't be seen"), ("agent\n", (), "can't be seen"),  (FAN, ("10.0.0.5",), "only a server has host names"),
    ("mosquitto", ("edge lyon",), "neither a DNS name nor an IP address"), ("mosquitto", ("10.0.0.555",), "neither a DNS name nor an IP address"),
    ("agent", ("10.0.0.5",), "agent is a service"), (f"{FAN}{'x' * 40}", (), "at most 64"),
])
def test_an_identity_that_can_not_be_is_refused(pki, identity, hosts, why):
    issue(pki, "agent")
    with pytest.raises(InvalidInput, match=why):
        issue(pki, identity, hosts)


level = st.text(st.characters(), min_size=1, max_size=20)


@given(st.lists(level, min_size=1, max_size=7).map("/".join))
def test_what_is_taken_for_an_asset_is_a_path_below_its_folder_that_fits_a_certificate(identity):
    try:
        kind = kind_of(Path("nowhere"), identity)
    except InvalidInput:
        return
    if kind == "asset":
        AssetPath(*(identity.split("/") + ["any"])[:5])
        assert (Path("/assets") / identity).resolve().is_relative_to("/assets") and len(identity.encode()) <= 64
    else:
        assert re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", identity)


def test_a_secret_is_one_that_kubernetes_takes(pki):
    issue(pki, "mosquitto", ["mosquitto.predmaint.svc"])
    manifest = yaml.safe_load(secret(pki, "mosquitto", "mosquitto-tls"))
    assert {"tls.crt", "tls.key"} <= set(manifest["data"]) and manifest["type"] == "kubernetes.io/tls"
    assert all(re.fullmatch("[-._a-zA-Z0-9]+", key) for key in manifest["data"])
    assert "authorities" not in yaml.safe_dump(manifest) and manifest["metadata"]["namespace"] == "predmaint"
    with pytest.raises(InvalidInput, match="has no certificate: `predmaint pki issue"):
        secret(pki, "sinks", "sinks-tls")
    issue(pki, "sinks")
    shutil.copy(pki / "servers/mosquitto/tls.crt", pki / "services/sinks")
    with pytest.raises(InvalidInput, match="don't belong together"):
        secret(pki, "sinks", "sinks-tls")


def run(*args):
    "The exit code of the command, and what it prints."
    done = CliRunner().invoke(app, [str(a) for a in args])
    return getattr(done.exception, "exit_code", done.exit_code), done.stdout


def test_the_command_goes_through_the_life_of_a_certificate(tmp_path):
    folder = tmp_path / "pki"
    assert run("status", folder) == (1, "")
    assert run("init", folder, "--site", "lyon") == (0, f"made in {folder}: assets, services\n")
    assert run("init", folder) == (0, f"{folder} has its authorities: nothing to do\n")
    assert run("issue", folder, FAN, "--days", 10) == (0, f"issued: asset {FAN}, 10 days left\n")
    assert run("issue", folder, FAN, "--renew-before", 5) == (0, f"nothing to do: asset {FAN}, 10 days left\n")
    assert run("status", folder)[0] == 0
    assert run("status", folder, "--within", 11)[0] == 3
    assert run("revoke", folder, FAN, "--reason", "lost")[0] == 1
    assert run("revoke", folder, FAN, "--reason", "stolen")[0] == 0
    assert run("revoke", folder, FAN)[0] == 1
    code, printed = run("status", folder, "--json")
    assert code == 0 and {e["name"]: e["state"] for e in json.loads(printed)} == {"assets": "valid", "services": "valid", FAN: "revoked"}


def test_without_the_library_the_command_says_how_to_get_it(tmp_path):
    code = f"""
import sys
sys.modules["cryptography"] = None
from pdm.errors import PartMissing
from pdm.pki_cli import init
try:
    init({str(tmp_path / "pki")!r})
except PartMissing as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'predmaint[pki]'" in done.stdout, done.stderr


def test_the_command_is_there_before_the_library_is_loaded():
    code = "import sys, pdm.pki_cli; print([m for m in ('cryptography', 'numpy.fft', 'onnxruntime') if m in sys.modules])"
    assert "cryptography" not in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
