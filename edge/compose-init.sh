#!/bin/sh
# Makes what must be secret on a laptop's site, in the volume at /state, once: certificates, tokens, and who is told of alarms. Each start renews what runs out.
# It runs in the updater's image; see compose.yaml.
set -eu
umask 027
cd /state
predmaint pki init pki --site "$SITE"
predmaint pki issue pki mosquitto --host mosquitto --host localhost --host 127.0.0.1 --renew-before 30
predmaint pki issue pki agent --renew-before 30
chmod -R g+rX pki/servers # the broker reads them by its group; the volume's other folders it never sees
mkdir -p tokens alerts
for name in PREDMAINT_INFLUX_TOKEN influx-password grafana-password; do
    [ -s "tokens/$name" ] || head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"tokens/$name"
done
printf %s "$PAGE_URL" >alerts/webhook-url
printf %s "$NOTE_URL" >alerts/note-url
chmod g+rX . tokens alerts
