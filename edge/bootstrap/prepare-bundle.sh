#!/bin/bash
# Make a bundle for a site without the internet, on a machine that has it: `prepare-bundle.sh --help`.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lib.sh
. "$HERE/lib.sh"

usage() {
    cat <<'TEXT'
usage: prepare-bundle.sh --out FOLDER [--arch arm64|amd64] [--k3s VERSION] [--overlay FOLDER] [--record] [--releases URL]

  --out FOLDER       a new folder, for a USB stick: K3s and its images, the site's manifests and images, this installer, SHA256SUMS
  --arch             of the site's machine; arm64 (Jetson) without it
  --k3s VERSION      without it the one of site.env.example
  --overlay FOLDER   what the site runs, such as edge/k3s/overlays/jetson: rendered by kubectl, its images fetched by podman where they are not here yet
  --record           write this version's checksums into k3s.sha256, from the release's own list: for a version that nobody has pinned yet
  --releases URL     where K3s' releases are, for a mirror of your own

Each file of K3s is held against the release's own list of checksums and against k3s.sha256. The last line printed is the digest of SHA256SUMS: carry it
to the site another way than the stick, and give it to `install.sh --offline FOLDER --sha256 DIGEST`.
TEXT
}

OUT='' ARCH=arm64 OVERLAY='' RECORD=no RELEASES=https://github.com/k3s-io/k3s/releases/download
VERSION=$(sed -n 's/^K3S_VERSION=//p' "$HERE/site.env.example")
while [[ $# -gt 0 ]]; do
    case $1 in
        --out | --arch | --k3s | --overlay | --releases)
            [[ $# -gt 1 ]] || die 1 "$1 wants a value"
            case $1 in --out) OUT=$2 ;; --arch) ARCH=$2 ;; --k3s) VERSION=$2 ;; --overlay) OVERLAY=$2 ;; --releases) RELEASES=$2 ;; esac
            shift
            ;;
        --record) RECORD=yes ;;
        --help | -h)
            usage
            exit
            ;;
        *) die 1 "$1 is not known: prepare-bundle.sh --help" ;;
    esac
    shift
done
[[ -n $OUT ]] || die 1 "where to? --out FOLDER"
[[ $ARCH == arm64 || $ARCH == amd64 ]] || die 1 "--arch $ARCH: arm64 or amd64 is expected"
[[ ! -e $OUT ]] || die 1 "$OUT is there already: a bundle is made in a new folder"
mkdir -p "$OUT/k3s" "$OUT/images" "$OUT/manifests"
trap '[[ -f $OUT/SHA256SUMS ]] || rm -rf "$OUT"' EXIT

LIST=$OUT/k3s/sha256sum-$ARCH.txt
fetch "$RELEASES/${VERSION/+/%2B}/sha256sum-$ARCH.txt" "$LIST"
for f in $(k3s_files "$ARCH"); do
    fetch "$RELEASES/${VERSION/+/%2B}/$f" "$OUT/k3s/$f"
    sum=$(awk -v name="$f" '{ sub(/^\*/, "", $2) } $2 == name { print tolower($1) }' "$LIST")
    [[ $sum =~ ^[0-9a-f]{64}$ ]] || die 3 "the release's list has no checksum of $f"
    has_sum "$OUT/k3s/$f" "$sum" || die 3 "$f is not what the release's own list says: the download is damaged, or somebody is in between"
    pinned=$(pin "$VERSION/$f")
    if [[ -n $pinned && $pinned != "$sum" ]]; then
        die 3 "$f of $VERSION is $sum, and k3s.sha256 says $pinned: find out which of them is wrong before you install it"
    elif [[ -z $pinned && $RECORD == yes ]]; then
        printf '%s  %s\n' "$sum" "$VERSION/$f" >>"$HERE/k3s.sha256"
        say "recorded $VERSION/$f in k3s.sha256: look at it, and commit it"
    elif [[ -z $pinned ]]; then
        say "note: $VERSION/$f is not in k3s.sha256; only the release's own list vouches for it (--record to pin it)"
    fi
done

# Images are kept under a name with a tag: K3s takes images from archives by their tags, so a digest in the manifests becomes one. What an archive holds is
# checked by SHA256SUMS.
if [[ -n $OVERLAY ]]; then
    SITE=$OUT/manifests/site.yaml
    kubectl kustomize "$OVERLAY" >"$SITE" || die 1 "kubectl can't render $OVERLAY"
    sed -nE 's/^[[:space:]-]*image:[[:space:]]*"?([^"[:space:]]+)"?$/\1/p' "$SITE" | sort -u >"$OUT/images/names"
    while read -r image; do
        name=${image%@*}
        if [[ $image == *@sha256:* ]]; then
            [[ ${name##*/} == *:* ]] || name=$name:${image: -12}
            sed -i "s|$image|$name|" "$SITE"
        fi
        from=${image%%@*}
        [[ ${from##*/} != *:* || $image != *@* ]] || from=${from%:*} # podman takes a tag or a digest, not both
        [[ $image != *@* ]] || from=$from@${image#*@}
        podman image exists "$from" || podman pull --quiet --arch "$ARCH" "$from" >/dev/null ||
            die 2 "the image $from can't be had: build it here, or log in to its registry (podman login)"
        [[ $(podman image inspect --format '{{.Architecture}}' "$from") == "$ARCH" ]] || die 1 "$from is here for another architecture than $ARCH: remove it (podman rmi), and run this again"
        podman tag "$from" "$name"
        file=${name//[\/:]/_}.tar
        podman save --quiet --format oci-archive --output "$OUT/images/$file" "$name"
        say "saved $name"
    done <"$OUT/images/names"
fi

cp -r "$HERE" "$OUT/installer"
rm -rf "$OUT/installer/site.env" "$OUT/installer/__pycache__"
install -D -m 644 "$HERE/../triton/canary.py" "$OUT/triton/canary.py" # where verify_device.py looks for it
echo "K3s $VERSION $ARCH" >"$OUT/VERSION"
(cd "$OUT" && find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum) >"$OUT.sums"
mv "$OUT.sums" "$OUT/SHA256SUMS"
verify_bundle "$OUT"
say "$OUT is ready: $(du -sh "$OUT" | cut -f1)"
sha256sum <"$OUT/SHA256SUMS" | cut -d' ' -f1
