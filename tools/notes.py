"""What CHANGELOG.md says of a version, for its release: `python tools/notes.py v0.1.0`. The version must be that of pyproject.toml, and no longer `(unreleased)`."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(tag: str, changelog: str, version: str) -> str:
    "Raises `ValueError` with what is to be done where the three don't fit together."
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag} and pyproject.toml says {version}: expected the tag v{version}; change the version and tag again")
    found = re.search(rf"^## {re.escape(version)}(.*?)\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if not found or not found[2].strip():
        raise ValueError(f"CHANGELOG.md says nothing of {version}: write a section `## {version} (date)`")
    if "unreleased" in found[1]:
        raise ValueError(f"CHANGELOG.md calls {version} unreleased: put the date in its place, and tag again")
    return found[2].strip() + "\n"


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]), end="")
    except ValueError as e:
        sys.exit(str(e))
