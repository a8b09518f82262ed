"""Bundles that are not what they should be: changed, forged, oversized, unsigned, half there. None is read, and none takes the place of a good one."""

import base64
import gzip
import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import servers
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from pdm.errors import InvalidBundle, InvalidConfig, InvalidInput, PartMissing, UntrustedBundle
from pdm.model.bundle import Contract, load_bundle, read_record, write_bundle
from pdm.model.claim import fingerprint
from pdm.model.folder import SIGNATURE, contents_digest, file_hashes
from pdm.model.registries import MlflowModel, OciLayout, OciRegistry
from pdm.model.signature import Signer, Trust, sign, verify
from pdm.model.transport import fetch, push

CONTRACT = Contract(name="motor", kind="mahalanobis", channels=("h", "v"), units=("g", "g"), rate_hz=25600, samples=64, embedding=3,
                    conditions=({"name": "speed_rpm", "low": 900, "high": 1500},), training_data="0" * 64)
NAMES = ("bundle.json", "conditions.npy", "model.onnx", "windows.npy")


class Keys:
    "Keys and certificates in a folder, as openssl makes them."

    def __init__(self, folder: Path):
        self.folder = folder

    def key(self, name: str, curve=ec.SECP256R1) -> Path:
        key = ec.generate_private_key(curve())
        self._write(f"{name}.key", key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        self._write(f"{name}.pub", key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
        return self.folder / f"{name}.key"

    def public(self, name: str) -> Path:
        return self.folder / f"{name}.pub"

    def fingerprint(self, name: str) -> str:
        return fingerprint(serialization.load_pem_public_key(self.public(name).read_bytes()))

    def certificate(self, name: str, issuer: str | None = None, authority: bool = False, since_days: int = -60, until_days: int = 30) -> Path:
        subject, by = (serialization.load_pem_private_key(p.read_bytes(), None) for p in (self.key(name), self.folder / f"{issuer or name}.key"))
        now = datetime.now(UTC)
        made = (x509.CertificateBuilder().subject_name(_name(name)).issuer_name(_name(issuer or name)).public_key(subject.public_key())
                .serial_number(x509.random_serial_number()).not_valid_before(now + timedelta(days=since_days))
                .not_valid_after(now + timedelta(days=until_days)).add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
                .add_extension(x509.KeyUsage(True, False, False, False, False, authority, authority, False, False), critical=True))
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        return self._write(f"{name}.crt", made.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _write(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    keys = Keys(tmp_path_factory.mktemp("keys"))
    keys.key("release")
    keys.key("other")
    return keys


@pytest.fixture(scope="module")
def trust(keys):
    return Trust(keys=(keys.public("release"),))


@pytest.fixture(scope="module")
def good(tmp_path_factory, keys):
    "A signed release: a bundle with examples, and the calibration of one asset."
    rng = np.random.default_rng(0)
    bundle = write_bundle(tmp_path_factory.mktemp("good"), b"a graph", CONTRACT, rng.normal(size=(6, 2, 64)), np.full((6, 1), np.nan))
    records = bundle.path.with_name(f"{bundle.digest}.calibration")
    records.mkdir()
    (records / "acme.lyon.hall-2.line-1.fan-1.calibration.json").write_bytes(b"{}")
    for folder in (bundle.path, records):
        sign(folder, key=keys.folder / "release.key")
    return bundle


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good.path, tmp_path / good.path.name))


def refused(call, kind=InvalidBundle) -> str:
    "The reason that it gave."
    with pytest.raises(kind) as caught:
        call()
    return caught.value.reason


# --- who signed


def test_what_was_signed_is_believed_under_any_name(copy, trust, keys):
    moved = copy.rename(copy.with_name("renamed"))
    assert verify(moved, trust) == Signer("key", keys.fingerprint("release"), "release.pub")
    assert load_bundle(moved).examples()[0].shape == (6, 2, 64)


def test_a_signature_is_not_part_of_the_digest_and_can_be_made_anew(copy, good, keys):
    sign(copy, key=keys.folder / "other.key")
    assert load_bundle(copy).digest == good.digest
    assert verify(copy, Trust(keys=(keys.public("release"), keys.public("other")))).subject == "other.pub"
    assert sorted(p.name for p in copy.parent.iterdir()) == [copy.name]


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_keys_of_the_three_curves_sign(copy, keys, curve):
    key = keys.key(curve.name, curve)
    sign(copy, key=key)
    assert verify(copy, Trust(keys=(keys.public(curve.name),))).fingerprint == keys.fingerprint(curve.name)


def signed_with_paths_to_pass_over(path: Path, keys) -> None:
    import model_signing

    (path / "run.sh").write_text("#!/bin/sh")
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[path / "run.sh", path / SIGNATURE])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys.folder / "release.key").set_hashing_config(hashing)
    config.sign(path, path / SIGNATURE)
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys.public("release")).verify(path, path / SIGNATURE)  # the library is content


