#!/bin/bash
# Put the site's firewall in place, or take it away: firewall.sh start|stop. Its rules are /etc/predmaint/firewall.{v4,v6}, in the form of iptables-restore.
#
# They stand in mangle's PREROUTING, where a packet still has the port that its sender asked for. In filter's INPUT they would see nothing of the broker:
# Kubernetes rewrites the addresses of its services before, and such packets are forwarded. A table is replaced as a whole, so that there is no moment
# without rules. A session that begun before them goes on where its sender may come in (install.sh asks for that). iptables, since K3s needs it anyway: the kernel of JetPack 6 can't do all of nftables.
set -euo pipefail

for v in 4 6; do
    [[ $v == 4 ]] && tables=iptables || tables=ip6tables
    [[ $v == 4 || -e /proc/net/if_inet6 ]] || continue # a kernel without IPv6
    case ${1-} in
        start)
            "$tables-restore" --wait --noflush <"/etc/predmaint/firewall.v$v"
            "$tables" --wait -t mangle -C PREROUTING -j PREDMAINT 2>/dev/null || "$tables" --wait -t mangle -I PREROUTING 1 -j PREDMAINT
            ;;
        stop)
            while "$tables" --wait -t mangle -D PREROUTING -j PREDMAINT 2>/dev/null; do :; done
            "$tables" --wait -t mangle -F PREDMAINT 2>/dev/null || continue # there is none
            "$tables" --wait -t mangle -X PREDMAINT
            ;;
        *)
            echo "usage: firewall.sh start|stop" >&2
            exit 1
            ;;
    esac
done
