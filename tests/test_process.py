"Signals that come at the worst moment, or to the wrong process."

import os
import signal
import subprocess
import sys
import time

import pytest

from pdm.process import Child

FORKED = """
import os, signal, sys
from pdm.process import Child, stopping

def at_fork():
    signal.raise_signal(int(sys.argv[1]))  # in a handler of fork, where what is raised is only printed

os.register_at_fork(**{sys.argv[2]: at_fork})
before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
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
print([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before)
try:
    os.wait()
except ChildProcessError:
    print("no child left")
"""


TWICE = """
import signal
from pdm.process import _signals_later, stopping

before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
with stopping() as stop:
    try:
        with _signals_later():
            signal.raise_signal(signal.SIGTERM)
            print("later")
            signal.raise_signal(signal.SIGINT)
            print("never")
    except KeyboardInterrupt:
        print("now", stop.is_set())
print([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before)
"""


@pytest.mark.parametrize("program", [sys.executable, "/no/such/program"], ids=["program", "no such program"])
@pytest.mark.parametrize("when", ["before", "after_in_parent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_while_python_forks_is_raised_once_the_child_is_there_and_ends_it(tmp_path, number, when, program):
    done = subprocess.run([sys.executable, "-c", FORKED, str(int(number)), when, tmp_path / "log", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.stderr) == (["told True", "as before", "True", "no child left"], "")


def test_who_asks_twice_does_not_wait():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.stderr) == (["later", "now True", "True"], "")


PARENT = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)"


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_a_child_has_started_ends_with_it_and_its_number_is_signalled_only_while_it_is_its_own(tmp_path, monkeypatch):
    signalled = []

    def killpg(pid, number):
        signalled.append(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT).si_pid == pid)  # dead, and nobody has taken its exit code
        os.kill(-pid, number)

    monkeypatch.setattr(os, "killpg", killpg)
    child = Child([sys.executable, "-c", PARENT], tmp_path / "log")
    end = time.monotonic() + 30
    while child.alive and time.monotonic() < end:
        time.sleep(0.01)
    grandchild = int((tmp_path / "log").read_text())
    while not gone(grandchild) and time.monotonic() < end:
        time.sleep(0.01)
    assert gone(grandchild) and signalled == [True]
    assert (child.stop(), child.kill(), signalled) == (0, 0, [True])  # its number may be somebody else's by now


def test_a_child_that_ends_while_it_is_asked_whether_it_runs_leaves_nothing_either(tmp_path, monkeypatch):
    ask, late = os.waitid, [None]  # the first answer is of the moment before its end
    child = Child([sys.executable, "-c", PARENT], tmp_path / "log")
    ask(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(os, "waitid", lambda *how: late.pop() if late else ask(*how))
    assert child.alive and not child.alive
    grandchild, end = int((tmp_path / "log").read_text()), time.monotonic() + 30
    while not gone(grandchild) and time.monotonic() < end:
        time.sleep(0.01)
    assert gone(grandchild)
