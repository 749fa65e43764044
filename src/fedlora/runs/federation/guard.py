"""Runs a command that ends with whoever started it, however that ends: `python -m fedlora.runs.federation.guard COMMAND...`.

Its standard input is a pipe that nobody writes to. The pipe closes when its other end is gone, also where that was killed; then the
whole process group ends, in order if it can. Otherwise it ends as the command does.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GOODBYE = 10.0  # seconds that processes have to end by themselves


def _end_with_the_pipe() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock would be held at the end of this process
    os.killpg(0, signal.SIGTERM)  # this process only notes it
    time.sleep(GOODBYE)
    os.killpg(0, signal.SIGKILL)


def main(command: list[str]) -> int:
    """Returns the command's exit status; a signal that ended it ends this process, too."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_pipe, daemon=True).start()
    status = process.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
