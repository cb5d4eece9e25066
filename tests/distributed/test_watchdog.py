"""The watchdog's threads, at the end of a process."""

import sys

from conftest import REPOSITORY, run, succeed
from support.processes import free_port

# A store that takes 0.6 seconds to answer, and an interpreter that takes one to shut down.
PROGRAM = """
import os, sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch.distributed as dist
from pretraining.distributed.watchdog import Watchdog

class SlowStore:
    def __init__(self, store):
        self.store = store

    def add(self, key, number):
        self.store.wait(["a key that nobody sets"], timedelta(seconds=0.6))

class SlowEnd:
    def __init__(self):
        self.sleep = time.sleep

    def __del__(self):
        self.sleep(1)

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
server = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
slow_end = SlowEnd()
with Watchdog(SimpleNamespace(process_index=1, num_processes=2), limit=1) as watchdog:
    watchdog.store = SlowStore(watchdog.store)
    time.sleep(0.3)
print("over")
"""


def test_a_process_that_ends_while_its_watchdog_asks_the_store_does_not_abort():
    result = succeed(run(sys.executable, "-c", PROGRAM, free_port(), PYTHONPATH=str(REPOSITORY)))
    assert result.stdout == "over\n"
