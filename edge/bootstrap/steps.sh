# shellcheck shell=bash disable=SC2153
# The steps of install.sh, in their order: of each what it needs (`…_needs`), and what it ensures.

# --- 1. the machine

l4t() { # 36.4.3, of `# R36 (release), REVISION: 4.3, GCID: …`
    sed -nE 's/^# R([0-9]+) \(release\), REVISION: ([0-9.]+),.*/\1.\2/p' /etc/nv_tegra_release 2>/dev/null
}
jetpack() { [[ $(l4t) =~ ^36\.([4-9]|[1-9][0-9])(\.|$) ]]; } # JetPack 6.2 is 36.4.3, 6.1 is 36.4.0
known_arch() { [[ -n $ARCH ]] && { [[ $PROFILE == cpu ]] || [[ $ARCH == arm64 ]]; }; }
enough_memory() { [[ $(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo) -ge $MIN_MEMORY_MB ]]; }
cgroup2() { [[ -f /sys/fs/cgroup/cgroup.controllers ]]; }

machine() {
    need "a machine of the profile $PROFILE: $(uname -m)" "jetson is aarch64, cpu is x86_64 or aarch64" known_arch
    [[ $PROFILE == cpu ]] ||
        need "JetPack 6.2: L4T $(l4t | grep . || echo unknown)" "L4T 36.4 or a later 36 is wanted (/etc/nv_tegra_release): flash JetPack 6.2, or update by apt" jetpack
    need "$MIN_MEMORY_MB MB of memory" "$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo) MB are here; MIN_MEMORY_MB in site.env, if you know better" enough_memory
    need "control groups of version 2" "boot without systemd.unified_cgroup_hierarchy=0 (kernel command line)" cgroup2
    local program
    for program in systemctl:systemd ip:iproute2 ss:iproute2 iptables:iptables modprobe:kmod lsmod:kmod unshare:util-linux sysctl:procps mkfs.ext4:e2fsprogs python3:python3; do
        need "the program ${program%:*}" "apt-get install ${program#*:}" have "${program%:*}"
    done
}

# --- 2. power of a Jetson

mode_id() { sed -nE "s/^< POWER_MODEL ID=([0-9]+) NAME=$POWER_MODE >.*/\1/p" /etc/nvpmodel.conf 2>/dev/null; }
mode_known() { [[ -n $(mode_id) ]]; }
power_is() { [[ $(nvpmodel -q 2>/dev/null | sed -nE 's/^NV Power Mode: *//p') == "$POWER_MODE" ]]; }
set_power() {
    remember power "$(nvpmodel -q | tail -n1)"
    run nvpmodel -m "$(mode_id)" </dev/null
    power_is || [[ $MODE == dry-run ]] || die 2 "nvpmodel takes $POWER_MODE only with a restart: sudo nvpmodel -m $(mode_id), say yes, and run this again"
}

power_needs() {
    [[ $PROFILE == jetson && -n $POWER_MODE ]] || return 0
    need "the power mode $POWER_MODE" "this board knows $(sed -nE 's/^< POWER_MODEL ID=[0-9]+ NAME=([^ ]+) >.*/\1/p' /etc/nvpmodel.conf 2>/dev/null | paste -sd' '):
         write one of them, or nothing, as POWER_MODE into site.env" mode_known
}
power() {
    [[ $PROFILE == jetson ]] || return 0
    [[ -z $POWER_MODE ]] || ensure "power mode $POWER_MODE" power_is set_power
    if [[ $LOCK_CLOCKS == yes ]]; then
        file "$HERE/files/predmaint-clocks.service" /etc/systemd/system/predmaint-clocks.service
        ensure "clocks at their highest" unit_up start_unit predmaint-clocks.service
    else
        without predmaint-clocks.service
    fi
}

# --- 3. data on NVMe

