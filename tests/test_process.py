"Signals that come at the worst moment."

import signal
import subprocess
import sys

import pytest

FORKED = """
import os, signal, sys
from pdm.process import Child, stopping

def at_fork():
    signal.raise_signal(int(sys.argv[1]))  # in a handler of fork, where what is raised is only printed

os.register_at_fork(**{sys.argv[2]: at_fork})
with stopping() as stop:
    try:
        Child([sys.executable, "-c", "import time; time.sleep(5)"], sys.argv[3])
    except KeyboardInterrupt:
        print("told", stop.is_set())
with stopping():
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        print("as before")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
try:
    os.wait()
except ChildProcessError:
    print("no child left")
"""


@pytest.mark.parametrize("when", ["before", "after_in_parent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_while_python_forks_is_raised_once_the_child_is_there_and_ends_it(tmp_path, number, when):
    done = subprocess.run([sys.executable, "-c", FORKED, str(int(number)), when, tmp_path / "log"], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.stderr) == (["told True", "as before", "True", "no child left"], "")
