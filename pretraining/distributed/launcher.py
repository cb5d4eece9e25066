"""
What `accelerate launch` was told.

The launcher hands on `mixed_precision: no` and one thread a process both where somebody asked for that and where
nobody said anything. Its command line, which is that of the parent process, tells the two apart.
"""

import argparse
import contextlib
import functools
import os
from pathlib import Path

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

PROGRAMS = {"accelerate-launch", "accelerate.commands.launch"}


def told_precision() -> str | None:
    """
    Return the precision that was asked for, as accelerate names it, or None if nobody asked for one.

    Somebody asks by `accelerate launch --mixed_precision`, by `mixed_precision` in a launch config, or, without the
    launcher, by the variable ACCELERATE_MIXED_PRECISION.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if precision != "no":
        return precision or None
    launched = _launch_arguments()
    return "no" if launched is None else launched.mixed_precision


def is_told_threads() -> bool:
    """Return False if `accelerate launch` started this process and nobody said with how many threads."""
    launched = _launch_arguments()
    return launched is None or launched.num_cpu_threads_per_process is not None


@functools.cache
def _launch_arguments() -> argparse.Namespace | None:
    """
    Return the arguments of the `accelerate launch` that started this process, or None if it was started in another
    way. `mixed_precision` is also looked for in the launch config, `num_cpu_threads_per_process` in OMP_NUM_THREADS.
    """
    try:
        parent = psutil.Process(os.getppid())
        words = parent.cmdline()
    except (psutil.Error, OSError):
        return None
    names = [Path(word).name for word in words[:3]]  # python, accelerate, launch; or python, -m, the module
    if "accelerate" in names and "launch" in names:
        words = words[names.index("launch") + 1 :]
    elif PROGRAMS & set(names):
        words = words[next(index for index, name in enumerate(names) if name in PROGRAMS) + 1 :]
    else:
        return None
    args = launch_command_parser().parse_args(words)
    if args.config_file or (os.path.isfile(default_config_file) and not args.cpu):
        config = load_config_from_file(args.config_file)
        args.mixed_precision = args.mixed_precision or config.mixed_precision
    with contextlib.suppress(psutil.Error, OSError):  # some systems show the environment to nobody
        args.num_cpu_threads_per_process = args.num_cpu_threads_per_process or parent.environ().get("OMP_NUM_THREADS")
    return args
