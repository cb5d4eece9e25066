"""Signals by which a scheduler asks a run to end soon, and the exit status that says that it did."""

import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "torch.distributed.run", "accelerate.commands.launch"}
PR_SET_PDEATHSIG = 1  # of Linux, see prctl(2)


class StopSignals:
    """
    Within this context a signal of SIGNALS ends the process at once, as there is nothing to save, until `defer` is
    called: from then on it is noted, and does nothing else, until `end_at_once`.
    """

    def __init__(self):
        self._received = 0
        self._ends: str | None = "before the first step"

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        self._ends = None

    def end_at_once(self, where: str) -> None:
        """As there is nothing to save any more; a signal that was noted does it now."""
        self._ends = where
        if self._received:
            self._receive(self._received, None)

    def received(self) -> int:
        """The signal's number, 0 if there was none."""
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if self._ends is not None:
            print(f"stopped by {signal.Signals(number).name} {self._ends}", file=sys.stderr, flush=True)
            os._exit(STOPPED)


def ignore_signals() -> None:
    """For a data loader's workers, which may get what is meant for their process: it ends them by `kill_workers`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Those that are left at the end: Python's own way, SIGTERM, would wait for ever for what ignores it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would make an error of it
    for worker in multiprocessing.active_children():
        if worker.daemon:  # as data loaders start them
            worker.kill()


def follow_launcher() -> None:
    """
    Have the system send SIGTERM to this process when the launcher that started it dies: some do not pass on that they
    were killed, and the training would go on alone. Only Linux can.
    """
    command = Path(f"/proc/{os.getppid()}/cmdline")
    words = command.read_bytes().decode(errors="replace").split("\0") if command.exists() else []
    if LAUNCHERS & {Path(word).name for word in words[:3]}:  # as in `python -m torch.distributed.run`
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
