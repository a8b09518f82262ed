# shellcheck shell=bash
# What install.sh and prepare-bundle.sh share: words, errors, checksums.

# say TEXT: to the terminal, and with the time to $LOG where there is one.
say() {
    printf '%s\n' "$*"
    [[ -z ${LOG-} ]] || printf '%(%FT%TZ)T  %s\n' -1 "$*" >>"$LOG"
}

# die CODE TEXT: 1 what you gave is wrong, 2 a part is missing or out of reach, 3 a check said no.
die() {
    say "error: $2" >&2
    exit "$1"
}

# pin NAME: the SHA-256 that k3s.sha256 has for version/file, or nothing.
pin() {
    awk -v name="$1" '$1 !~ /^#/ && $2 == name { print $1 }' "$HERE/k3s.sha256"
}

# k3s_files ARCH: the names of the program and of its images in a release, for arm64 or amd64.
k3s_files() {
    [[ $1 == arm64 ]] && echo "k3s-arm64 k3s-airgap-images-arm64.tar.zst" || echo "k3s k3s-airgap-images-amd64.tar.zst"
}

# fetch URL FILE: a download that is whole or not there.
fetch() {
    say "fetching $1"
    curl --fail --silent --show-error --location --retry 3 --connect-timeout 20 --output "$2.part" "$1" ||
        die 2 "$1 can't be had: is this machine connected? A site without the internet is installed from a bundle (prepare-bundle.sh, install.sh --offline)"
    mv "$2.part" "$2"
}

# has_sum FILE DIGEST
has_sum() {
    [[ -f $1 && $(sha256sum <"$1") == "$2  -" ]]
}

# verify_bundle FOLDER [DIGEST]: every file is what SHA256SUMS says, none is missing and none is there beside; the list itself has the given digest.
verify_bundle() {
    [[ -f $1/SHA256SUMS ]] || die 1 "$1 is no bundle: it has no SHA256SUMS. Make one with prepare-bundle.sh"
    [[ -z ${2-} ]] || has_sum "$1/SHA256SUMS" "$2" ||
        die 3 "$1/SHA256SUMS is not the list with the digest $2 that you gave: this is another bundle, or somebody changed it"
    local wrong
    wrong=$(cd "$1" && sha256sum --check --quiet --strict SHA256SUMS 2>&1) ||
        die 3 "the bundle is damaged, and nothing was changed. Copy it again from where it was made:"$'\n'"$wrong"
    wrong=$(cd "$1" && diff <(cut -c67- SHA256SUMS | LC_ALL=C sort) <(find . -type f ! -path ./SHA256SUMS | LC_ALL=C sort)) ||
        die 3 "the bundle holds what its list does not, or the other way round:"$'\n'"$wrong"
}
