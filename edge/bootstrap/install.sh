#!/bin/bash
# Install what a site stands on: a Jetson with JetPack 6.2, or any machine with Debian or Ubuntu, becomes a K3s node for edge/k3s.
# `install.sh --help` says how; the page "From laptop to Jetson" (nbs/tutorials/jetson.ipynb) says why and what comes after.
#
# Each step is a test and what makes the test true (`ensure`), so that one list serves the check, the dry run and the installation, and a second
# installation finds nothing to do. What only a person can bring is asked for first (`need`): nothing is changed before all of it is there.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lib.sh
. "$HERE/lib.sh"
# shellcheck source=steps.sh
. "$HERE/steps.sh"

DATA=/var/lib/predmaint
K3S_URL=https://github.com/k3s-io/k3s/releases/download
BEFORE=/etc/predmaint/before # how things were before us, for uninstall

usage() {
    cat <<'TEXT'
usage: install.sh [--check | --dry-run | uninstall [--purge-data]] [--env FILE] [--offline FOLDER [--sha256 DIGEST]] [--format-nvme]

  (nothing)              install, or bring an installation back to what site.env says; a second run changes nothing
  --check                say what is right and what is missing; change nothing; exit 3 where something is missing
  --dry-run              print each command that an installation would run
  uninstall              take away what was put here; data stay, unless --purge-data is given
  --env FILE             settings of the site; site.env beside this script without it (see site.env.example)
  --offline FOLDER       take K3s, images and manifests from a bundle of prepare-bundle.sh, and nothing from the network
  --sha256 DIGEST        what prepare-bundle.sh said of that bundle in its last line
  --format-nvme          put a filesystem on the NVMe drive where it is blank; a drive with anything on it is never touched

exit: 0 done, 1 what you gave is wrong, 2 a part is missing or out of reach, 3 the check said no
TEXT
}

# --- the machinery

MISSING=0 WRONG=0

# run COMMAND...: runs it, or prints it in a dry run.
run() {
    local line
    printf -v line '%q ' "$@"
    say "         ${line% }"
    [[ $MODE == dry-run ]] || "$@"
}

# need WHAT ADVICE TEST...: what only a person can bring.
need() {
    local what=$1 advice=$2
    shift 2
    if "$@"; then
        say "ok       $what"
    else
        say "missing  $what: $advice"
        WRONG=$((WRONG + 1))
    fi
}

# ensure WHAT TEST FIX [ARGUMENT...]: FIX makes TEST true.
ensure() {
    local what=$1 test=$2 fix=$3
    shift 3
    if "$test" "$@"; then
        say "ok       $what"
    elif [[ $MODE == check ]]; then
        say "missing  $what"
        MISSING=$((MISSING + 1))
    else
        say "doing    $what"
        "$fix" "$@"
        [[ $MODE == dry-run ]] || "$test" "$@" || die 2 "$what: done, and yet it is not so. See above, and 'journalctl -b' for the service"
    fi
}

# remember NAME VALUE: how it was, unless it is known already.
remember() {
    [[ $MODE == dry-run || -n $(before "$1") ]] && return
    mkdir -p "${BEFORE%/*}"
    printf '%s=%s\n' "$1" "$2" >>"$BEFORE"
}
before() {
    [[ ! -f $BEFORE ]] || sed -n "s/^$1=//p" "$BEFORE"
}

have() { command -v "$1" >/dev/null; }
active() { systemctl is-active --quiet "$1"; }

