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
        Child([sys.argv[4], "-c", "import time; time.sleep(5)"], sys.argv[3])
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


TWICE = """
import signal
from pdm.process import _signals_later, stopping

with stopping() as stop:
    try:
        with _signals_later():
            signal.raise_signal(signal.SIGTERM)
            print("later")
            signal.raise_signal(signal.SIGINT)
            print("never")
    except KeyboardInterrupt:
        print("now", stop.is_set())
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


@pytest.mark.parametrize("program", [sys.executable, "/no/such/program"], ids=["program", "no such program"])
@pytest.mark.parametrize("when", ["before", "after_in_parent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_while_python_forks_is_raised_once_the_child_is_there_and_ends_it(tmp_path, number, when, program):
    done = subprocess.run([sys.executable, "-c", FORKED, str(int(number)), when, tmp_path / "log", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.stderr) == (["told True", "as before", "True", "no child left"], "")


def test_who_asks_twice_does_not_wait():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.stderr) == (["later", "now True", "True True"], "")
