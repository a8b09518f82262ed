"""The installer of a site, run for real on a Debian made by mmdebstrap: what needs a board or systemd is stood in for by name (bootstrap_stand_ins.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bootstrap_stand_ins import FRESH, K3S, write
from edge_images import BASE, podman, run, settings
from servers import need

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(900)  # the base may have to be made first, and others may be building images meanwhile
BOOTSTRAP = ROOT / "edge/bootstrap"
VERSION = "v0.0.0+k3s1"
SITE = f"K3S_VERSION={VERSION}\nADMIN_NETWORKS=10.20.0.0/24 fd00:20::/64\nSENSOR_NETWORKS=10.30.0.0/24\nNTP_SERVERS=10.20.0.1\nMIN_MEMORY_MB=100\n"

# what stands in a tree: kind, mode, and contents (of the distribution's own files when they were written); not what lives in memory, nor the log
TREE = """
import hashlib, json, os, stat, sys
found = {}
for top, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(top, f) not in {"/proc", "/sys", "/dev", "/run", "/tmp", "/out", "/stand-in", "/site", "/var/log"}]
    for name in folders + files:
        path = os.path.join(top, name)
        s = os.lstat(path)
        what = os.readlink(path) if stat.S_ISLNK(s.st_mode) else ""
        if stat.S_ISREG(s.st_mode):
            ours = path.startswith(("/etc/", "/usr/local/", "/var/", "/opt/"))
            what = hashlib.sha256(open(path, "rb").read()).hexdigest() if ours else f"{s.st_size} {s.st_mtime_ns}"
        found[path] = [oct(s.st_mode), what]
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def base():
    "A Debian that podman can run."
    if os.geteuid():
        pytest.skip("only root can hold the installer in a container")
    settings()
    return BASE


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    "Where K3s' releases are: one release, whose program is a stand-in."
    top = tmp_path_factory.mktemp("releases")
    folder = top / VERSION
    folder.mkdir()
    for program, images, arch in (("k3s-arm64", "k3s-airgap-images-arm64.tar.zst", "arm64"), ("k3s", "k3s-airgap-images-amd64.tar.zst", "amd64")):
        (folder / program).write_text(K3S)
        (folder / images).write_bytes(os.urandom(1000))
        (folder / f"sha256sum-{arch}.txt").write_text(sums(folder, program, images))
    return top


def sums(folder: Path, *names: str) -> str:
    return subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout


def prepare(release: Path, out: Path, *words, installer: Path = BOOTSTRAP) -> subprocess.CompletedProcess:
    return run(installer / "prepare-bundle.sh", "--out", out, "--k3s", VERSION, "--releases", release.as_uri(), *words)


