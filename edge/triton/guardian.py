"""Run tritonserver, and leave nothing behind: no process, no shared memory, no folder.

    python -I -S guardian.py '{"command": [...], "env": {...}, "log": "file", "log_bytes": 16000000, "folder": "folder",
                                   "shared": ["prefix", ...]}'

It prints the server's process id. It ends when the server ends, having printed how, or when its standard input closes or its
parent changes; one of these happens in whichever way the parent ends, SIGKILL included. Standard library only: it is
started by path.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
ENVIRONMENTS = "/tmp/python_env_*"  # noqa: S108 (there Triton's python backend makes an empty one, and removes it only in an orderly end)
SHARED = Path("/dev/shm")  # noqa: S108 (there shm_open makes its files)


def die_with_parent() -> None:
    "In the server, before it starts: should the guardian itself be killed, the kernel kills the server."
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def say(text: str) -> None:
    "To whoever started us, who may be gone."
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end


def cut(log: Path, most: int) -> None:
    "A log that is larger than that becomes `.1`, and goes on empty. The server appends, so that it may keep it open."
    if log.stat().st_size > most:
        shutil.copyfile(log, f"{log}.1")
        os.truncate(log, 0)


def run(order: dict) -> None:
    "Until the server ends, or is no longer wanted."
    parent, stopped = os.getppid(), []
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stopped.append(number))
    file = Path(order["log"])
    with file.open("ab") as log:
        server = subprocess.Popen(order["command"], env=order["env"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                  start_new_session=True, preexec_fn=die_with_parent)
    try:
        say(str(server.pid))
        while server.poll() is None and not stopped and os.getppid() == parent:
            cut(file, order["log_bytes"])
            if sys.stdin in select.select([sys.stdin, wake], [], [], 0.5)[0]:
                break
        else:
            if server.returncode is not None:
                code = server.returncode
                how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
                say(how + "\n" + file.read_text(errors="replace")[-4000:])
    finally:
        try:
            os.killpg(server.pid, signal.SIGKILL)  # the stubs are in the server's group, and outlive it by many seconds
        except ProcessLookupError:
            pass
        server.wait()


def main() -> None:
    order = json.loads(sys.argv[1])
    others = set(Path("/").glob(ENVIRONMENTS[1:]))
    try:
        run(order)
    finally:
        shutil.rmtree(order["folder"], ignore_errors=True)
        for prefix in order["shared"]:
            for region in SHARED.glob(f"{prefix}*"):
                region.unlink(missing_ok=True)
        for folder in set(Path("/").glob(ENVIRONMENTS[1:])) - others:
            try:
                folder.rmdir()  # only an empty one, which no other server needs either
            except OSError:
                continue


if __name__ == "__main__":
    main()