on_it() { lsblk -nro MOUNTPOINTS "$1" | sed 's/\\x0a/\n/g' | grep -qx "$2"; }
nvme_drives() { lsblk -dnro NAME,TYPE | awk '$1 ~ /^nvme/ && $2 == "disk" { print "/dev/" $1 }'; }
field() { { blkid -p -o export "$1" 2>/dev/null || true; } | sed -n "s/^$2=//p"; }
blank() { # blkid's 2 says that it knows nothing there; where it is in doubt (8) it prints nothing, either
    local code=0
    blkid -p "$1" >/dev/null 2>&1 || code=$?
    [[ $code == 2 && -z $(wipefs --no-act "$1" 2>/dev/null) && $(lsblk -nro NAME "$1" | wc -l) == 1 ]]
}

# The device for data into DEVICE, nothing for the system's own disk; else what is wrong with it into DEVICE_WRONG.
choose_device() {
    DEVICE='' DEVICE_WRONG=''
    local drives=() d
    case $DATA_DEVICE in
        none) return ;;
        auto)
            for d in $(nvme_drives); do
                on_it "$d" / && return # the system is on NVMe, so data on its disk are
                drives+=("$d")
            done
            case ${#drives[@]} in
                0) [[ $PROFILE == cpu ]] || DEVICE_WRONG="there is no NVMe drive: fit one, or write DATA_DEVICE=none into site.env and keep data on the system's disk (an SD card wears out)" ;;
                1) DEVICE=${drives[0]} ;;
                *) DEVICE_WRONG="there are several (${drives[*]}): name one as DATA_DEVICE in site.env" ;;
            esac
            ;;
        *)
            DEVICE=$DATA_DEVICE
            [[ -e $DEVICE ]] || DEVICE_WRONG="$DEVICE does not exist: look with lsblk, and correct DATA_DEVICE in site.env"
            ;;
    esac
    [[ -n $DEVICE && -z $DEVICE_WRONG ]] || return 0
    if blank "$DEVICE"; then
        [[ $FORMAT == yes ]] || DEVICE_WRONG="$DEVICE is blank: give --format-nvme, and it gets a filesystem"
    elif [[ $(field "$DEVICE" TYPE) != ext4 ]] || [[ $DATA_DEVICE == auto && $(field "$DEVICE" LABEL) != predmaint ]]; then
        DEVICE_WRONG="$DEVICE holds something ($(blkid -p -o export "$DEVICE" 2>/dev/null | grep -E '^(TYPE|LABEL|PTTYPE)=' | paste -sd' ' | grep . || echo partitions)), and is not touched. \
If it may go, empty it yourself (wipefs --all $DEVICE) and give --format-nvme; if data shall live beside it, name an ext4 partition as DATA_DEVICE"
    fi
}
device_right() { [[ -z $DEVICE_WRONG ]]; }
enough_disk() { [[ $FREE_GB -ge $MIN_DISK_GB ]]; }

data_needs() {
    choose_device
    need "a place for data${DEVICE:+: $DEVICE}" "$DEVICE_WRONG" device_right
    local of=/var/lib
    [[ ! -d $DATA ]] || of=$DATA
    if [[ -n $DEVICE && -e $DEVICE ]] && ! mountpoint -q "$DATA"; then
        FREE_GB=$(($(lsblk -bdnro SIZE "$DEVICE") / 1000000000))
    elif [[ -e $DATA/k3s ]]; then
        FREE_GB=$MIN_DISK_GB # what we have filled ourselves is no reason to stop
    else
        FREE_GB=$(df -Pk "$of" | awk 'NR == 2 { print int($4 * 1.024 / 1000000) }')
    fi
    need "$MIN_DISK_GB GB for data" "$FREE_GB GB are free${DEVICE:+ on $DEVICE}: a larger drive (DATA_DEVICE in site.env); MIN_DISK_GB, if you know better" enough_disk
}

