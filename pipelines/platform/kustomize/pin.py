"""Write the digests of an overlay's images into its images/kustomization.yaml: python pin.py overlays/gke [NAME=sha256:...]. It asks crane for the others."""

import re
import subprocess
import sys
from pathlib import Path

import yaml


def pin(
    file: Path,               # images/kustomization.yaml
    given: dict[str, str],    # digests by name of the image
) -> dict[str, str]:
    "The digests by name, now in the file. Only images that have a digest already get one. Raises `ValueError` where one is none."
    text, digests = file.read_text(), {}
    for image in yaml.safe_load(text)["images"]:
        if "digest" not in image:
            continue
        name, reference = image["name"], f"{image['newName']}:{image['newTag']}"
        digest = given.get(name) or subprocess.run(["crane", "digest", reference], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S607 (whichever crane the user has)
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is no digest of {reference}: expected sha256: and 64 hexadecimal digits")
        text = re.sub(rf"(- name: {name}\n(?:    .*\n)*?    digest: )\S+", rf"\g<1>{digest}", text)
        digests[name] = digest
    file.write_text(text)
    return digests


if __name__ == "__main__":
    for name, digest in pin(Path(sys.argv[1], "images/kustomization.yaml"), dict(a.split("=", 1) for a in sys.argv[2:])).items():
        print(name, digest)
