"""What the benchmarks share: programs in turns, each in a process of its own, and the Markdown that tells of them."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

Measured = dict[str, list[dict[str, float]]]  # by name, of each round


def in_turns(script: str, names: Iterable[str], rounds: int, *arguments: object) -> Measured:
    """
    Run `script --measure NAME ARGUMENTS` for each name, one after the other, `rounds` times over.

    Returns:
        What each printed as its last line, a JSON object of figures.

    Raises:
        RuntimeError: with what it said, if one fails.
    """
    measured: Measured = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name, results in measured.items():
            command = [sys.executable, script, "--measure", name, *map(str, arguments)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{name}: {result.stderr}")
            results.append(json.loads(result.stdout.splitlines()[-1]))
            print(f"round {number} of {rounds}, {name}: {result.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return measured


def median(measured: Measured, name: str, figure: str) -> float:
    return statistics.median(each[figure] for each in measured[name])


def ratio(measured: Measured, name: str, other: str, figure: str) -> float:
    """The median, over the rounds, of what `name` has of `other`'s figure."""
    pairs = zip(measured[name], measured[other], strict=True)
    return statistics.median(one[figure] / two[figure] for one, two in pairs)


def medians(measured: Measured, formats: dict[str, str]) -> list[list[str]]:
    """Of each name a row of a table: its median of each figure, written as its format says."""
    return [
        [name, *(format(median(measured, name, figure), spec) for figure, spec in formats.items())]
        for name in measured
    ]


def seconds(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what is free already
        Path("/proc/self/clear_refs").write_text("5")


def memory(peak: bool = False) -> float:
    """Megabytes that this process has on the device, or had at most since `forget_peak_memory`."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024 / 1e6


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def here(*packages: str) -> str:
    """When and on what: `2026-11-22, AMD EPYC, 2 cores; torch 2.13.0, transformers 5.23.0`."""
    if torch.cuda.is_available():
        place = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        kinds = [kind for kind in ("amx_bf16", "avx512_bf16") if any(kind in line for line in lines)]
        place = f"{(models or [platform.machine()])[0]}{f' with {kinds[0]}' if kinds else ''}, {os.cpu_count()} cores"
    return f"{date.today()}, {place}; {', '.join(f'{name} {version(name)}' for name in packages)}."


def section(packages: Iterable[str], described: str, *parts: str) -> str:
    """Markdown: when and on what, then a line of what was measured, then tables and sentences."""
    return "\n\n".join([here(*packages), f"{described}:", *parts])
