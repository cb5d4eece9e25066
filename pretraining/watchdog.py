"""Which process is missing, when the others wait for it."""

import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist
from accelerate import PartialState

ANSWER_SECONDS = 5.0


class Watchdog(threading.Thread):
    """
    A process that died or stalls leaves the others waiting, or with an error of the network that does not say whose
    fault it is. Then they call the roll, by the store through which they found each other, where this thread of each
    living process answers, also while the process itself waits: who does not answer is missing, who does says what it
    is doing. They print it and exit with status 1. A context manager, for what the processes do together.

    Args:
        limit: seconds after which what `doing` announced counts as stalled.
    """

    def __init__(self, state: PartialState, limit: float):
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.limit = state.process_index, limit
        self.others = [rank for rank in range(state.num_processes) if rank != state.process_index]
        self.activity, self.deadline = "starting", float("inf")
        self.is_over = threading.Event()
        self.store = None
        if self.others and "MASTER_PORT" in os.environ:
            self.store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=ANSWER_SECONDS),
            )

    def __enter__(self) -> "Watchdog":
        if self.store is not None:
            self.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.deadline = float("inf")
        self.is_over.set()
        # An error of gloo or NCCL, say.
        if self.store is not None and isinstance(error, RuntimeError) and (lines := self.missing() + self.elsewhere()):
            traceback.print_exception(error)
            self.leave(lines)

    def doing(self, activity: str, limited: bool = True) -> None:
        """
        What the process does from here on.

        Args:
            limited: it may take no longer than `limit`.
        """
        self.activity = activity
        self.deadline = time.monotonic() + self.limit if limited else float("inf")

    def run(self) -> None:
        while not self.is_over.wait(min(0.5, self.limit / 10)):
            if time.monotonic() > self.deadline:
                here = f"after {self.limit:g} seconds this one is still {self.activity}"
                self.leave(self.missing() + self.elsewhere() or [f"all processes answer, but none goes on: {here}"])
            try:
                if self.store.check(["roll call"]):
                    self.store.set(f"here/{self.rank}", self.activity)
            except dist.DistError:  # the process that has the store has ended: the others will notice
                return

    def missing(self) -> list[str]:
        """Call the roll. A line for each process that does not answer."""
        try:
            self.store.set(f"here/{self.rank}", self.activity)
            self.store.set("roll call", "")
            until = time.monotonic() + ANSWER_SECONDS
            absent = self.others
            while absent and time.monotonic() < until:
                time.sleep(0.1)
                absent = [rank for rank in self.others if not self.store.check([f"here/{rank}"])]
        except dist.DistError:
            absent = [0]  # it has the store
        return [f"process {rank} does not answer: it has died or stalls" for rank in absent]

    def elsewhere(self) -> list[str]:
        """After the roll: a line for each process that does something else than this one, which waits for it."""
        try:
            present = [rank for rank in self.others if self.store.check([f"here/{rank}"])]
            activities = {rank: self.store.get(f"here/{rank}").decode() for rank in present}
        except dist.DistError:
            return []
        lines = [f"process {rank} is {activity}" for rank, activity in activities.items() if activity != self.activity]
        return [f"{line}, this one is {self.activity}" for line in lines]

    def leave(self, lines: list[str]) -> None:
        """At once: to leave in the usual way is to wait for the others."""
        for line in lines:
            print(f"train_accelerate.py: error: {line} (said by process {self.rank})", file=sys.stderr, flush=True)
        os._exit(1)
