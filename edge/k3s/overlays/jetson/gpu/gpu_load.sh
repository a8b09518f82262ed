#!/bin/sh
# What node exporter does not know of a Jetson: how busy its GPU is. The driver says it in thousandths (as tegrastats' GR3D_FREQ, in percent).
set -eu
to=/textfile/gpu.prom
load=$(ls /host/sys/devices/platform/gpu.0/load /host/sys/devices/platform/bus@0/*.gpu/load 2> /dev/null | head -n 1)
[ -n "$load" ] || { echo "no load of a GPU under /sys/devices/platform: is this a Jetson with JetPack 6?" >&2; exit 1; }
while :; do
  {
    echo "# HELP node_gpu_load_ratio How busy the GPU is."
    echo "# TYPE node_gpu_load_ratio gauge"
    awk '{ print "node_gpu_load_ratio", $1 / 1000 }' "$load"
  } > "$to.new"
  mv "$to.new" "$to"
  sleep 15
done
