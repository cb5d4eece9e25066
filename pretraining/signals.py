"""Signals by which a scheduler asks a run to end soon, and the exit status that says that it did."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again


class StopSignals:
    """
    Within this context a signal of SIGNALS is noted, and does nothing else: the loop ends after the step it is in.
    """

    def __init__(self):
        self._received = 0

    def received(self) -> int:
        """The signal's number, 0 if there was none."""
        return self._received

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
