"The audit of what is pinned, against a stand-in of the database: what it says of a hole, of none, and of a database that is not there."

import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pdm.process import free_port

TOOL = Path(__file__).resolve().parent.parent / "tools/audit.py"
pytestmark = pytest.mark.skipif(not (shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which("pip-audit")),
                                reason="pip-audit is not installed: pip install pip-audit")


@pytest.fixture
def database():
    "It knows a hole in one version of one package."
    class Osv(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hole = {"id": "PYSEC-1", "details": "a hole", "affected": [{"package": asked["package"], "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}]}]}
            body = json.dumps({"vulns": [hole]} if (asked["package"]["name"], asked["version"]) == ("leaky", "1.0") else {}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    server.server_close()
    thread.join()


def audit(file: Path, url: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, file, "--osv-url", url], capture_output=True, text=True)


def test_a_known_hole_is_named_with_the_version_that_mends_it(tmp_path, database):
    (pins := tmp_path / "pins.txt").write_text("sound==1.0\nleaky==1.0\n")
    done = audit(pins, database)
    assert done.returncode == 3 and "leaky 1.0: PYSEC-1, mended in 2.0" in done.stdout and "2 packages audited, 1 known holes" in done.stdout, done.stderr


def test_where_no_hole_is_known_it_ends_with_0(tmp_path, database):
    (pins := tmp_path / "pins.txt").write_text("sound==1.0\nleaky==2.0\n")
    done = audit(pins, database)
    assert done.returncode == 0 and "2 packages audited, 0 known holes" in done.stdout, done.stderr


def test_where_the_database_can_not_be_asked_nobody_says_that_all_is_well(tmp_path):
    (pins := tmp_path / "pins.txt").write_text("sound==1.0\n")
    done = audit(pins, f"http://127.0.0.1:{free_port()}/v1/query")
    assert done.returncode == 2 and "not audited: " in done.stderr and "ConnectionError" in done.stderr and "audited, 0" not in done.stdout
