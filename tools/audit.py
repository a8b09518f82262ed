"""Known holes in what is pinned: each line of constraints.txt is asked for at OSV (https://osv.dev) by pip-audit.

    python tools/audit.py [FILE] [--osv-url URL]

Ends with 0 where none is known, 3 where one is, and 2 where that can't be asked: without the network nobody has looked, and that is said.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = "2.10.1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "constraints.txt", help="pins, one a line")
    parser.add_argument("--osv-url", default="https://api.osv.dev/v1/query", help="another server of that database")
    args = parser.parse_args()
    program = shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which("pip-audit")
    if program is None:
        print(f"not audited: pip-audit is not installed: pipx install pip-audit=={VERSION}", file=sys.stderr)
        return 2
    done = subprocess.run([program, "--no-deps", "--disable-pip", "--progress-spinner=off", "--vulnerability-service=osv", f"--osv-url={args.osv_url}", "--format=json",
                           "--requirement", str(args.file)], capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"not audited: {args.osv_url} can't be asked ({(done.stderr.strip() or 'no answer').splitlines()[-1]:.300}); try again where there is a network", file=sys.stderr)
        return 2
    holes = [(d["name"], d["version"], v) for d in found for v in d.get("vulns", ())]
    for name, version, v in holes:
        print(f"{name} {version}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version yet'}")
    if left_out := [d["name"] for d in found if "skip_reason" in d]:
        print(f"not audited: nothing is known of {', '.join(left_out[:10])}{' and others' * (len(left_out) > 10)}", file=sys.stderr)
    print(f"{len(found) - len(left_out)} packages audited, {len(holes)} known holes")
    return 3 if holes else 2 if left_out or not found else 0


if __name__ == "__main__":
    sys.exit(main())
