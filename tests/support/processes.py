"""
The scripts in processes of their own, forked from one that has imported what they import: a process then starts in a
tenth of a second instead of five. All else is as from the command line.

Hugging Face's libraries read variables (HF_HOME and the like) when they are imported: for each set of values there is
such a process.
"""

import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
IMPORTS = """train_accelerate prepare_data publish_model pretraining.data.streaming torch._dynamo
    torch.utils.tensorboard pandas
    evaluate pretraining.evaluation.harness matplotlib.pyplot matplotlib.backends.backend_agg support.freeze""".split()
TIMEOUT = 300
SERVERS: dict[frozenset, multiprocessing.forkserver.ForkServer] = {}


@dataclasses.dataclass
class Running:
    """A script in a process that may still be at work."""

    process: multiprocessing.Process
    folder: tempfile.TemporaryDirectory

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self, stream: str) -> str:
        return (Path(self.folder.name) / stream).read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> subprocess.CompletedProcess:
        """As `subprocess.run` would return it; a process that does not end in time is killed, and an error."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        result = subprocess.CompletedProcess(
            str(self.process), self.process.exitcode, self.output("stdout"), self.output("stderr")
        )
        assert not late, f"not ended after {timeout} seconds: {result.stdout}{result.stderr}"
        return result


def start(
    name: str | Path,
    *arguments: object,
    fault: Callable[[], None] | None = None,
    cwd: Path = REPOSITORY,
    **environment: str,
) -> Running:
    """
    Start one of the repository's scripts, or the one at a path, on the CPU with one thread.

    Args:
        fault: called in the process before the script, to have something go wrong there. Picklable.
    """
    context = multiprocessing.get_context("forkserver")
    folder = tempfile.TemporaryDirectory()
    for stream in ("stdout", "stderr"):
        (Path(folder.name) / stream).touch()
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    words = [str(REPOSITORY / name), *map(str, arguments)]
    process = context.Process(target=_run_script, args=(words, variables, cwd, folder.name, fault))
    _start_from_server(process, variables)
    return Running(process, folder)


def start_ranks(
    num_processes: int,
    name: str | Path,
    *arguments: object,
    faults: dict[int, Callable] | None = None,
    cwd: Path = REPOSITORY,
    **environment: str,
) -> list[Running]:
    """As many processes that find each other, as a launcher would start them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    return [
        start(
            name,
            *arguments,
            fault=(faults or {}).get(rank),
            cwd=cwd,
            **({"RANK": str(rank), "LOCAL_RANK": str(rank), **place, **sizes} if num_processes > 1 else {}),
            **environment,
        )
        for rank in range(num_processes)
    ]


def run_ranks(
    num_processes: int, name: str | Path, *arguments: object, **options
) -> list[subprocess.CompletedProcess]:
    """`start_ranks`, to their end."""
    return [running.wait() for running in start_ranks(num_processes, name, *arguments, **options)]


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start_from_server(process: multiprocessing.Process, variables: dict[str, str]) -> None:
    """The first process of its kind starts the server, which takes variables and this path from us for its imports."""
    imported = {name: value for name, value in variables.items() if name.startswith("HF_") and name != "HF_TOKEN"}
    server = SERVERS.setdefault(frozenset(imported.items()), multiprocessing.forkserver.ForkServer())
    server.set_forkserver_preload(IMPORTS)
    imported |= {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    connect = mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", server.connect_to_new_process)
    with mock.patch.dict(os.environ, imported), connect:
        process.start()


def _run_script(
    words: list[str], variables: dict[str, str], cwd: Path, folder: str, fault: Callable[[], None] | None
) -> None:
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(folder, stream), os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # what a process has said is not lost when it is killed
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = words
    sys.path[0] = os.path.dirname(words[0])
    if fault:
        fault()
    runpy.run_path(words[0], run_name="__main__")