is_formatted() { [[ $(field "$1" TYPE) == ext4 ]]; }
format() { run mkfs.ext4 -q -L predmaint -m 1 "$1"; }
is_listed() { grep -q "^UUID=$(field "$DEVICE" UUID) $DATA " /etc/fstab; }
list_mount() { # nofail: with the drive gone the board still answers, and K3s waits (RequiresMountsFor)
    local uuid
    uuid=$(field "$DEVICE" UUID)
    sed "\\| $DATA |d" /etc/fstab >"$WORK/fstab"
    echo "UUID=${uuid:-of-$DEVICE} $DATA ext4 noatime,nodev,nosuid,nofail,x-systemd.device-timeout=30s 0 2" >>"$WORK/fstab"
    run cp "$WORK/fstab" /etc/fstab
    run systemctl daemon-reload
}
is_mounted() { mountpoint -q "$DATA"; }
mount_data() {
    run mkdir -p "$DATA"
    run mount "$DATA"
}
is_folder() { [[ -d $1 && $(stat -c %a "$1") == "$2" ]]; }
make_folder() { run install -d -m "$2" "$1"; }

data() {
    if [[ -n $DEVICE ]]; then
        ensure "a filesystem on $DEVICE" is_formatted format "$DEVICE"
        ensure "$DEVICE in /etc/fstab, by its UUID" is_listed list_mount
        ensure "$DEVICE at $DATA" is_mounted mount_data
    fi
    ensure "the folder $DATA" is_folder make_folder "$DATA" 711
    ensure "the folder of the audit log" is_folder make_folder "$DATA/k3s/audit" 700
}

# --- 4. time

