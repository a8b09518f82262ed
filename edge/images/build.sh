#!/usr/bin/env bash
# Build the site's images with podman, from anywhere in the repository:
#   BASE=<a Python 3.11 image>@sha256:<digest> edge/images/build.sh [agent sinks updater triton]
#   TRITON=<…/tritonserver:YY.MM-py3-igpu>@sha256:<digest> edge/images/build.sh jetson
# Also: TAG, PREFIX (a registry and its folder, with a slash at the end), IMAGE_FLAGS (to podman build, such as --secret id=pip,src=…),
#   PLATFORMS=linux/amd64,linux/arm64 (a manifest for both; what is not this machine's own runs through qemu-user-static), and
#   OUT=folder, for what each image (not a manifest) is made of, NAME.spdx.json; it needs syft, which `make platform-env` brings.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${BASE:=}" "${TRITON:=}" "${PREFIX:=}" "${IMAGE_FLAGS:=}" "${PLATFORMS:=}" "${OUT:=}"
: "${TAG:=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}"
PATH=$PATH:$PWD/.venv-platform/bin
[ $# -gt 0 ] || set -- agent sinks updater triton
for name; do
  from=BASE file=Containerfile target=(--target "$name") image=predmaint-$name:$TAG
  case $name in
    agent|sinks|updater) ;;
    triton) file=Containerfile.triton ;;
    jetson) from=TRITON file=Containerfile.jetson target=() image=predmaint-triton:$TAG-jetson ;;
    *) echo "$name is no image: expected agent, sinks, updater, triton or jetson" >&2; exit 1 ;;
  esac
  [ -n "${!from}" ] || { echo "$from is missing: $from=NAME@sha256:DIGEST edge/images/build.sh $name" >&2; exit 1; }
  if [ -n "$PLATFORMS" ]; then to=(--platform "$PLATFORMS" --manifest "$PREFIX$image"); else to=(-t "$PREFIX$image"); fi
  # the label that changes with each commit comes last, so that what lies below stays the same layers, and as an argument before the last RUN: a cached image is
  # made anew for nothing else. Format docker, for the HEALTHCHECK.
  # shellcheck disable=SC2086  # IMAGE_FLAGS are words
  podman build --format docker -f "edge/images/$file" "${target[@]}" "${to[@]}" --build-arg "$from=${!from}" \
    --build-arg "REVISION=$(git rev-parse HEAD)" --label "org.opencontainers.image.version=$TAG" \
    --label "org.opencontainers.image.base.name=${!from}" $IMAGE_FLAGS .
  if [ -n "$OUT" ]; then
    command -v syft >/dev/null || { echo "syft is missing: make platform-env" >&2; exit 2; }
    mkdir -p "$OUT"
    archive=$(mktemp -u --tmpdir predmaint-XXXXXX.tar)
    trap 'rm -f "$archive"' EXIT
    podman save -q --format docker-archive -o "$archive" "$PREFIX$image"
    SYFT_CHECK_FOR_APP_UPDATE=false syft scan -q "docker-archive:$archive" --source-name "predmaint-$name" --source-version "$TAG" -o "spdx-json=$OUT/$name.spdx.json"
    rm -f "$archive"
  fi
done
