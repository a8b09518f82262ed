#!/bin/sh
# Starts the broker. A state that the last start did not live to save again, which it does each minute and at its end, is put aside: it can't be
# read, or takes more memory than there is, and mosquitto would end the same way each time. Losing it costs time, not windows.
set -eu
cd /mosquitto/data
if [ -e tried ] && [ -e mosquitto.db ] && [ -n "$(find mosquitto.db ! -newer tried)" ]; then
    echo "the last start ended early: mosquitto.db, which it began with, is now mosquitto.db.aside" >&2
    mv mosquitto.db mosquitto.db.aside
fi
touch tried
exec mosquitto -c /mosquitto/config/mosquitto.conf
