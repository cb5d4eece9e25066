"""Signals by which a scheduler, or somebody with Ctrl-C, asks a run to end soon, and the exit status that says so."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
INTERRUPTED = 128 + signal.SIGINT  # as of a shell's own commands
ECHO_SECONDS = 1.0  # a launcher passes on the Ctrl-C that the terminal has sent already
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "torch.distributed.run", "accelerate.commands.launch"}
PR_SET_PDEATHSIG = 1  # of Linux, see prctl(2)


class StopSignals:
    """
    Within this context a signal of SIGNALS ends the process at once, as there is nothing to save, until `defer` is
    called: from then on it is noted, and does nothing else, until `end_at_once`. Of Ctrl-C that is said, and a second
    one raises KeyboardInterrupt.
    """

    def __init__(self):
        self._received = 0
        self._interrupted_at = 0.0
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
        """The first signal's number, 0 if there was none."""
        return self._received

    def exit_status(self) -> int:
        return INTERRUPTED if self._received == signal.SIGINT else STOPPED

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        if self._ends is not None:
            print(f"stopped by {signal.Signals(number).name} {self._ends}", file=sys.stderr, flush=True)
            os._exit(self.exit_status())
        if number == signal.SIGINT:
            self._interrupt()

    def _interrupt(self) -> None:
        now = time.monotonic()
        if not self._interrupted_at:
            self._interrupted_at = now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("\nCtrl-C: a checkpoint is saved after this step; once more ends it at once", file=sys.stderr)
        elif now - self._interrupted_at > ECHO_SECONDS:
            raise KeyboardInterrupt


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