time_service() {
    local s
    for s in chrony systemd-timesyncd ntpsec ntp ntpd openntpd; do
        if active "$s"; then
            echo "$s"
            return
        fi
    done
    return 1
}
own_servers() { # where a service reads what is ours
    case $1 in
        chrony) echo /etc/chrony/conf.d/predmaint.conf ;;
        *) echo /etc/systemd/timesyncd.conf.d/predmaint.conf ;;
    esac
}
keeps_time() { time_service >/dev/null; }
time_wanted() { if have chronyd; then echo chrony; else echo systemd-timesyncd; fi; }
start_time() { run systemctl enable --now "$(time_wanted)"; }
takes_servers() { [[ $(time_service || time_wanted) =~ ^(chrony|systemd-timesyncd)$ ]]; }
clock_needs() {
    [[ -z $NTP_SERVERS ]] || need "a time service that takes NTP_SERVERS" \
        "$(time_service) keeps the time here: write the servers into its own configuration, and leave NTP_SERVERS empty" takes_servers
}
clock() {
    ensure "a service that keeps the time" keeps_time start_time
    [[ -n $NTP_SERVERS ]] && takes_servers || return 0
    local service s
    service=$(time_service || time_wanted)
    if [[ $service == chrony ]]; then
        for s in $NTP_SERVERS; do echo "server $s iburst"; done
    else
        printf '[Time]\nNTP=%s\nFallbackNTP=\n' "$NTP_SERVERS"
    fi >"$WORK/ntp"
    ensure "the plant's time servers" is_file put_servers "$WORK/ntp" "$(own_servers "$service")" 644
}
put_servers() {
    put_file "$@"
    local service=systemd-timesyncd
    [[ $2 != */chrony/* ]] || service=chrony
    run systemctl restart "$service"
}

# --- 5. kernel

# Jetson's kernel lacks nft_compat, by which iptables' nft variant uses its extensions, and K3s' network policies end without them
# (https://github.com/NVIDIA/OpenShell/pull/568). Asked in a network namespace of its own, so that nothing changes here but for modules that the kernel
# loads; and the nft variant is not even asked where nft_compat is missing, since that would load nf_tables (files/no-nf_tables.conf says what comes of it).
legacy() { [[ $(iptables --version 2>/dev/null) == *legacy* ]]; }
tables_work() { # [-legacy]
    [[ -n ${1-} ]] || legacy || [[ ! -d /lib/modules/$(uname -r) ]] || modprobe -nq nft_compat || return 1
    # shellcheck disable=SC2016
    unshare --net bash -c '"$0" -A FORWARD -m comment --comment x -m conntrack --ctstate NEW -m mark ! --mark 1 -j ACCEPT &&
        "$0" -t nat -A POSTROUTING -m addrtype --dst-type LOCAL -j MASQUERADE && "$0" -t mangle -A PREROUTING -m conntrack --ctstate ESTABLISHED -j RETURN' \
        "iptables${1-}" 2>/dev/null
}
mangle6() {
    [[ ! -e /proc/net/if_inet6 ]] || unshare --net "ip6tables${1-}" -t mangle -A PREROUTING -m conntrack --ctstate ESTABLISHED -j RETURN 2>/dev/null
}
kernel_needs() {
    have iptables && have unshare || return 0 # said already
    local variant='' lacks=''
    tables_work '' || variant=-legacy
    need "iptables that this kernel supports" "neither its nft nor its legacy variant can do what K3s asks for: comment, conntrack, mark, addrtype, MASQUERADE, and the table mangle. \
This kernel has to be another one, or to get these modules" tables_work "$variant"
    [[ $FIREWALL == no ]] || need "the table mangle for IPv6" "this kernel has IPv6, and the firewall could not close it: load ip6table_mangle, or boot with ipv6.disable=1" mangle6 "$variant"
    [[ $NETWORK_POLICIES == yes ]] || return 0
    lacks=$(python3 "$HERE/probe_policies.py" "iptables$variant" 2>&1) || true
    need "a kernel that can do network policies" "it lacks $lacks.
         K3s would go on without a word, and let every pod talk to every other one. Build these modules for your kernel (Jetson's is known for it:
         https://github.com/NVIDIA/NemoClaw/pull/249, https://github.com/jetsonhacks/jetson-orin-kernel-builder), or write NETWORK_POLICIES=no into
         site.env, if you have read there what that means" test -z "$lacks"
}
legacy_tables() {
    remember iptables auto
    local t
    for t in iptables ip6tables; do run update-alternatives --set "$t" "/usr/sbin/$t-legacy"; done
}
modules() { # those that this kernel has, and the first two in any case
    local m
    grep -v '^#' "$HERE/files/modules.conf" | while read -r m; do
        case $m in br_netfilter | overlay) echo "$m" ;; *) ! modprobe -nq "$m" 2>/dev/null || echo "$m" ;; esac
    done
}
modules_loaded() {
    local m
    while read -r m; do
        [[ -d /sys/module/$m || -z $(modprobe -nv "$m" 2>&1) ]] || return 1 # what is built in has no folder, and nothing to load
    done <"$WORK/modules"
}
load_modules() {
    local m
    while read -r m; do run modprobe "$m"; done <"$WORK/modules"
}
without_nf_tables() { [[ -z $(lsmod | awk '$1 == "nf_tables"') ]]; }
unload_nf_tables() {
    local users
    users=$(lsmod | awk '$1 == "nf_tables" { gsub(",", " ", $4); print $4 }')
    # shellcheck disable=SC2086
    run modprobe -r $users nf_tables || true # the next line looks
    without_nf_tables || [[ $MODE == dry-run ]] ||
        die 2 "the module nf_tables is in use, such as by rules of Docker. From the next start on it stays away: restart this machine, and run this again"
}
sysctl_set() {
    local name value
    while IFS='=' read -r name value; do
        [[ $(sysctl -n "$name" 2>/dev/null) == "$value" ]] || return 1
    done < <(grep -v '^#' "$HERE/files/sysctl.conf")
}
set_sysctl() { run sysctl -q -p /etc/sysctl.d/90-predmaint.conf; }

kernel() {
    modules >"$WORK/modules"
    file "$WORK/modules" /etc/modules-load.d/predmaint.conf
    ensure "kernel modules for the pods' network" modules_loaded load_modules
    file "$HERE/files/sysctl.conf" /etc/sysctl.d/90-predmaint.conf
    ensure "kernel parameters that the kubelet demands" sysctl_set set_sysctl
    ensure "iptables with the extensions that K3s uses" tables_work legacy_tables
    if legacy || ! tables_work ''; then
        file "$HERE/files/no-nf_tables.conf" /etc/modprobe.d/predmaint.conf
        ensure "the module nf_tables away, with which the balancer in front of the broker fails" without_nf_tables unload_nf_tables
    fi
}

# --- 6. firewall

# networks TEXT: each is an address or a network.
networks() {
    [[ -n $1 ]] && python3 -c 'import ipaddress, sys
for n in sys.argv[1].split(): ipaddress.ip_network(n)' "$1" 2>/dev/null
}
# within TEXT ADDRESS: whether the address lies in one of the networks.
within() {
    python3 -c 'import ipaddress, sys
a = ipaddress.ip_address(sys.argv[2].split("%")[0])
a = getattr(a, "ipv4_mapped", None) or a
sys.exit(not any(a in ipaddress.ip_network(n) for n in sys.argv[1].split()))' "$1" "$2"
}

# Who is connected by SSH just now.
ssh_peers() {
    ss -tnH state established "( sport = :$SSH_PORT )" 2>/dev/null | awk '{ sub(/:[0-9]+$/, "", $NF); gsub(/[][]/, "", $NF); print $NF }'
    [[ -z ${SSH_CONNECTION-} ]] || echo "${SSH_CONNECTION%% *}"
}
no_ufw() { ! have ufw || ! ufw status | grep -q "^Status: active"; }
ssh_ports() { sshd -T 2>/dev/null | sed -n 's/^port //p'; }
ssh_is_there() { [[ -z $(ssh_ports) ]] || ssh_ports | grep -qx "$SSH_PORT"; }
lets_us_stay() {
    local a
    for a in $(ssh_peers | sort -u); do within "$ADMIN_NETWORKS" "$a" || return 1; done
}
rules() { # VERSION
    local n port icmp=icmp dhcp=68
    [[ $1 == 4 ]] || { icmp=ipv6-icmp dhcp=546; }
    echo "*mangle"
    echo ":PREDMAINT - [0:0]"
    for n in lo cni0 $OPEN_INTERFACES; do echo "-A PREDMAINT -i $n -j RETURN"; done
    echo "-A PREDMAINT -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN"
    echo "-A PREDMAINT -p $icmp -j RETURN"
    echo "-A PREDMAINT -p udp --dport $dhcp -j RETURN"
    for port in "$SSH_PORT" 6443; do
        for n in $ADMIN_NETWORKS; do ! of_version "$1" "$n" || echo "-A PREDMAINT -s $n -p tcp --dport $port -j RETURN"; done
    done
    for n in ${SENSOR_NETWORKS#none}; do ! of_version "$1" "$n" || echo "-A PREDMAINT -s $n -p tcp --dport 8883 -j RETURN"; done
    echo "-A PREDMAINT -j DROP"
    echo "COMMIT"
}
of_version() { if [[ $2 == *:* ]]; then [[ $1 == 6 ]]; else [[ $1 == 4 ]]; fi; }

firewall_needs() {
    [[ $FIREWALL == yes ]] || return 0
    need "who may administer this machine" "write ADMIN_NETWORKS into site.env, networks such as 10.20.0.0/24 ('$ADMIN_NETWORKS' is none)" networks "$ADMIN_NETWORKS"
    need "no second firewall" "ufw drops what pods say to each other (https://docs.k3s.io/installation/requirements): sudo ufw disable, or FIREWALL=no" no_ufw
    [[ $SENSOR_NETWORKS == none ]] ||
        need "where sensors are" "write SENSOR_NETWORKS into site.env, networks such as 10.30.0.0/24, or none ('$SENSOR_NETWORKS' is neither)" networks "$SENSOR_NETWORKS"
    need "SSH at port $SSH_PORT" "sshd listens at $(ssh_ports | paste -sd' '), which the firewall would close: write that as SSH_PORT into site.env" ssh_is_there
    ! networks "$ADMIN_NETWORKS" || need "a firewall that does not cut who is here by SSH" \
        "$(ssh_peers | sort -u | paste -sd' ') is not all in ADMIN_NETWORKS ($ADMIN_NETWORKS): add it to site.env, or come from there" lets_us_stay
}
firewall_current() { unit_up predmaint-firewall.service && [[ $FIREWALL_CHANGED == no ]]; }
start_firewall() {
    run systemctl enable predmaint-firewall.service
    run systemctl reload-or-restart predmaint-firewall.service # a reload puts the new rules in the place of the old ones: no moment without
    FIREWALL_CHANGED=no
}
put_rules() {
    put_file "$@"
    FIREWALL_CHANGED=yes
}
firewall() {
    if [[ $FIREWALL == no ]]; then
        without predmaint-firewall.service
        return
    fi
    FIREWALL_CHANGED=no
    local v
    for v in 4 6; do
        rules "$v" >"$WORK/firewall.v$v"
        ensure "/etc/predmaint/firewall.v$v" is_file put_rules "$WORK/firewall.v$v" "/etc/predmaint/firewall.v$v" 600
    done
    ensure /usr/local/lib/predmaint/firewall.sh is_file put_rules "$HERE/files/firewall.sh" /usr/local/lib/predmaint/firewall.sh 755
    file "$HERE/files/predmaint-firewall.service" /etc/systemd/system/predmaint-firewall.service
    ensure "the firewall: 8883 for $SENSOR_NETWORKS, SSH and 6443 for $ADMIN_NETWORKS" firewall_current start_firewall
}

# --- 7. the GPU for containers
#
# K3s takes up the runtime `nvidia` where it finds nvidia-container-runtime at its start, and makes the RuntimeClass of that name
# (https://docs.k3s.io/advanced#alternative-container-runtime-support). On a Jetson that runtime must be in its CSV mode, which hands in the files that
# JetPack lists: the device plugin calls the GPU `tegra`, which a runtime in CDI mode can't resolve (https://github.com/kubeedge/kubeedge/issues/6425).
# The CDI specification is for those who ask for nvidia.com/gpu=all by name (https://nvidia-isaac-ros.github.io/getting_started/compute/jetson_vpi.html).
# The plugin knows Tegra since 0.13 with toolkit 1.11 (https://github.com/NVIDIA/k8s-device-plugin/issues/297); 0.17.1 with toolkit 1.17.7 is reported to
# work on an Orin Nano and K3s (https://github.com/NVIDIA/gpu-operator/issues/1453), though with JetPack 6.1, a containerd installed beside K3s, and CDI:
# not with what is set up here. 0.19.3 is reported not to find a Jetson (https://github.com/NVIDIA/k8s-device-plugin/issues/1963). Nobody we know of has
# reported on exactly these parts together, so verify_device.py asks the node whether it offers the GPU. `nvidia-ctk config` exists since 1.14.

toolkit_new() { [[ $(nvidia-ctk --version 2>/dev/null | sed -nE 's/.* ([0-9]+)\.([0-9]+)\..*/\1 \2/p' | head -n1 | awk '{ print $1 * 1000 + $2 }') -ge 1014 ]]; }
csv_mode() { grep -Eq '^ *mode *= *"csv"' /etc/nvidia-container-runtime/config.toml 2>/dev/null; }
set_csv_mode() {
    remember nvidia-mode "$(sed -nE '/^\[nvidia-container-runtime\]/,/^\[/s/^ *mode *= *"(.*)"/\1/p' /etc/nvidia-container-runtime/config.toml 2>/dev/null | grep . || echo auto)"
    run nvidia-ctk config --in-place --set nvidia-container-runtime.mode=csv
    K3S_CHANGED=yes
}
has_cdi() { [[ -s /etc/cdi/nvidia.yaml && ! /etc/nv_tegra_release -nt /etc/cdi/nvidia.yaml ]]; }
make_cdi() {
    run mkdir -p /etc/cdi
    remember cdi ours
    run nvidia-ctk cdi generate --mode=csv --output=/etc/cdi/nvidia.yaml
}

gpu_needs() {
    [[ $PROFILE == jetson ]] || return 0
    need "NVIDIA's container toolkit, 1.14 or later" "apt-get install nvidia-container-toolkit (JetPack's own source of packages has it)" toolkit_new
    need "NVIDIA's container runtime" "apt-get install nvidia-container-toolkit" have nvidia-container-runtime
}
gpu() {
    [[ $PROFILE == jetson ]] || return 0
    ensure "the container runtime in CSV mode" csv_mode set_csv_mode
    ensure "a CDI specification of the GPU, newer than this L4T" has_cdi make_cdi
}

# --- 8. K3s

# One that somebody else installed is left alone: it may have pods of its own, and its data elsewhere.
no_other_k3s() {
    local f
    [[ -z $(before k3s) ]] || return 0
    for f in /usr/local/bin/k3s /etc/systemd/system/k3s{,-agent}.service /var/lib/rancher/k3s; do [[ ! -e $f ]] || return 1; done
}
no_other_kubectl() { [[ ! -e /usr/local/bin/kubectl ]] || links_to k3s /usr/local/bin/kubectl; }
default_route() { [[ -n $(ip -4 route show default; ip -6 route show default) ]]; }
own_address() { [[ $(ip -o address show) == *" $NODE_IP/"* ]]; }

k3s_needs() {
    need "no other K3s" "it was not installed by this script, which does not take it over: take it away (k3s-uninstall.sh), or install the site on another machine" no_other_k3s
    need "no other kubectl at /usr/local/bin/kubectl" "a link to K3s' own goes there: move yours elsewhere (such as /usr/bin), or remove it" no_other_kubectl
    need "a default route" "K3s does not start without one, even where it leads nowhere (https://docs.k3s.io/installation/airgap). Where the plant's network has no
         gateway, give it one that ends here, and write NODE_IP into site.env:
         nmcli connection add type dummy ifname dummy0 con-name dummy0 ipv4.method manual ipv4.addresses 203.0.113.254/31 ipv4.gateway 203.0.113.255 ipv4.route-metric 1000" default_route
    [[ -z $NODE_IP ]] || need "the address $NODE_IP" "NODE_IP in site.env is none of this machine's: $(ip -o address show scope global | awk '{ print $4 }' | paste -sd' ')" own_address
    [[ " $K3S_DISABLE " != *" servicelb "* ]] || die 1 "K3S_DISABLE has servicelb, without which sensors do not reach the broker: take it out of site.env"
    [[ -z $REGISTRIES_FILE ]] || need "$REGISTRIES_FILE" "REGISTRIES_FILE in site.env names a file that is not there" test -f "$REGISTRIES_FILE"
    read -r PROGRAM IMAGES < <(k3s_files "${ARCH:-amd64}")
    if [[ -n $BUNDLE ]]; then
        need "K3s $K3S_VERSION for ${ARCH:-this machine} in the bundle" "the bundle holds $(cat "$BUNDLE/VERSION"): make one with prepare-bundle.sh --arch $ARCH --k3s $K3S_VERSION" \
            test "$(cat "$BUNDLE/VERSION")" = "K3s $K3S_VERSION $ARCH"
        K3S_SUM=$(sed -n "s|  ./k3s/$PROGRAM\$||p" "$BUNDLE/SHA256SUMS")
        [[ -z $(pin "$K3S_VERSION/$PROGRAM") || $(pin "$K3S_VERSION/$PROGRAM") == "$K3S_SUM" ]] ||
            die 3 "K3s in the bundle is not the $K3S_VERSION of $HERE/k3s.sha256: make the bundle again, and ask who made this one"
    else
        need "the program curl" "apt-get install curl, or --offline with a bundle" have curl
        K3S_SUM=$(pin "$K3S_VERSION/$PROGRAM")
        need "the checksum of K3s $K3S_VERSION" "k3s.sha256 has none: prepare-bundle.sh --record takes it from the release" test -n "$K3S_SUM"
    fi
}
is_k3s() { has_sum /usr/local/bin/k3s "$K3S_SUM" && [[ -x /usr/local/bin/k3s ]]; }
put_k3s() {
    local from=$BUNDLE/k3s/$PROGRAM
    if [[ -z $BUNDLE ]]; then
        from=$WORK/$PROGRAM
        if [[ $MODE == dry-run ]]; then
            say "         curl --location --output $from $K3S_URL/${K3S_VERSION/+/%2B}/$PROGRAM   (SHA-256 $K3S_SUM)"
        else
            fetch "$K3S_URL/${K3S_VERSION/+/%2B}/$PROGRAM" "$from"
            has_sum "$from" "$K3S_SUM" || die 3 "K3s as it came is not what k3s.sha256 says: it was not installed. Is there a proxy that changes downloads?"
        fi
    fi
    remember k3s ours
    put_file "$from" /usr/local/bin/k3s 755
}
is_there() { [[ -e $1 ]]; }
make_empty() { run install -D -m 600 /dev/null "$1"; }
links_to() { [[ $(readlink "$2" || true) == "$1" ]]; }
link() { run ln -sfn "$1" "$2"; }
k3s_current() { unit_up k3s.service && [[ $K3S_CHANGED == no ]]; }
start_k3s() {
    run systemctl enable k3s.service
    run systemctl restart k3s.service
    K3S_CHANGED=no
}
node_ready() {
    local i
    for ((i = 0; i < ${READY_TRIES:-1}; i++)); do
        [[ $(k3s kubectl get nodes -o 'jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}' 2>/dev/null) =~ ^True( True)*$ ]] && return
        [[ ${READY_TRIES:-1} == 1 ]] || sleep 5
    done
    return 1
}
wait_ready() {
    say "         waiting for the node, at most five minutes"
    READY_TRIES=60
}

cluster() {
    {
        echo "node-name: ${NODE_NAME:-$(uname -n | tr '[:upper:]' '[:lower:]')}"
        [[ -z $NODE_IP ]] || echo "node-ip: $NODE_IP"
        [[ $NETWORK_POLICIES == yes ]] || echo "disable-network-policy: true" # which may fail half-way on such a kernel
        [[ -z $API_NAMES ]] || printf 'tls-san: [%s]\n' "${API_NAMES// /, }"
        [[ -z $K3S_DISABLE ]] || printf 'disable: [%s]\n' "${K3S_DISABLE// /, }"
    } >"$WORK/site.yaml"
    ensure "K3s $K3S_VERSION" is_k3s put_k3s
    ensure "kubectl" links_to link k3s /usr/local/bin/kubectl
    file "$HERE/files/k3s-config.yaml" /etc/rancher/k3s/config.yaml 600
    file "$WORK/site.yaml" /etc/rancher/k3s/config.yaml.d/site.yaml 600
    file "$HERE/files/pod-security.yaml" /etc/rancher/k3s/pod-security.yaml
    file "$HERE/files/audit.yaml" /etc/rancher/k3s/audit.yaml
    [[ -z $REGISTRIES_FILE ]] || file "$REGISTRIES_FILE" /etc/rancher/k3s/registries.yaml 600
    if [[ -n $BUNDLE ]]; then
        local f
        for f in "$BUNDLE"/k3s/"$IMAGES" "$BUNDLE"/images/*.tar; do
            [[ ! -f $f ]] || file "$f" "$DATA/k3s/agent/images/${f##*/}"
        done
        # K3s imports what is new or changed, and not all of it at each start: https://github.com/k3s-io/k3s, pkg/agent/containerd/watcher.go
        ensure "the list of archives that K3s has imported" is_there make_empty "$DATA/k3s/agent/images/.cache.json"
        [[ ! -f $BUNDLE/manifests/site.yaml ]] || file "$BUNDLE/manifests/site.yaml" "$DATA/manifests/site.yaml"
    fi
    file "$HERE/files/k3s.service" /etc/systemd/system/k3s.service
    ensure "K3s runs, as it is configured" k3s_current start_k3s
    ensure "the node is ready" node_ready wait_ready
}
