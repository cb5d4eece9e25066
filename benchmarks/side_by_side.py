"""
Tools of the benchmarks: run programs in turns, each in a process of its own, choose the device and the precision that
they run in, and report them in Markdown.
"""

import ctypes
import functools
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import torch

from pretraining import hardware
from pretraining.precision import NAMES, choose_precision

Measured = dict[str, list[dict[str, float]]]  # by name, of each round
MixedPrecision = Literal["no", "bf16", "fp16"]
PRECISION_HELP = "the precision; what train_accelerate.py would choose on this machine if left out"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    """Return the median, over the rounds, of a figure of `name` divided by that of `other`."""
    pairs = zip(measured[name], measured[other], strict=True)
    return statistics.median(one[figure] / two[figure] for one, two in pairs)


def medians(measured: Measured, formats: dict[str, str]) -> list[list[str]]:
    """Return a row of a table for each name: the median of each figure, in its format."""
    return [
        [name, *(format(median(measured, name, figure), spec) for figure, spec in formats.items())]
        for name in measured
    ]


@functools.cache
def device() -> torch.device:
    """Return the device that training would use: the accelerator that accelerate finds, or the CPU."""
    from pretraining.distributed.processes import open_state  # here, as start_up.py's other script does without

    return open_state().device


def precision(told: str | None) -> MixedPrecision:
    """Return the precision that was asked for, or else what training would choose here, as accelerate names it."""
    from pretraining.distributed.launcher import told_precision

    return cast(MixedPrecision, choose_precision(device(), told or told_precision()).mixed_precision)


def precision_name(mixed_precision: str) -> str:
    """Return `fp32`, `bf16` or `fp16`."""
    return NAMES[mixed_precision]


def autocast(mixed_precision: str) -> AbstractContextManager:
    """Return torch's autocast in this precision, which does nothing for fp32."""
    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device().type, DTYPES[mixed_precision])


def loss_scaler(mixed_precision: str) -> torch.amp.GradScaler:
    """Return torch's loss scaling, which does nothing except in fp16."""
    return torch.amp.GradScaler(device().type, enabled=mixed_precision == "fp16")


def seconds(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if device().type != "cpu":
        torch.accelerator.synchronize()


def forget_peak_memory() -> None:
    if device().type != "cpu":
        reset = getattr(torch.get_device_module(device()), "reset_peak_memory_stats", None)
        if reset:
            reset()
    else:
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what is free already
        Path("/proc/self/clear_refs").write_text("5")


def memory(peak: bool = False) -> float:
    """
    Return the megabytes that this process has on the device, or had at most since `forget_peak_memory`. NaN where the
    device's allocator does not count them: Apple's has no peak.
    """
    if device().type != "cpu":
        read = getattr(torch.get_device_module(device()), "max_memory_allocated" if peak else "memory_allocated", None)
        return read() / 1e6 if read else math.nan
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024 / 1e6


def here(*packages: str) -> str:
    """Return when and on what: `2026-11-22, AMD EPYC, 2 cores; torch 2.13.0, transformers 5.23.0`."""
    if device().type != "cpu":
        place = hardware.device_description(device(), 1)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        kinds = [kind for kind in ("amx_bf16", "avx512_bf16") if any(kind in line for line in lines)]
        place = f"{(models or [platform.machine()])[0]}{f' with {kinds[0]}' if kinds else ''}, {os.cpu_count()} cores"
    return f"{date.today()}, {place}; {', '.join(f'{name} {version(name)}' for name in packages)}."


def section(packages: Iterable[str], described: str, *parts: str) -> str:
    """Return Markdown: when and on what, then a line about what was measured, then tables and sentences."""
    return "\n\n".join([here(*packages), f"{described}:", *parts])
