"""Loaded by the Python of an elf.py under test (PYTHONPATH): fsync() takes $SLOW s, and the $STEPS-th kills."""

import os
import signal
import time

_fsync = os.fsync
_left = int(os.environ["STEPS"])


def _slow_or_dead(descriptor: int) -> None:
    global _left
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ["SLOW"]))
    _fsync(descriptor)


os.fsync = _slow_or_dead  # type: ignore[assignment]
