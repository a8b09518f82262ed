#!/usr/bin/env bash
# Push images that build.sh has built, and join those of several machines under one name:
#   PREFIX=REGISTRY/FOLDER/ TAG=0.1.0 edge/images/publish.sh push FOLDER ARCH       on the machine that built TAG-ARCH; FOLDER has a NAME.spdx.json for each
#   PREFIX=REGISTRY/FOLDER/ TAG=0.1.0 edge/images/publish.sh join FOLDER            FOLDER/*/ is what those machines have in theirs; signs with cosign
# `push` leaves NAME.digest beside each list, `join` FOLDER/digests.txt. Who logs in to the registry is the caller.
set -euo pipefail
: "${PREFIX:?PREFIX is missing: a registry and its folder, with a slash at the end}" "${TAG:?TAG is missing: the version}"
what=${1:?push or join} folder=${2:?the folder with what the images are made of}
image_of() { # NAME TAG
  case $1 in jetson) echo "${PREFIX}predmaint-triton:$2-jetson" ;; *) echo "${PREFIX}predmaint-$1:$2" ;; esac
}
shopt -s nullglob
case $what in
  push)
    arch=${3:?the architecture}
    for list in "$folder"/*.spdx.json; do
      name=$(basename "$list" .spdx.json) image=
      image=$(image_of "$name" "$TAG-$arch")
      podman push --digestfile "$folder/digest" "$image"
      echo "${image%:*}@$(cat "$folder/digest")" > "$folder/$name.digest"
      rm "$folder/digest"
    done ;;
  join)
    : > "$folder/digests.txt"
    for name in $(for file in "$folder"/*/*.digest; do basename "$file" .digest; done | sort -u); do
      image=$(image_of "$name" "$TAG")
      parts=()
      for file in "$folder"/*/"$name.digest"; do
        part=$(cat "$file")
        parts+=("docker://$part")
        cosign attest --yes --type spdxjson --predicate "${file%.digest}.spdx.json" "$part"
      done
      podman manifest create "$image" "${parts[@]}" >/dev/null
      podman manifest push --all --digestfile "$folder/digest" "$image" "docker://$image"
      whole=${image%:*}@$(cat "$folder/digest")
      cosign sign --yes "$whole"
      echo "$whole ${image##*/}" >> "$folder/digests.txt"
      rm "$folder/digest"
    done
    cat "$folder/digests.txt" ;;
  *) echo "$what: expected push or join" >&2; exit 1 ;;
esac
