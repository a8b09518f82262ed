"""What a container has not: a Jetson's programs, systemd, disks, the kernel's switches. Each stands in as a small script that keeps its state under
/run/stand-in; `uname`, too, since a Jetson is an aarch64. What install.sh does with files, settings and bundles is not stood in for."""

STAND_INS = {
    "uname": 'case $1 in -m) echo "${STAND_IN_ARCH:-aarch64}" ;; *) exec /usr/bin/uname "$@" ;; esac',
    "systemctl": """
now= quiet= words=()
for w in "$@"; do case $w in --now) now=1 ;; --quiet) quiet=1 ;; *) words+=("${w%.service}") ;; esac; done
at=$S/unit-${words[1]}
case ${words[0]} in
    enable) touch "$at.enabled"; [[ -z $now ]] || touch "$at.active" ;;
    disable) rm -f "$at.enabled"; [[ -z $now ]] || rm -f "$at.active" ;;
    restart|start|reload-or-restart) touch "$at.active" ;;
    is-enabled) [[ -e $at.enabled ]] ;;
    is-active) [[ -e $at.active ]] ;;
    daemon-reload) ;;
    *) echo "stand-in systemctl: $*" >&2; exit 1 ;;
esac""",
    "modprobe": """
case $1 in
    -nq) [[ $2 != nft_compat || ! -e $S/no-nft-compat ]] && [[ $2 != xt_limit ]] ;;
    -nv) [[ -d /sys/module/$2 ]] || echo "insmod $2.ko" ;;
    -r) [[ -e $S/nf_tables-held ]] || rm -f "$S/nf_tables" ;;
    *) mkdir -p "/sys/module/$1" ;;
esac""",
    "lsmod": '[[ ! -e $S/nf_tables ]] || echo "nf_tables 200704 1 nft_chain_nat"',
    "python3": '[[ $1 != */probe_policies.py ]] || { cat "$S/lacks" 2>/dev/null || true; exit; }; exec /usr/bin/python3 "$@"',
    "sysctl": """
case $1 in
    -n) sed -n "s/^$2=//p" "$S/sysctl" 2>/dev/null | tail -n1 ;;
    -q) grep -v '^#' "$3" >>"$S/sysctl" ;;
esac""",
    "iptables": """
[[ ! -e $S/iptables-legacy ]] || exec iptables-legacy "$@"
[[ $1 != --version ]] || { echo "iptables v1.8.7 (nf_tables)"; exit; }
touch "$S/nf_tables"
[[ ! -e $S/no-nft-compat ]] || { echo "Extension comment revision 0 not supported" >&2; exit 4; }""",
    "iptables-legacy": '[[ $1 != --version ]] || echo "iptables v1.8.7 (legacy)"; [[ ! -e $S/no-tables ]]',
    "ip6tables": '[[ ! -e $S/no-mangle6 ]]',
    "ip6tables-legacy": '[[ ! -e $S/no-mangle6 ]]',
    "update-alternatives": 'case $1 in --set) touch "$S/$2-legacy" ;; --auto) rm -f "$S/$2-legacy" ;; esac',
    "ip": """
case $* in
    *"route show default") [[ -e $S/no-route ]] || echo "default via 10.20.0.1 dev eth0" ;;
    *"address show"*) echo "2: eth0    inet 10.20.0.2/24 brd 10.20.0.255 scope global eth0" ;;
    *) exit 1 ;;
esac""",
    "sshd": 'cat "$S/sshd" 2>/dev/null || true',
    "ss": 'cat "$S/ssh" 2>/dev/null || true',
    "lsblk": r"""
device=${*: -1}
case $* in
    *NAME,TYPE*) [[ ! -e /dev/nvme0n1 ]] || echo "nvme0n1 disk" ;;
    *SIZE*) echo 500000000000 ;;
    *MOUNTPOINTS*) cat "$S/mounted-${device##*/}" 2>/dev/null || echo ;;
    *NAME*) echo nvme0n1; cat "$S/partitions" 2>/dev/null || true ;;
esac""",
    "blkid": '[[ -e $S/filesystem ]] || exit 2; cat "$S/filesystem"',
    "mkfs.ext4": "printf 'TYPE=ext4\\nLABEL=predmaint\\nUUID=3e9f3cba-0000-4000-8000-5f0e6a3b7c1d\\n' >$S/filesystem",
    "mount": 'grep -q " $1 " /etc/fstab && touch "$S/mounted"',
    "umount": 'rm -f "$S/mounted"',
    "mountpoint": '[[ -e $S/mounted ]]',
    "nvpmodel": """
case $1 in
    -q) echo "NV Power Mode: $(cat "$S/mode" 2>/dev/null || echo 15W)"; [[ $(cat "$S/mode" 2>/dev/null) == 25W ]] && echo 1 || echo 0 ;;
    -m) sed -nE "s/^< POWER_MODEL ID=$2 NAME=([^ ]+) >.*/\\1/p" /etc/nvpmodel.conf >"$S/mode" ;;
esac""",
    "jetson_clocks": "exit 0",
    "nvidia-container-runtime": "exit 0",
    "nvidia-ctk": """
last=${*: -1}
case $* in
    --version) echo "NVIDIA Container Toolkit CLI version 1.17.7" ;;
    config*mode=*) sed -i "s/^mode = .*/mode = \\"${last##*=}\\"/" /etc/nvidia-container-runtime/config.toml ;;
    "cdi generate"*) echo "cdiVersion: 0.5.0" >"${last##*=}" ;;
esac""",
}

# The machine before the first installation: a board as JetPack leaves it, with a blank NVMe drive.
FRESH = r"""
mkdir -p /run/stand-in /etc/sysctl.d /etc/modules-load.d /etc/nvidia-container-runtime /etc/systemd/system /usr/local/bin
touch /dev/nvme0n1 /etc/fstab
echo '# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025' >/etc/nv_tegra_release
printf '< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n' >/etc/nvpmodel.conf
printf '[nvidia-container-runtime]\nmode = "auto"\n' >/etc/nvidia-container-runtime/config.toml
"""

# K3s as far as the installer asks it
K3S = '#!/bin/bash\n[[ $* == *"get nodes"* ]] && echo True\n'


def write(folder) -> None:
    "The stand-ins as programs in a folder."
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n# stand-in for {name}\nS=/run/stand-in\n{text.strip()}\n")
        (folder / name).chmod(0o755)