@pytest.fixture(scope="module")
def bundle(release, tmp_path_factory):
    need("curl", "curl")
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    done = prepare(release, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Machine:
    "A fresh machine for each script: what it said, its exit codes, and its tree wherever the script says `tree NAME`."

    def __init__(self, base: str, folder: Path):
        self.base, self.folder = base, folder
        write(folder / "stand-in")
        for name in ("out", "modules", "cgroup"):
            (folder / name).mkdir()
        (folder / "cgroup/cgroup.controllers").touch()
        (folder / "tree.py").write_text(TREE)

    def run(self, script: str, bundle: Path | None = None, site: str = SITE, held: str = "--cap-add=sys_admin") -> list[tuple[int, str]]:
        "Runs a script in which `install WORDS` is the installer; gives back exit code and words of each."
        f = self.folder
        (f / "site.env").write_text(site)
        text = (f'export PATH=/stand-in:$PATH; n=0; tree() {{ python3 /site/tree.py "/out/$1.json"; }}\n'
                'install() { n=$((n + 1)); /opt/bootstrap/install.sh --env /site/site.env "$@" >/out/said.$n 2>&1 && echo 0 >/out/code.$n || echo $? >/out/code.$n; }\n'
                f"{FRESH}\n{script}\n")
        (f / "script").write_text(text.replace("/opt/bootstrap", "/stick/installer" if bundle else "/opt/bootstrap"))
        volumes = [f"{f}/stand-in:/stand-in:ro", f"{f}/out:/out", f"{f}/modules:/sys/module", f"{f}/cgroup:/sys/fs/cgroup:ro", f"{f}:/site:ro",
                   f"{BOOTSTRAP}:/opt/bootstrap:ro", *([f"{bundle}:/stick"] if bundle else [])]
        podman("run", "--rm", "--network=none", held, *(f"--volume={v}" for v in volumes), self.base, "bash", "-e", "/site/script")
        return [(int((f / f"out/code.{i}").read_text()), (f / f"out/said.{i}").read_text()) for i in range(1, len(list(f.glob("out/code.*"))) + 1)]

    def tree(self, name: str) -> dict[str, list[str]]:
        return json.loads((self.folder / f"out/{name}.json").read_text())

    def changed(self, before: str, after: str) -> set[str]:
        a, b = self.tree(before), self.tree(after)
        return {path for path in a.keys() | b.keys() if a.get(path) != b.get(path)}


@pytest.fixture
def machine(base, tmp_path):
    return Machine(base, tmp_path)


def test_the_scripts_are_clean_by_shellcheck():
    (shellcheck,) = need("shellcheck", "shellcheck")
    done = run(shellcheck, "-x", *sorted(BOOTSTRAP.glob("*.sh")), *sorted(BOOTSTRAP.glob("files/*.sh")))
    assert done.returncode == 0, done.stdout


def test_a_check_of_a_fresh_board_says_what_is_missing_and_changes_nothing(machine, bundle):
    ((code, said),) = machine.run("tree before; install --check --offline /stick; tree after", bundle)
    assert code == 3 and not machine.changed("before", "after")
    missing = [line.removeprefix("missing  ") for line in said.splitlines() if line.startswith("missing")]
    for what in ("a place for data: /dev/nvme0n1: /dev/nvme0n1 is blank: give --format-nvme", "power mode 25W", "the folder /var/lib/predmaint",
                 "a service that keeps the time", "kernel parameters", "the firewall: 8883 for 10.30.0.0/24", "the container runtime in CSV mode",
                 f"K3s {VERSION}", "K3s runs", "the node is ready"):
        assert any(line.startswith(what) for line in missing), f"{what}\n{said}"
    assert "ok       JetPack 6.2: L4T 36.4.3" in said


def test_a_dry_run_prints_its_commands_and_changes_nothing(machine, bundle):
    ((code, said),) = machine.run("tree before; install --dry-run --offline /stick --format-nvme; tree after", bundle)
    assert code == 0 and not machine.changed("before", "after"), said
    for command in ("mkfs.ext4 -q -L predmaint -m 1 /dev/nvme0n1", "mount /var/lib/predmaint", "nvpmodel -m 1", "systemctl reload-or-restart predmaint-firewall.service",
                    "install -D -m 755 /stick/k3s/k3s-arm64 /usr/local/bin/k3s", "nvidia-ctk cdi generate --mode=csv --output=/etc/cdi/nvidia.yaml"):
        assert f"         {command}\n" in said, f"{command}\n{said}"


def test_an_installation_is_whole_and_a_second_one_changes_nothing_and_uninstall_gives_the_machine_back(machine, bundle):
    first, second, check, off, purge = machine.run("""
        tree fresh
        install --offline /stick --format-nvme; tree first
        install --offline /stick; tree second
        install --check --offline /stick
        cp -r /etc/predmaint /etc/fstab /etc/rancher/k3s /out; cp /etc/modules-load.d/predmaint.conf /out/modules.conf; nvpmodel -q >/out/power
        install uninstall; tree kept; nvpmodel -q >/out/power-after
        install uninstall --purge-data; tree gone""", bundle)
    assert first[0] == 0, first[1]
    assert second[0] == 0 and "doing" not in second[1] and not machine.changed("first", "second"), second[1]
    assert check[0] == 0 and "all is as it should be" in check[1] and "missing" not in check[1], check[1]

    tree, out = machine.tree("first"), machine.folder / "out"
    assert tree["/usr/local/bin/k3s"][0] == "0o100755" and tree["/etc/rancher/k3s/config.yaml"][0] == "0o100600"
    assert "/var/lib/predmaint/k3s/agent/images/k3s-airgap-images-arm64.tar.zst" in tree and tree["/usr/local/bin/kubectl"][1] == "k3s"
    assert "UUID=3e9f3cba-0000-4000-8000-5f0e6a3b7c1d /var/lib/predmaint ext4 " in (out / "fstab").read_text()
    assert "disable: [traefik, metrics-server]" in (out / "k3s/config.yaml.d/site.yaml").read_text() and "25W" in (out / "power").read_text()
    assert "15W" in (out / "power-after").read_text()
    assert "-s fd00:20::/64 -p tcp --dport 6443" in (out / "predmaint/firewall.v6").read_text()
    assert "10." not in (out / "predmaint/firewall.v6").read_text()
    assert "/var/lib/predmaint/k3s/agent/images/.cache.json" in tree and "/etc/modprobe.d/predmaint.conf" not in tree  # iptables' nft variant works here
    assert "disable-network-policy" not in (out / "k3s/config.yaml.d/site.yaml").read_text()
    modules = (out / "modules.conf").read_text().split()
    assert modules[:2] == ["br_netfilter", "overlay"] and "xt_set" in modules and "xt_limit" not in modules  # the stand-in has no xt_limit

    assert off[0] == 0 and purge[0] == 0, off[1] + purge[1]
    kept = machine.changed("fresh", "kept")
    assert {path for path in kept if not path.startswith("/var/lib/predmaint")} == {"/etc/fstab"}, kept
    assert not machine.changed("fresh", "gone")


def test_a_real_drive_gets_a_filesystem_only_where_it_is_blank_and_is_found_again(machine, bundle, tmp_path):
    for program in ("lsblk", "blkid", "mkfs.ext4", "mount", "umount", "mountpoint"):
        (machine.folder / "stand-in" / program).unlink()
    with open(tmp_path / "drive", "wb") as drive:
        drive.truncate(100_000_000)
    loop = run("losetup", "--find", "--show", tmp_path / "drive")
    if loop.returncode:
        pytest.skip("no loop devices here")
    device = loop.stdout.strip()
    try:
        other, yes, kept, back, gone = machine.run(f"""
            mkswap -q {device}; sha256sum {device} >/out/before; install --offline /stick --format-nvme; sha256sum {device} >/out/after; wipefs -q --all {device}
            install --offline /stick --format-nvme; findmnt -no SOURCE,OPTIONS /var/lib/predmaint >/out/mounted; cp /etc/fstab /out; blkid -o value -s UUID {device} >/out/uuid
            echo precious >/var/lib/predmaint/volume; install uninstall; umount /var/lib/predmaint
            install --offline /stick; cat /var/lib/predmaint/volume >/out/volume
            install uninstall --purge-data; grep -c predmaint /etc/fstab >/out/listed || true""",
            bundle, SITE + f"DATA_DEVICE={device}\nMIN_DISK_GB=0\n", held="--privileged")
    finally:
        run("losetup", "--detach", device)
    out = machine.folder / "out"
    assert other[0] == 2 and "holds something (TYPE=swap), and is not touched" in other[1] and (out / "before").read_text() == (out / "after").read_text()
    assert yes[0] == 0 and (out / "mounted").read_text().startswith(f"{device} rw,nosuid,nodev,noatime"), yes[1]
    assert f"UUID={(out / 'uuid').read_text().strip()} /var/lib/predmaint ext4" in (out / "fstab").read_text()
    assert kept[0] == 0 and back[0] == 0 and "mkfs.ext4 -q" not in back[1] and (out / "volume").read_text() == "precious\n", back[1]
    assert gone[0] == 0 and (out / "listed").read_text() == "0\n", gone[1]


def test_a_kernel_without_nft_compat_gets_legacy_iptables_and_back(machine, bundle):
    check, first, second, _ = machine.run("""touch /run/stand-in/no-nft-compat; tree fresh
        install --check --offline /stick --format-nvme; install --offline /stick --format-nvme; ls /run/stand-in >/out/during; cat /etc/modprobe.d/predmaint.conf >/out/modprobe; install --offline /stick
        install uninstall --purge-data; ls /run/stand-in >/out/after; tree gone""", bundle)
    assert first[0] == 0 and second[0] == 0 and "doing" not in second[1], first[1] + second[1]
    assert "missing  the module nf_tables away" in check[1]
    during = (machine.folder / "out/during").read_text().split()
    assert "iptables-legacy" in during and "iptables-legacy" not in (machine.folder / "out/after").read_text().split()
    # the probe of the nft variant has loaded nf_tables, with which the balancer would fail
    assert "modprobe -r nft_chain_nat nf_tables" in first[1] and "nf_tables" not in during
    assert "install nf_tables /bin/false\n" in (machine.folder / "out/modprobe").read_text()
    assert not machine.changed("fresh", "gone")


def test_a_kernel_known_to_lack_nft_compat_is_not_made_to_load_nf_tables(machine, bundle):
    ((code, said),) = machine.run("touch /run/stand-in/no-nft-compat; mkdir -p /lib/modules/$(uname -r); install --offline /stick --format-nvme", bundle)
    assert code == 0 and "modprobe -r" not in said and "update-alternatives --set iptables /usr/sbin/iptables-legacy" in said, said


def test_nf_tables_in_use_asks_for_a_restart_after_which_it_stays_away(machine, bundle):
    first, second = machine.run("""touch /run/stand-in/no-nft-compat /run/stand-in/nf_tables-held; install --offline /stick --format-nvme
        test -f /etc/modprobe.d/predmaint.conf; rm /run/stand-in/nf_tables; install --offline /stick""", bundle)
    assert first[0] == 2 and "restart this machine, and run this again" in first[1], first[1]
    assert second[0] == 0, second[1]


def test_network_policies_that_the_kernel_can_not_do_are_given_up_by_name_only(machine, bundle):
    lack = "sets of the kind hash:net,port"
    refused, done = machine.run(f"""echo '{lack}' >/run/stand-in/lacks; tree before; install --offline /stick --format-nvme; tree after
        sed 's/^FIREWALL=.*//' /site/site.env >/tmp/without.env; echo NETWORK_POLICIES=no >>/tmp/without.env
        install --env /tmp/without.env --offline /stick --format-nvme; cp /etc/rancher/k3s/config.yaml.d/site.yaml /out""", bundle)
    assert refused[0] == 2 and f"a kernel that can do network policies: it lacks {lack}" in refused[1] and not machine.changed("before", "after"), refused[1]
    assert done[0] == 0 and "disable-network-policy: true" in (machine.folder / "out/site.yaml").read_text(), done[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces want root")
@pytest.mark.parametrize("iptables", ["iptables-nft", "iptables-legacy"])
def test_the_probe_of_policies_leaves_nothing_and_says_what_a_kernel_lacks(iptables):
    need("iptables iproute2", iptables)
    probe = BOOTSTRAP / "probe_policies.py"
    before = run(iptables, "-S").stdout
    said = run(sys.executable, probe, iptables)
    assert said.returncode == 0
    if said.stdout:
        pytest.skip(f"this kernel lacks {said.stdout}")
    code = f"import sys; sys.path.insert(0, '{BOOTSTRAP}'); import probe_policies as p; p.SETS += ('hash:nobody',); p.RULES += ('-m nobody -j ACCEPT',); print(p.lacks('{iptables}'))"
    more = run(sys.executable, "-B", "-c", code)
    assert more.stdout == f"['sets of the kind hash:nobody', '{iptables} -m nobody -j ACCEPT']\n", more.stderr
    assert run(iptables, "-S").stdout == before


def test_a_k3s_of_somebody_else_is_neither_taken_over_nor_taken_away(machine, bundle):
    first, off = machine.run("""printf '#!/bin/sh\n' >/usr/local/bin/k3s; mkdir -p /etc/rancher/k3s /var/lib/rancher/k3s; echo '[Unit]' >/etc/systemd/system/k3s.service
        ln -s k3s /usr/local/bin/kubectl; tree before; install --offline /stick --format-nvme; install uninstall; tree after""", bundle)
    assert first[0] == 2 and "no other K3s: it was not installed by this script" in first[1] and off[0] == 0
    assert not machine.changed("before", "after")


def test_a_damaged_bundle_is_refused_before_anything_is_changed(machine, bundle, tmp_path):
    for name in ("damaged", "more", "less"):
        shutil.copytree(bundle, tmp_path / name)
    (tmp_path / "damaged/k3s/k3s-arm64").write_text(K3S + "curl evil\n")
    (tmp_path / "more/images/stowaway.tar").write_bytes(b"x")
    (tmp_path / "less/k3s/k3s-airgap-images-arm64.tar.zst").unlink()
    said = machine.run("tree before; for b in damaged more less; do install --offline /site/$b --format-nvme; done; install --offline /stick --format-nvme --sha256 "
                       f"{'0' * 64}; tree after", bundle)
    assert [code for code, _ in said] == [3] * 4 and not machine.changed("before", "after")
    assert "k3s-arm64: FAILED" in said[0][1] and "nothing was changed" in said[0][1] and "> ./images/stowaway.tar" in said[1][1]
    assert "k3s-airgap-images-arm64.tar.zst: FAILED open or read" in said[2][1] and "this is another bundle" in said[3][1]


@pytest.mark.parametrize(("change", "site", "told"), [
    ("echo '# R35 (release), REVISION: 4.1, GCID: 1' >/etc/nv_tegra_release", "", "JetPack 6.2: L4T 35.4.1: L4T 36.4 or a later 36 is wanted"),
    ("echo '# R36 (release), REVISION: 3.0, GCID: 1' >/etc/nv_tegra_release", "", "JetPack 6.2: L4T 36.3.0: L4T 36.4 or a later 36 is wanted"),
    ("", "MIN_DISK_GB=1000", "1000 GB for data: 500 GB are free on /dev/nvme0n1: a larger drive"),
    ("", "MIN_MEMORY_MB=99000000", "99000000 MB of memory: "),
    ("rm /dev/nvme0n1", "", "a place for data: there is no NVMe drive: fit one, or write DATA_DEVICE=none"),
    ("printf 'TYPE=ntfs\\nLABEL=holiday\\n' >/run/stand-in/filesystem", "", "/dev/nvme0n1 holds something (TYPE=ntfs LABEL=holiday), and is not touched"),
    ("echo nvme0n1p1 >/run/stand-in/partitions", "", "/dev/nvme0n1 holds something (partitions), and is not touched"),
    ("", "DATA_DEVICE=/dev/sdz9", "/dev/sdz9 does not exist: look with lsblk"),
    ("", "POWER_MODE=7W", "the power mode 7W: this board knows 15W 25W MAXN_SUPER"),
    ("", "SENSOR_NETWORKS=everywhere", "write SENSOR_NETWORKS into site.env"),
    ("printf '#!/bin/sh\\necho Status: active\\n' >/usr/local/bin/ufw; chmod +x /usr/local/bin/ufw", "", "no second firewall: ufw drops"),
    ("echo '0 0 10.20.0.5:22 192.168.7.9:50123' >/run/stand-in/ssh", "", "192.168.7.9 is not all in ADMIN_NETWORKS"),
    ("export SSH_CONNECTION='fe80::1 5000 fe80::2 22'", "", "fe80::1 is not all in ADMIN_NETWORKS"),
    ("printf 'port 2222\\nport 2223\\n' >/run/stand-in/sshd", "", "SSH at port 22: sshd listens at 2222 2223, which the firewall would close"),
    ("printf '#!/bin/sh\\n' >/usr/local/bin/kubectl", "", "no other kubectl at /usr/local/bin/kubectl: a link to K3s' own goes there"),
    ("touch /run/stand-in/no-route", "", "a default route: K3s does not start without one"),
    ("", "NODE_IP=10.20.0.9", "the address 10.20.0.9: NODE_IP in site.env is none of this machine's: 10.20.0.2/24"),
    ("touch /run/stand-in/no-nft-compat /run/stand-in/no-tables", "", "iptables that this kernel supports: neither its nft nor its legacy variant"),
    ("touch /run/stand-in/no-mangle6", "", "the table mangle for IPv6: this kernel has IPv6"),
    ("touch /run/stand-in/unit-ntpsec.active", "", "a time service that takes NTP_SERVERS: ntpsec keeps the time here"),
], ids=["jetpack5", "jetpack6.0", "disk", "memory", "no-nvme", "foreign-filesystem", "partitions", "device", "power", "networks", "ufw", "ssh", "ssh6", "ssh-port", "kubectl", "route", "node-ip",
        "tables", "mangle6", "ntpsec"])
def test_what_is_missing_is_said_plainly_before_anything_is_changed(machine, bundle, change, site, told):
    ((code, said),) = machine.run(f"{change}\ntree before; install --offline /stick --format-nvme; tree after", bundle, SITE + site)
    assert code == 2 and told in said and "nothing was changed" in said, said
    assert not machine.changed("before", "after")


def test_a_setting_that_is_taken_back_is_undone(machine, bundle):
    site = SITE + "LOCK_CLOCKS=yes\n"
    first, second, third = machine.run("""install --offline /stick --format-nvme; ls /etc/systemd/system >/out/first
        sed 's/^LOCK_CLOCKS=yes/FIREWALL=no/' /site/site.env >/tmp/other.env
        install --env /tmp/other.env --offline /stick; ls /etc/systemd/system >/out/second; install --check --env /tmp/other.env --offline /stick""", bundle, site)
    assert [first[0], second[0], third[0]] == [0, 0, 0], second[1] + third[1]
    units = [{u for u in (machine.folder / "out" / n).read_text().split() if u.endswith(".service")} for n in ("first", "second")]
    assert units == [{"k3s.service", "predmaint-clocks.service", "predmaint-firewall.service"}, {"k3s.service"}]


def test_a_machine_without_a_gpu_is_a_site_too(machine, release, tmp_path):
    bundle = tmp_path / "bundle"
    assert prepare(release, bundle, "--arch", "amd64").returncode == 0
    first, second = machine.run("rm -rf /etc/nv* /dev/nvme0n1; export STAND_IN_ARCH=x86_64; install --offline /stick; install --check --offline /stick; ls /etc >/out/etc",
                                bundle, SITE + "MIN_DISK_GB=1\n")
    assert first[0] == 0 and second[0] == 0 and "profile cpu" in first[1], first[1] + second[1]
    assert "nvidia" not in first[1] and "cdi" not in (machine.folder / "out/etc").read_text()


@pytest.mark.parametrize(("words", "site", "code", "told"), [
    ("--chekc", "", 1, "--chekc is not known"), ("--check uninstall", "", 1, "one of them"), ("--purge-data", "", 1, "belongs to uninstall"),
    ("--check", "SENSOR_NETWORK=10.0.0.0/8", 1, "line 6: 'SENSOR_NETWORK=10.0.0.0/8' is no setting"), ("--check", "K3S_DISABLE=servicelb", 1, "sensors do not reach the broker"),
    ("--check", "K3S_VERSION=v9.9.9+k3s1", 3, "k3s.sha256 has none: prepare-bundle.sh --record"), ("--offline /site", "", 1, "/site is no bundle"),
    ("--check", "PROFILE=jetsn", 1, "jetson, cpu or auto is expected"), ("--check", "FIREWALL=off", 1, "yes or no is expected"),
    ("--check", "MIN_DISK_GB=fifty", 1, "a whole number is expected"), ("--check", "NETWORK_POLICIES=", 1, "yes or no is expected"),
    ("--check", "OPEN_INTERFACES=a;b", 1, "names of network interfaces are expected"),
    ("--check", "MIN_MEMORY_MB=", 3, "7000 MB of memory"), ("--check", "PROFILE=cpu\nMIN_MEMORY_MB=", 3, "3700 MB of memory")])
def test_a_wrong_word_or_setting_is_named(machine, words, site, code, told):
    ((ended, said),) = machine.run(f"install {words}", site=SITE + site)
    assert ended == code and told in said, said


# the bundle


def test_a_bundle_holds_what_the_release_vouches_for(release, bundle, tmp_path):
    done = prepare(release, tmp_path / "again")
    assert "is not in k3s.sha256; only the release's own list vouches for it" in done.stdout
    assert done.stdout.split()[-1] == run("sha256sum", tmp_path / "again/SHA256SUMS").stdout.split()[0]
    assert (bundle / "VERSION").read_text() == f"K3s {VERSION} arm64\n" and (bundle / "installer/install.sh").exists()
    place = "import verify_site; print(verify_site.CANARY.exists())"
    assert run(sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, '{bundle}/installer'); {place}").stdout == "True\n"

    other = shutil.copytree(release, tmp_path / "other")
    (other / VERSION / "k3s-arm64").write_text("#!/bin/sh\nevil\n")
    refused = prepare(other, tmp_path / "refused")
    assert refused.returncode == 3 and "k3s-arm64 is not what the release's own list says" in refused.stderr and not (tmp_path / "refused").exists()


def test_a_release_that_changed_under_its_name_is_refused(release, tmp_path):
    shutil.copytree(ROOT / "edge/triton", tmp_path / "triton")
    installer, other = shutil.copytree(BOOTSTRAP, tmp_path / "installer"), shutil.copytree(release, tmp_path / "other")
    assert prepare(release, tmp_path / "one", "--record", installer=installer).returncode == 0
    assert f"  {VERSION}/k3s-arm64\n" in (installer / "k3s.sha256").read_text()
    (other / VERSION / "k3s-arm64").write_text("#!/bin/sh\nevil\n")
    (other / VERSION / "sha256sum-arm64.txt").write_text(sums(other / VERSION, "k3s-arm64", "k3s-airgap-images-arm64.tar.zst"))
    refused = prepare(other, tmp_path / "two", installer=installer)
    assert refused.returncode == 3 and "and k3s.sha256 says" in refused.stderr
    assert prepare(release, tmp_path / "three", installer=installer).returncode == 0


def test_a_bundle_carries_the_images_of_its_manifests(release, base, tmp_path):
    need("kubectl", "kubectl")
    (tmp_path / "file").write_text("x")
    run("tar", "-cf", tmp_path / "image.tar", "-C", tmp_path, "file")
    name = "localhost/predmaint-bundle-test"
    podman("import", tmp_path / "image.tar", f"{name}:1")
    try:
        digest = json.loads(podman("image", "inspect", f"{name}:1"))[0]["Digest"]
        overlay = tmp_path / "overlay"
        overlay.mkdir()
        (overlay / "kustomization.yaml").write_text("resources: [pod.yaml]\n")
        (overlay / "pod.yaml").write_text(f"apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec:\n  containers:\n  - {{name: a, image: {name}:1@{digest}}}\n")
        done = prepare(release, tmp_path / "bundle", "--overlay", overlay, "--arch", "amd64")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"image: {name}:1\n" in (tmp_path / "bundle/manifests/site.yaml").read_text()
        index = subprocess.run(["tar", "-xOf", tmp_path / "bundle/images" / f"{name.replace('/', '_')}_1.tar", "index.json"], capture_output=True, check=True).stdout
        assert json.loads(index)["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] == f"{name}:1"
    finally:
        podman("rmi", "--force", f"{name}:1")


def test_the_overlay_of_the_page_makes_a_site_of_both_kinds(tmp_path):
    need("kubectl", "kubectl")
    page = json.loads((ROOT / "nbs/tutorials/jetson.ipynb").read_text())
    text = next(t for c in page["cells"] if "```yaml\n" in (t := "".join(c["source"]))).split("```yaml\n")[1].split("```")[0]
    shutil.copytree(ROOT / "edge/k3s", tmp_path / "edge/k3s")
    for name in ("mosquitto", "prometheus", "alertmanager", "grafana"):
        shutil.copytree(ROOT / "edge" / name, tmp_path / "edge" / name)
    shutil.copytree(ROOT / "edge/k3s/site", tmp_path / "lyon/site")
    for overlay in ("jetson", "cpu"):
        shutil.rmtree(tmp_path / "lyon/images", ignore_errors=True)
        shutil.copytree(ROOT / f"edge/k3s/overlays/{overlay}/images", tmp_path / "lyon/images")
        lines = [line for line in text.splitlines() if overlay == "jetson" or "/gpu" not in line]
        (tmp_path / "lyon/kustomization.yaml").write_text("\n".join(lines) + "\n")
        mine, shipped = (run("kubectl", "kustomize", p) for p in (tmp_path / "lyon", ROOT / f"edge/k3s/overlays/{overlay}"))
        assert mine.returncode == 0 and mine.stdout == shipped.stdout, mine.stderr


# the firewall, in namespaces of the network: real packets

@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces want root")
def test_the_firewall_lets_in_who_may_and_does_not_cut_their_sessions(machine, bundle, tmp_path):
    need("iptables iproute2", "iptables", "ip6tables", "ip")
    machine.run("install --offline /stick --format-nvme; cp -r /etc/predmaint /out", bundle)
    done = run("unshare", "--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", sys.executable, Path(__file__).parent / "bootstrap_firewall.py",
                           BOOTSTRAP / "files/firewall.sh", machine.folder / "out/predmaint")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["before"] == {who: [22, 6443, 8883, 9090] for who in ("admin", "sensor", "stranger", "usb")}
    assert said["during"] == {"admin": [22, 6443], "sensor": [8883], "stranger": [], "usb": [22, 6443, 8883, 9090]}
    assert said["twice"] == said["during"] and said["jumps"] == 1 and said["held"] and said["forwarded"] == {"sensor": True, "stranger": False, "usb": True}
    assert said["after"] == said["before"]