def claims(change):
    "What makes a signature claim something else."
    def apply(path: Path, _) -> None:
        letter = json.loads((path / SIGNATURE).read_bytes())
        statement = json.loads(base64.b64decode(letter["dsseEnvelope"]["payload"]))
        change(statement["predicate"])
        letter["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
        (path / SIGNATURE).write_text(json.dumps(letter))
    return apply


BAD = {
    "a changed byte": (lambda p, k: (p / "model.onnx").write_bytes(b"a graPh"), UntrustedBundle, "changed"),
    "a missing file": (lambda p, k: (p / "windows.npy").unlink(), UntrustedBundle, "missing_file"),
    "an extra file": (lambda p, k: (p / "run.sh").touch(), UntrustedBundle, "extra_file"),
    "an extra file that the signature passes over": (signed_with_paths_to_pass_over, UntrustedBundle, "extra_file"),
    "git's files": (lambda p, k: (p / ".gitattributes").touch(), InvalidBundle, "wrong_name"),
    "no signature": (lambda p, k: (p / SIGNATURE).unlink(), UntrustedBundle, "unsigned"),
    "an empty signature": (lambda p, k: (p / SIGNATURE).write_bytes(b""), UntrustedBundle, "malformed_signature"),
    "a signature that nests": (lambda p, k: (p / SIGNATURE).write_bytes(b'{"a":' * 100_000), UntrustedBundle, "malformed_signature"),
    "a signature that is no text": (lambda p, k: (p / SIGNATURE).write_bytes(b"\xff\xfe"), UntrustedBundle, "malformed_signature"),
    "a huge signature": (lambda p, k: (p / SIGNATURE).write_bytes(b" " * 2**23), InvalidBundle, "too_large"),
    "somebody else's": (lambda p, k: sign(p, key=k.folder / "other.key"), UntrustedBundle, "untrusted"),
    "a statement that was changed": (claims(lambda p: p.update(more="words")), UntrustedBundle, "untrusted"),
    "a file of another folder": (claims(lambda p: p["resources"].append({"name": "../x", "algorithm": "sha256", "digest": "0" * 64})),
                                 UntrustedBundle, "escapes"),
    "links allowed": (claims(lambda p: p["serialization"].update(allow_symlinks=True)), UntrustedBundle, "malformed_signature"),
    "a weaker hash": (claims(lambda p: p["serialization"].update(hash_type="md5")), UntrustedBundle, "malformed_signature"),
    "a link in place of a file": (lambda p, k: ((p / "model.onnx").rename(p.parent / "m"), (p / "model.onnx").symlink_to(p.parent / "m")),
                                  InvalidBundle, "not_a_file"),
    "a folder in it": (lambda p, k: (p / "more").mkdir(), InvalidBundle, "not_a_file"),
    "a pipe": (lambda p, k: os.mkfifo(p / "pipe"), InvalidBundle, "not_a_file"),
    "a file of two gigabytes": (lambda p, k: os.truncate(p / "model.onnx", 2**31), InvalidBundle, "too_large"),
    "no folder": (lambda p, k: shutil.rmtree(p), InvalidBundle, "no_folder"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_was_not_signed_so_is_refused_with_its_own_reason(bad, copy, trust, keys):
    change, kind, reason = BAD[bad]
    change(copy, keys)
    with pytest.raises(InvalidBundle) as caught:
        verify(copy, trust)
    assert (type(caught.value), caught.value.reason) == (kind, reason)


def test_nothing_is_parsed_before_the_signature_holds(copy, trust, keys, tmp_path, monkeypatch):
    marker = tmp_path / "was read"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    for name in NAMES:
        (copy / name).write_bytes(pickle.dumps(Evil()))
    sign(copy, key=keys.folder / "other.key")
    import onnx

    def reached(*_, **__):
        raise AssertionError("a parser was reached")

    for owner, parser in ((np, "load"), (np, "frombuffer"), (Contract, "model_validate_json"), (onnx, "load"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(owner, parser, reached)
    assert refused(lambda: verify(copy, trust), UntrustedBundle) == "untrusted"
    assert not marker.exists()


def test_nobody_trusted_is_a_setting_to_correct(copy):
    with pytest.raises(InvalidConfig, match="nobody is trusted here") as caught:
        verify(copy, Trust())
    assert caught.value.reason == "no_trust"


def test_unsigned_bundles_run_only_where_that_is_said_and_a_false_signature_never(copy, keys):
    laptop = Trust(keys=(keys.public("release"),), unsigned=True)
    assert verify(copy, laptop).kind == "key"
    sign(copy, key=keys.folder / "other.key")
    assert refused(lambda: verify(copy, laptop)) == "untrusted"
    (copy / SIGNATURE).unlink()
    assert verify(copy, laptop) == verify(copy, Trust(unsigned=True)) == Signer("nobody", "", "")


def test_a_key_is_revoked_from_one_verification_to_the_next(copy, keys, tmp_path):
    file = tmp_path / "revoked"
    file.write_text("# nobody yet\n")
    trust = Trust(keys=(keys.public("release"),), revoked=file)
    assert verify(copy, trust).kind == "key"
    file.write_text(f"# lost on a train\n{keys.fingerprint('release').upper()}  # mia's laptop\n")
    assert refused(lambda: verify(copy, trust), UntrustedBundle) == "revoked"


@pytest.mark.parametrize("content,says", [(None, "can't be read"), (b"not a fingerprint\n", "line 1"), (b"\xff", "can't be read")])
def test_a_list_of_revoked_keys_that_cannot_be_read_stops_everything(copy, trust, tmp_path, content, says):
    file = tmp_path / "revoked"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidConfig, match=says):
        verify(copy, Trust(keys=trust.keys, revoked=file))


def test_an_authority_vouches_for_those_below_it_while_all_of_them_are_valid(copy, keys, tmp_path):
    root = keys.certificate("root", authority=True)
    between = keys.certificate("between", issuer="root", authority=True)
    leaf = keys.certificate("mia", issuer="between")
    sign(copy, key=keys.folder / "mia.key", certificate=leaf, chain=[between])
    trust = Trust(keys=(root,))
    assert verify(copy, trust) == Signer("certificate", keys.fingerprint("mia"), "CN=mia")
    revoked = tmp_path / "revoked"
    for name, reason in (("mia", "revoked"), ("between", "revoked"), ("root", "untrusted"), ("other", None)):
        revoked.write_text(keys.fingerprint(name))
        asked = Trust(keys=(root,), revoked=revoked)
        assert (verify(copy, asked).kind == "certificate") if reason is None else (refused(lambda t=asked: verify(copy, t)) == reason)
    sign(copy, key=keys.folder / "mia.key", certificate=leaf)  # without the one between nobody knows her
    assert refused(lambda: verify(copy, trust)) == "untrusted"


@pytest.mark.parametrize("days", [(-60, -1), (1, 60)], ids=["expired", "not yet valid"])
def test_a_certificate_is_believed_only_while_it_is_valid(copy, keys, days):
    root = keys.certificate("root", authority=True)
    leaf = keys.certificate("mia", issuer="root", since_days=days[0], until_days=days[1])
    sign(copy, key=keys.folder / "mia.key", certificate=leaf)
    assert refused(lambda: verify(copy, Trust(keys=(root,)))) == "expired"


def test_an_authority_that_has_expired_vouches_for_nobody(copy, keys):
    root = keys.certificate("old", authority=True, until_days=-1)
    sign(copy, key=keys.folder / "other.key", certificate=keys.certificate("other", issuer="old"))
    assert refused(lambda: verify(copy, Trust(keys=(root,)))) == "untrusted"
    keys.key("other")


def test_a_key_is_not_its_certificate_and_the_web_vouches_for_nobody(copy, keys, trust):
    sign(copy, key=keys.folder / "release.key")
    root = keys.certificate("root", authority=True)
    assert refused(lambda: verify(copy, Trust(keys=(root,)))) == "untrusted"
    leaf = keys.certificate("mia", issuer="root")
    sign(copy, key=keys.folder / "mia.key", certificate=leaf)
    assert refused(lambda: verify(copy, trust)) == "untrusted"


@pytest.mark.parametrize("what,says", [("release.key", "is a private key"), ("nowhere.pub", "can't be read"), ("text", "can't be read"), ("rsa", "another kind"),
                                       ("two", "2 certificates")])
def test_a_trusted_key_that_is_none_is_named(copy, keys, what, says):
    from cryptography.hazmat.primitives.asymmetric import rsa

    (keys.folder / "text").write_text("a key")
    public = rsa.generate_private_key(65537, 2048).public_key()
    (keys.folder / "rsa").write_bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    (keys.folder / "two").write_bytes(keys.certificate("root", authority=True).read_bytes() * 2)
    with pytest.raises(InvalidConfig, match=says):
        verify(copy, Trust(keys=(keys.folder / what,)))


def test_what_cannot_sign_says_so_and_leaves_the_old_signature(copy, keys, trust):
    leaf = keys.certificate("mia", issuer=None, authority=True)
    before = (copy / SIGNATURE).read_bytes()
    for wrong in ({}, {"key": keys.public("release")}, {"key": keys.folder / "nowhere"}, {"key": keys.folder / "release.key", "certificate": leaf},
                  {"certificate": leaf}, {"key": keys.folder / "release.key", "keyless": True}):
        with pytest.raises(InvalidInput):
            sign(copy, **wrong)
    assert (copy / SIGNATURE).read_bytes() == before and verify(copy, trust).kind == "key"


def test_keyless_signing_outside_of_ci_says_what_it_needs(copy, monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "BUILDKITE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PartMissing, match="keyless signing is for CI|need the network"):
        sign(copy, keyless=True)


def test_a_keyless_signature_is_believed_by_sigstore_or_not_at_all(copy, keys):
    sign(copy, key=keys.folder / "mia.key", certificate=keys.certificate("mia", authority=False))  # of its own making
    letter = json.loads((copy / SIGNATURE).read_bytes())
    (first,) = {c["rawBytes"] for c in letter["verificationMaterial"].pop("x509CertificateChain")["certificates"]}
    letter["verificationMaterial"]["certificate"] = {"rawBytes": first}
    (copy / SIGNATURE).write_text(json.dumps(letter))
    with pytest.raises((PartMissing, UntrustedBundle), match="need the network|nobody that is trusted"):  # without a network, and with one
        verify(copy, Trust(identities=("mia@acme.example@https://accounts.acme.example",)))
    assert refused(lambda: verify(copy, Trust(keys=(keys.public("release"),)))) == "untrusted"
    with pytest.raises(InvalidConfig, match="expected identity@issuer"):
        verify(copy, Trust(identities=("mia@acme.example",)))


# --- what is in it


def rewritten(good, tmp_path, **files: bytes) -> Path:
    "A bundle with other contents, under the digest of these."
    folder = Path(shutil.copytree(good.path, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"))
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder.rename(tmp_path / contents_digest(file_hashes(folder)))


def npy(shape="(6, 2, 64)", kind="<f4", data=b"\0" * 6 * 2 * 64 * 4) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n" + data


def newer(contract: dict) -> bytes:
    return json.dumps({**contract, "schema_version": 2, "what_we_do_not_know": 1}).encode()


WRONG = {
    "a newer schema": ({"bundle_json": newer(CONTRACT.model_dump(mode="json"))}, "newer_schema"),
    "a newer schema with nothing we know": ({"bundle_json": b'{"schema_version": 7}'}, "newer_schema"),
    "no JSON": ({"bundle_json": b"\x00\xff"}, "wrong_fields"),
    "a list": ({"bundle_json": b"[1]"}, "wrong_fields"),
    "JSON that nests": ({"bundle_json": b"[" * 2**19}, "wrong_fields"),
    "a number too large": ({"bundle_json": b'{"schema_version": ' + b"9" * 5000 + b"}"}, "wrong_fields"),
    "a contract too large": ({"bundle_json": b" " * 2**21}, "too_large"),
    "an array of doubles": ({"windows_npy": npy(kind="<f8")}, "wrong_examples"),
    "an array of objects": ({"windows_npy": npy(kind="|O", data=pickle.dumps(print))}, "wrong_examples"),
    "an array that says it is huge": ({"windows_npy": npy(shape=f"({2**60}, 2, 64)")}, "wrong_examples"),
    "an array of other windows": ({"windows_npy": npy(shape="(12, 1, 64)")}, "wrong_examples"),
    "an array cut short": ({"windows_npy": npy()[:-4]}, "wrong_examples"),
    "an array with something behind it": ({"windows_npy": npy() + b"\0\0\0\0"}, "wrong_examples"),
    "an array with NaN": ({"windows_npy": npy(data=np.full(6 * 2 * 64, np.nan, "<f4").tobytes())}, "wrong_examples"),
    "no array": ({"windows_npy": b""}, "wrong_examples"),
    "a row of conditions too few": ({"conditions_npy": npy(shape="(5, 1)", data=b"\0" * 20)}, "wrong_examples"),
    "infinite conditions": ({"conditions_npy": npy(shape="(6, 1)", data=np.full(6, np.inf, "<f4").tobytes())}, "wrong_examples"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_contents_that_cannot_be_are_refused_with_their_own_reason(wrong, good, tmp_path):
    files, reason = WRONG[wrong]
    assert refused(lambda: load_bundle(rewritten(good, tmp_path, **files))) == reason


def test_an_array_written_by_hand_as_numpy_would_is_read(good, tmp_path):
    np.save(tmp_path / "expected.npy", np.zeros((6, 2, 64), "<f4"))
    found = load_bundle(rewritten(good, tmp_path, windows_npy=(tmp_path / "expected.npy").read_bytes())).examples()[0]
    assert found.shape == (6, 2, 64) and found.dtype == np.float32


@pytest.mark.parametrize("examples", [np.zeros((4, 3, 64)), np.zeros((4, 2, 63)), np.zeros((0, 2, 64)), np.full((4, 2, 64), np.nan)])
def test_examples_that_are_not_the_contracts_are_not_written(tmp_path, examples):
    assert refused(lambda: write_bundle(tmp_path, b"a graph", CONTRACT, examples)) == "wrong_examples"
    assert not list(tmp_path.iterdir())


def test_examples_may_come_without_their_conditions(tmp_path):
    windows, conditions = write_bundle(tmp_path, b"a graph", CONTRACT, np.ones((2, 2, 64))).examples()
    assert windows.shape == (2, 2, 64) and conditions is None
    assert write_bundle(tmp_path, b"a graph", CONTRACT).examples() is None


@pytest.mark.parametrize("content,reason", [(None, "missing_file"), (b'{"schema_version": 2}', "newer_schema"), (b"{}", "wrong_fields"),
                                            (b" " * (2**24 + 1), "too_large")])
def test_a_calibration_record_that_cannot_be_read_says_why(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "record.json").write_bytes(content)
    assert refused(lambda: read_record(tmp_path / "record.json")) == reason


# --- fuzzed


@st.composite
def mutations(draw):
    "What an accident or somebody with bad intentions may do to a file in a bundle."
    how = draw(st.sampled_from(["flip", "truncate", "append", "add", "remove", "rename", "link", "folder", "swap"]))
    name = draw(st.sampled_from([*NAMES, SIGNATURE]))
    at, more = draw(st.integers(0, 2**16)), draw(st.binary(min_size=1, max_size=40))
    other = draw(st.sampled_from([*NAMES, SIGNATURE, "model.onnx.data", "Model.onnx", "model.onnx ", "\u202emodel", "x" * 200]))

    def apply(folder: Path) -> None:
        file, data = folder / name, (folder / name).read_bytes()
        if how in ("rename", "swap") and (folder / other).is_dir():
            return
        if how == "flip":
            place = at % len(data)
            file.write_bytes(data[:place] + bytes([data[place] ^ (1 << at % 8)]) + data[place + 1:])
        elif how == "truncate":
            file.write_bytes(data[: at % len(data)])
        elif how == "append":
            file.write_bytes(data + more)
        elif how == "add" and not (folder / other).exists():
            (folder / other).write_bytes(more)
        elif how == "remove":
            file.unlink()
        elif how == "rename":
            file.rename(folder / other)
        elif how == "link":
            file.unlink()
            file.symlink_to(folder.parent / "elsewhere")
        elif how == "folder":
            file.unlink()
            file.mkdir()
        elif how == "swap":
            (folder / other).write_bytes(data)

    return how, name, other, apply


@given(changes=st.lists(mutations(), min_size=1, max_size=2))
def test_a_bundle_that_was_changed_in_any_way_is_refused_and_nothing_breaks(good, trust, tmp_path_factory, changes):
    folder = Path(shutil.copytree(good.path, tmp_path_factory.mktemp("fuzz") / good.digest))
    (folder.parent / "elsewhere").write_bytes((folder / "model.onnx").read_bytes())
    for _, name, _, apply in changes:
        if (folder / name).is_file() and not (folder / name).is_symlink() and (folder / name).stat().st_size:
            apply(folder)
    try:
        same = file_hashes(folder).items() - {SIGNATURE: file_hashes(folder).get(SIGNATURE)}.items() == \
            file_hashes(good.path).items() - {SIGNATURE: file_hashes(good.path)[SIGNATURE]}.items()
    except InvalidBundle:
        same = False
    for call in (lambda: load_bundle(folder), lambda: verify(folder, trust)):
        try:
            call()
        except InvalidBundle:
            continue
        assert same  # only the signature was touched: where it doesn't matter, or not at all
    shutil.rmtree(folder.parent)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3), max_leaves=5)
fields = st.dictionaries(st.sampled_from([*Contract.model_fields, "more"]), json_values, max_size=4)


PLACES = ["mediaType", "verificationMaterial", "verificationMaterial.publicKey", "verificationMaterial.publicKey.hint", "verificationMaterial.certificate",
          "verificationMaterial.x509CertificateChain", "dsseEnvelope", "dsseEnvelope.payload", "dsseEnvelope.payloadType", "dsseEnvelope.signatures",
          "dsseEnvelope.signatures.0", "dsseEnvelope.signatures.0.sig", "dsseEnvelope.signatures.0.keyid"]
harmless = ("mediaType", "dsseEnvelope.signatures.0.keyid")  # nobody reads these


@given(place=st.sampled_from(PLACES), value=json_values | st.just({"certificates": [{"rawBytes": "MAA="}]}) | st.just({"rawBytes": "MAA="}))
def test_a_signature_that_was_changed_anywhere_is_refused_and_nothing_breaks(good, trust, tmp_path_factory, place, value):
    folder = Path(shutil.copytree(good.path, tmp_path_factory.mktemp("fuzz") / good.digest))
    letter = json.loads((folder / SIGNATURE).read_bytes())
    *way, last = (int(step) if step.isdigit() else step for step in place.split("."))
    inner = letter
    for step in way:
        inner = inner[step]
    inner[last] = value
    (folder / SIGNATURE).write_text(json.dumps(letter))
    try:
        assert verify(folder, trust).subject == "release.pub" and (place in harmless or value is None)
    except UntrustedBundle as e:
        assert e.reason in ("malformed_signature", "untrusted", "not_for_signing")
    shutil.rmtree(folder.parent)


@given(change=fields, raw=st.binary(max_size=60) | st.none())
def test_any_contract_is_read_or_refused(good, tmp_path_factory, change, raw):
    data = json.dumps({**CONTRACT.model_dump(mode="json"), **change}).encode() if raw is None else raw
    try:
        assert load_bundle(rewritten(good, tmp_path_factory.mktemp("fuzz"), bundle_json=data)).contract.schema_version == 1
    except InvalidBundle as e:
        assert e.reason in ("wrong_fields", "newer_schema", "wrong_examples")


@given(data=st.binary(max_size=400) | st.builds(lambda head, rest: b"\x93NUMPY" + head + rest, st.binary(min_size=2, max_size=4), st.binary(max_size=200)))
def test_any_array_is_read_or_refused(good, tmp_path_factory, data):
    assert refused(lambda: load_bundle(rewritten(good, tmp_path_factory.mktemp("fuzz"), windows_npy=data))) == "wrong_examples"


# --- on the way


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    server = servers.Registry(tmp_path_factory.mktemp("registry"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def locked_registry(tmp_path_factory):
    server = servers.Registry(tmp_path_factory.mktemp("registry"), login=True)
    yield server
    server.close()


@pytest.fixture(params=["file", "memory", "oci-layout", "oci", "mlflow"])
def place(request, tmp_path):
    "A URL to publish at."
    if request.param in ("file", "oci-layout"):
        return f"{request.param}:{tmp_path / 'place'}"
    if request.param == "memory":
        return f"memory://{tmp_path}/place"
    return request.getfixturevalue({"oci": "registry", "mlflow": "mlflow_server"}[request.param]).url


def test_a_release_arrives_as_it_was_published(place, good, trust, keys, tmp_path):
    push(good.path, place)
    found = fetch(place, good.digest, tmp_path / "edge")
    for ours, theirs in ((found, good.path), (Path(f"{found}.calibration"), Path(f"{good.path}.calibration"))):
        assert file_hashes(ours) == file_hashes(theirs) and verify(ours, trust).kind == "key"
    assert load_bundle(found).digest == good.digest
    assert refused(lambda: fetch(place, "ab" * 32, tmp_path / "edge")) == "not_found"
    assert refused(lambda: fetch(place, good.digest, tmp_path / "small", most_bytes=1000)) == "too_large"
    assert sorted(p.name for p in (tmp_path / "edge").iterdir()) == [".fetching", good.digest, f"{good.digest}.calibration"]
    assert [p.name for p in (tmp_path / "small").iterdir()] == [".fetching"]


def test_a_release_that_is_signed_anew_is_fetched_anew(place, copy, good, keys, tmp_path):
    push(good.path, place)
    fetch(place, good.digest, tmp_path / "edge")
    sign(copy, key=keys.folder / "other.key")
    push(copy, place)
    other = Trust(keys=(keys.public("other"),))
    assert refused(lambda: verify(fetch(place, good.digest, tmp_path / "edge"), other)) == "untrusted"
    assert verify(fetch(place, good.digest, tmp_path / "edge", anew=True), other).kind == "key"


def test_what_is_there_needs_no_network_and_what_was_damaged_is_fetched_again(good, tmp_path):
    found = fetch(f"file:{good.path.parent}", good.digest, tmp_path)
    nowhere = f"oci://127.0.0.1:{servers.free_port()}/plant/bundles"
    assert fetch(nowhere, good.digest, tmp_path) == found
    (found / "model.onnx").write_bytes(b"a graPh")
    with pytest.raises(PartMissing, match="can't be had"):
        fetch(nowhere, good.digest, tmp_path)
    assert load_bundle(fetch(f"file:{good.path.parent}", good.digest, tmp_path)).digest == good.digest


@pytest.mark.parametrize("url", ["oci://127.0.0.1:{}/plant/bundles", "mlflow+http://127.0.0.1:{}/fan_motor", "file:/nowhere/at/all", "oci-layout:/nowhere/at/all",
                                 "s3://bucket/bundles"])
def test_a_place_that_cannot_be_reached_is_a_part_missing(url, good, tmp_path):
    with pytest.raises(PartMissing):
        fetch(url.format(servers.free_port()), good.digest, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["ftp://host/bundles", "oci://registry", "oci://registry/repository", "mlflow+https://host", "file:", "mlflow+https://u:p@host/model"])
def test_a_url_that_leads_nowhere_is_named(url, tmp_path):
    with pytest.raises(InvalidConfig):
        fetch(url, "ab" * 32, tmp_path)


def test_a_registry_that_wants_a_login_gets_dockers_or_the_environments(locked_registry, good, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(PartMissing):
        push(good.path, locked_registry.url)
    monkeypatch.setenv("ORAS_USER", locked_registry.user)
    monkeypatch.setenv("ORAS_PASS", locked_registry.password)
    push(good.path, locked_registry.url)
    monkeypatch.delenv("ORAS_USER")
    login = base64.b64encode(f"{locked_registry.user}:{locked_registry.password}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {f"127.0.0.1:{locked_registry.port}": {"auth": login}}}))
    assert load_bundle(fetch(locked_registry.url, good.digest, tmp_path / "edge")).digest == good.digest


def test_an_image_or_a_name_that_climbs_out_is_no_bundle(good, tmp_path):
    layout = OciLayout(tmp_path / "layout")
    layout.put(good.digest, {f"{good.digest}/model.onnx": good.onnx, f"{good.digest}/../../x": good.onnx})
    assert refused(lambda: fetch(f"oci-layout:{layout.folder}", good.digest, tmp_path / "edge")) == "wrong_name"
    index = layout.folder / "index.json"
    (entry,) = json.loads(index.read_bytes())["manifests"]
    manifest = layout.folder / "blobs/sha256" / entry["digest"].removeprefix("sha256:")
    manifest.write_bytes(manifest.read_bytes().replace(b"application/vnd.predmaint.file.v1", b"application/vnd.oci.image.layer.v1.tar+gzip"))
    assert refused(lambda: fetch(f"oci-layout:{layout.folder}", good.digest, tmp_path / "edge")) == "wrong_manifest"
    index.write_text("[]")
    assert refused(lambda: fetch(f"oci-layout:{layout.folder}", good.digest, tmp_path / "edge")) == "wrong_manifest"


def test_a_blob_that_is_not_what_its_name_says_is_refused(good, tmp_path):
    push(good.path, f"oci-layout:{tmp_path / 'layout'}")
    blob = tmp_path / "layout/blobs/sha256" / hashlib.sha256(b"{}").hexdigest()  # the calibration's file has the same contents as the empty config
    blob.write_bytes(b"[]")
    assert refused(lambda: fetch(f"oci-layout:{tmp_path / 'layout'}", good.digest, tmp_path / "edge")) == "wrong_digest"


def test_a_link_in_a_folder_is_not_followed_and_not_published(copy, good, tmp_path):
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").symlink_to(good.onnx)
    assert refused(lambda: fetch(f"file:{copy.parent}", good.digest, tmp_path / "edge")) == "not_a_file"
    assert refused(lambda: push(copy, f"file:{tmp_path / 'place'}")) == "wrong_digest"


def test_an_answer_that_would_have_to_be_unpacked_is_refused():
    class Packed(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = gzip.compress(b"[" * 2**20)
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Packed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        host = f"127.0.0.1:{server.server_port}"
        for here in (MlflowModel(f"mlflow+http://{host}/model"), OciRegistry(f"oci://{host}/repository")):
            assert refused(partial(here.files, "ab" * 32)) == "compressed"
        server.shutdown()
        thread.join()


CHILD = """
import atexit, os, resource, signal, sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pdm.model.registries import Remote
from pdm.model.transport import fetch_from

class Dies:
    def read(self, size):
        os.kill(os.getpid(), signal.SIGKILL)

source, folder, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
files = {f"{source.name}/{p.name}": Remote(partial(p.open, "rb")) for p in sorted(source.iterdir())}
if what == "killed":
    files[f"{source.name}/windows.npy"] = Remote(partial(nullcontext, Dies()))
else:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most[1]))
    atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, most)  # whoever measures coverage writes at the end
fetch_from(files, source.name, folder)
"""


def test_a_fetch_that_is_killed_leaves_nothing_to_be_seen_and_the_next_one_clears_it_away(good, tmp_path):
    done = subprocess.run([sys.executable, "-c", CHILD, good.path, tmp_path, "killed"])
    assert done.returncode == -9
    assert [p.name[:10] for p in sorted(tmp_path.iterdir()) if p.is_dir()] == [".fetching-"]
    fetch(f"file:{good.path.parent}", good.digest, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [good.digest, f"{good.digest}.calibration"]


def test_a_disk_that_is_full_is_a_part_missing_and_leaves_nothing(good, tmp_path):
    done = subprocess.run([sys.executable, "-c", CHILD, good.path, tmp_path, "full"], capture_output=True, text=True)
    assert "PartMissing" in done.stderr.splitlines()[-1] and "check the space left" in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".fetching"]


def test_two_who_fetch_the_same_do_not_disturb_each_other(good, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(f"file:{good.path.parent}", good.digest, tmp_path, anew=True))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [tmp_path / good.digest] * 6 and load_bundle(found[0]).digest == good.digest


# --- the command line


def test_the_command_line_signs_verifies_shows_and_compares_with_exit_codes(copy, keys, tiny_bundle, make_bundle, tmp_path):
    def predmaint(*words):
        env = {**os.environ, "PREDMAINT_TRUSTED_KEYS": json.dumps([str(keys.public("other"))])}
        done = subprocess.run([sys.executable, "-m", "pdm.cli", "bundle", *map(str, words)], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout or done.stderr

    code, said = predmaint("verify", copy)
    assert code == 3 and "signed by nobody that is trusted here" in said
    assert predmaint("verify", copy, "--key", keys.public("release"))[0] == 0
    assert predmaint("sign", copy / "model.onnx", "--key", keys.folder / "other.key")[0] == 0
    code, said = predmaint("show", copy, "--json")
    assert code == 0 and json.loads(said)["signed_by"].startswith("other.pub") and json.loads(said)["contract"]["name"] == "motor"
    assert predmaint("sign", copy)[0] == 1
    assert predmaint("diff", copy, copy)[0] == 1  # its graph is none
    assert "the same" in predmaint("diff", tiny_bundle.path, tiny_bundle.path)[1]
    assert "changed: 1" in predmaint("diff", tiny_bundle.path, make_bundle(gain=2.0).path)[1]
    (copy / "run.sh").touch()
    assert predmaint("verify", copy)[0] == 3 and predmaint("show", copy)[0] == 1 and predmaint("verify", tmp_path / "nowhere")[0] == 1


def test_records_of_another_bundle_do_not_pass_for_this_ones(good, tmp_path):
    from pdm.model.bundle import CalibrationRecord, records_of

    bundle = load_bundle(shutil.copytree(good.path, tmp_path / good.digest))
    records = tmp_path / f"{good.digest}.calibration"
    records.mkdir()
    (records / "calibration.json").write_text(CalibrationRecord(
        model="ab" * 32, hop_s=10, scores_db=(0.0, 1.0), centre_db=0, threshold_db=1, confirmations=3, spacing_s=10, exceedance=0.05,
        false_alarms_per_day=1, supported=True, quiet_s=60, gap_s=60).to_json())
    assert refused(lambda: records_of(bundle)) == "wrong_digest"