# file SOURCE DESTINATION [MODE]: as it stands in `files/`, or was made in $WORK.
is_file() { [[ -f $2 ]] && cmp -s "$1" "$2" && [[ $(stat -c %a "$2") == "$3" ]]; }
put_file() {
    run install -D -m "$3" "$1" "$2"
    case $2 in
        /etc/rancher/* | /usr/local/bin/k3s | */k3s.service) K3S_CHANGED=yes ;;
    esac
    [[ $2 != /etc/systemd/system/* ]] || run systemctl daemon-reload
}
file() { ensure "$2" is_file put_file "$1" "$2" "${3-644}"; }

# A unit that is enabled and active; and one that was, and shall not be any more.
unit_up() { systemctl is-enabled --quiet "$1" 2>/dev/null && active "$1"; }
start_unit() { run systemctl enable --now "$1"; }
no_unit() { [[ ! -f /etc/systemd/system/$1 ]]; }
drop_unit() {
    run systemctl disable --now "$1"
    run rm -f "/etc/systemd/system/$1"
    run systemctl daemon-reload
}
without() { no_unit "$1" || ensure "no $1" no_unit drop_unit "$1"; }

# --- settings

# load FILE: NAME=value lines, whose names site.env.example has.
load() {
    local line name number=0
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        name=${line%%=*}
        { [[ $line == *=* && $name =~ ^[A-Z0-9_]+$ ]] && grep -q "^$name=" "$HERE/site.env.example"; } ||
            die 1 "$1, line $number: '$line' is no setting; expected NAME=value with a name of site.env.example"
        line=${line#*=}
        printf -v "$name" %s "${line%$'\r'}"
    done <"$1"
}

# Settings that have a form.
settle() {
    local name
    case $PROFILE in
        auto) [[ -f /etc/nv_tegra_release ]] && PROFILE=jetson || PROFILE=cpu ;;
        jetson | cpu) ;;
        *) die 1 "PROFILE=$PROFILE: jetson, cpu or auto is expected" ;;
    esac
    [[ -n $MIN_MEMORY_MB ]] || { [[ $PROFILE == jetson ]] && MIN_MEMORY_MB=7000 || MIN_MEMORY_MB=3700; }
    for name in MIN_MEMORY_MB MIN_DISK_GB SSH_PORT; do
        [[ ${!name} =~ ^[0-9]{1,9}$ ]] || die 1 "$name=${!name}: a whole number is expected"
    done
    for name in LOCK_CLOCKS FIREWALL NETWORK_POLICIES; do
        [[ ${!name} =~ ^(yes|no)$ ]] || die 1 "$name=${!name}: yes or no is expected"
    done
    for name in $OPEN_INTERFACES; do
        [[ $name =~ ^[A-Za-z0-9_.-]{1,15}$ ]] || die 1 "OPEN_INTERFACES=$OPEN_INTERFACES: names of network interfaces are expected, as \`ip link\` has them"
    done
}

# --- the whole, in order

steps() {
    machine
    power_needs
    data_needs
    clock_needs
    kernel_needs
    firewall_needs
    gpu_needs
    k3s_needs
    if [[ $WRONG != 0 && $MODE == install ]]; then
        die 2 "$WRONG of the above must be there first; nothing was changed"
    fi
    power
    data
    clock
    kernel
    firewall
    gpu
    cluster
}

pod_mounts() { findmnt -rno TARGET | { grep -E "^(/run/k3s|/run/netns/cni-|/var/lib/kubelet|$DATA/k3s)" || true; } | sort -r; }

# Stop the pods that outlive K3s, and take its mounts and bridges away.
stop_pods() {
    local group target
    for group in /sys/fs/cgroup/kubepods{,.slice} /sys/fs/cgroup/system.slice/k3s.service; do
        [[ ! -e $group/cgroup.kill ]] || run sh -c "echo 1 >$group/cgroup.kill"
    done
    while read -r target; do run umount "$target" || true; done < <(pod_mounts) # the next line looks
    [[ -z $(pod_mounts) ]] || die 2 "pods still hold their volumes: restart the machine, and run this again; nothing of theirs was removed"
    run rm -rf /run/k3s /run/flannel /var/lib/kubelet /var/lib/cni
    for target in cni0 flannel.1; do
        ! ip link show "$target" >/dev/null 2>&1 || run ip link delete "$target"
    done
}
uninstall() {
    local f
    if [[ -n $(before k3s) ]]; then # another's K3s is not ours to stop
        no_unit k3s.service || drop_unit k3s.service
        stop_pods
        ! links_to k3s /usr/local/bin/kubectl || run rm -f /usr/local/bin/kubectl
        run rm -rf /usr/local/bin/k3s /etc/rancher/k3s
    fi
    for f in predmaint-firewall.service predmaint-clocks.service; do no_unit "$f" || drop_unit "$f"; done
    [[ -z $(before power) ]] || run nvpmodel -m "$(before power)" </dev/null
    [[ -z $(before nvidia-mode) ]] || run nvidia-ctk config --in-place --set "nvidia-container-runtime.mode=$(before nvidia-mode)"
    [[ -z $(before iptables) ]] || for f in iptables ip6tables; do run update-alternatives --auto "$f"; done
    [[ -z $(before cdi) ]] || run rm -f /etc/cdi/nvidia.yaml
    run rm -rf /etc/predmaint /usr/local/lib/predmaint \
        /etc/modules-load.d/predmaint.conf /etc/modprobe.d/predmaint.conf /etc/sysctl.d/90-predmaint.conf "$(own_servers chrony)" "$(own_servers systemd-timesyncd)"
    for f in /etc/rancher /etc/cdi /etc/modprobe.d /etc/systemd/timesyncd.conf.d; do
        [[ ! -d $f ]] || run rmdir --ignore-fail-on-non-empty "$f"
    done
    if [[ $PURGE == yes ]]; then
        [[ ! -d $DATA ]] || run find "$DATA" -xdev -mindepth 1 -delete
        ! mountpoint -q "$DATA" || run umount "$DATA"
        sed "\\| $DATA |d" /etc/fstab >"$WORK/fstab"
        cmp -s "$WORK/fstab" /etc/fstab || run cp "$WORK/fstab" /etc/fstab
        [[ ! -d $DATA ]] || run rmdir "$DATA"
    else
        say "data stay in $DATA (uninstall --purge-data takes them away, too)"
    fi
    say "done. Restart the machine: kernel parameters, and rules that K3s left in iptables, go with it"
}

MODE=install ENV_FILE='' BUNDLE='' BUNDLE_SUM='' FORMAT=no PURGE=no LOG='' K3S_CHANGED=no
while [[ $# -gt 0 ]]; do
    case $1 in
        install) ;;
        --check | --dry-run | uninstall)
            [[ $MODE == install ]] || die 1 "$1 and $MODE at once: one of them"
            MODE=${1#--}
            ;;
        --env | --offline | --sha256)
            [[ $# -gt 1 ]] || die 1 "$1 wants a value"
            case $1 in --env) ENV_FILE=$2 ;; --offline) BUNDLE=$2 ;; --sha256) BUNDLE_SUM=$2 ;; esac
            shift
            ;;
        --format-nvme) FORMAT=yes ;;
        --purge-data) PURGE=yes ;;
        --help | -h)
            usage
            exit
            ;;
        *) die 1 "$1 is not known: install.sh --help" ;;
    esac
    shift
done
[[ $EUID == 0 ]] || die 1 "run it as root: sudo $0"
[[ $PURGE == no || $MODE == uninstall ]] || die 1 "--purge-data belongs to uninstall"
[[ -z $BUNDLE_SUM || -n $BUNDLE ]] || die 1 "--sha256 belongs to --offline"

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
load "$HERE/site.env.example"
if [[ -n $ENV_FILE ]]; then
    [[ -f $ENV_FILE ]] || die 1 "$ENV_FILE is not there"
    load "$ENV_FILE"
elif [[ -f $HERE/site.env ]]; then
    load "$HERE/site.env"
elif [[ $MODE != uninstall ]]; then
    say "there is no site.env beside install.sh: these are the values of site.env.example"
fi
case $(uname -m) in aarch64 | arm64) ARCH=arm64 ;; x86_64) ARCH=amd64 ;; *) ARCH='' ;; esac
settle
[[ -z $BUNDLE ]] || verify_bundle "$BUNDLE" "$BUNDLE_SUM"
[[ -z $BUNDLE ]] || BUNDLE=$(cd "$BUNDLE" && pwd)
if [[ $MODE == install || $MODE == uninstall ]]; then
    exec 9>/run/predmaint-install.lock
    flock -n 9 || die 2 "another install.sh is at work"
    LOG=/var/log/predmaint-install.log
    say "install.sh $MODE, profile $PROFILE"
fi

if [[ $MODE == uninstall ]]; then
    uninstall
    exit
fi
steps
if [[ $MODE == install ]]; then
    say "the node is ready. Next: certificates, secrets, and the site itself${BUNDLE:+ (kubectl apply --server-side -f $DATA/manifests/site.yaml)}; see the page \"From laptop to Jetson\""
elif [[ $((MISSING + WRONG)) != 0 ]]; then
    [[ $WRONG == 0 ]] || say "$WRONG to be brought by you; an installation would stop at these before its first change"
    [[ $MODE == dry-run ]] || say "$MISSING that install.sh would do"
    [[ $MODE == dry-run && $WRONG == 0 ]] || exit 3
else
    [[ $MODE == dry-run ]] || say "all is as it should be"
fi
