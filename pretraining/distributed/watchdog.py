"""Which process is missing, when the others wait for it."""

import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

ANSWER_SECONDS = 5.0


class Watchdog:
    """
    A process that died or stalls leaves the others waiting, or with an error of the network that does not say whose
    fault it is. Then they call the roll, by the store through which they found each other, where a thread of each
    living process answers, also while the process itself waits: who does not answer is missing, who does says what it
    is doing. They print it and exit with status 1. A context manager, for what the processes do together.

    Args:
        limit: seconds after which what `doing` announced counts as stalled.
    """

    def __init__(self, state: PartialState, limit: float):
        self.rank, self.limit = state.process_index, limit
        self.others = [rank for rank in range(state.num_processes) if rank != state.process_index]
        self.activity, self.deadline = "starting", float("inf")
        self.answered = 0  # roll calls
        self.is_over = threading.Event()
        self.threads: list[threading.Thread] = []
        self.store: Any = None  # of a process by itself
        if self.others and "MASTER_PORT" in os.environ:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS))
            # A launcher's store outlives the processes that it starts again.
            self.store = dist.PrefixStore(f"watchdog {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def __enter__(self) -> "Watchdog":
        if self.store is not None:
            self.threads = [threading.Thread(target=target, daemon=True) for target in (self._answer, self._watch)]
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.deadline = float("inf")
        # An error of gloo or NCCL, say.
        if self.store is not None and isinstance(error, RuntimeError) and (lines := self._call_roll()):
            traceback.print_exception(error)
            self._leave(lines)
        self.is_over.set()
        # Python ends a thread that comes back from C++ while the interpreter shuts down in a way that C++ takes for an
        # error, and aborts: "terminate called without an active exception". So wait for one that asks the store.
        for thread in self.threads:
            thread.join(2 * ANSWER_SECONDS)

    def doing(self, activity: str, limited: bool = True) -> None:
        """
        What the process does from here on.

        Args:
            limited: it may take no longer than `limit`.
        """
        self.activity = activity
        self.deadline = time.monotonic() + self.limit if limited else float("inf")

    def _watch(self) -> None:
        while not self.is_over.wait(min(0.5, self.limit / 10)):
            if time.monotonic() > self.deadline:
                here = f"after {self.limit:g} seconds this one is still {self.activity}"
                lines = self._call_roll()
                if time.monotonic() > self.deadline:  # else this process went on while it called
                    self._leave(lines or [f"all processes answer, but none goes on: {here}"])

    def _answer(self) -> None:
        try:
            while not self.is_over.wait(min(0.5, self.limit / 10)):
                called = self.store.add("calls", 0)
                for call in range(self.answered + 1, called + 1):
                    self.store.set(f"{call}/{self.rank}", self.activity)
                self.answered = called
        except dist.DistError:  # the process that has the store has ended: the others will notice
            return

    def _call_roll(self) -> list[str]:
        """A line for each process that does not answer, or does something else than this one, which waits for it."""
        # The store is with process 0. If that stalls, the store's time-out is not kept.
        guard = threading.Timer(2 * ANSWER_SECONDS, lambda: self._leave(self._without_store()))
        guard.daemon = True
        guard.start()
        try:
            call = self.store.add("calls", 1)
            until = time.monotonic() + ANSWER_SECONDS
            absent = self.others
            while absent and time.monotonic() < until:
                time.sleep(0.1)
                absent = [rank for rank in self.others if not self.store.check([f"{call}/{rank}"])]
            # Who has left because of a third one has said so.
            lines = [
                f"process {rank} does not answer: it has died or stalls"
                for rank in absent
                if not self.store.check([f"left/{rank}"])
            ]
            for rank in self.others:
                if rank not in absent and (activity := self.store.get(f"{call}/{rank}").decode()) != self.activity:
                    lines.append(f"process {rank} is {activity}, this one is {self.activity}")
            if absent:
                self.store.set(f"left/{self.rank}", "")
            return lines or [f"process {rank} has left, and has said why" for rank in absent]
        except dist.DistError:
            return self._without_store()
        finally:
            guard.cancel()

    def _without_store(self) -> list[str]:
        if self.answered:
            return ["process 0 has left, after a roll call: who called it has said why"]
        return ["process 0 does not answer: it has died or stalls"]

    def _leave(self, lines: list[str]) -> None:
        """At once: to leave in the usual way is to wait for the others."""
        name = Path(sys.argv[0]).name
        for line in lines:
            print(f"{name}: error: {line} (said by process {self.rank})", file=sys.stderr, flush=True)
        os._exit(1)
