"""Whether the processes that a launcher was asked for are there, and know of each other."""

import os
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object

from pretraining.arguments import UserError

T = TypeVar("T")


def check_launch(num_processes: int) -> None:
    """
    Args:
        num_processes: how many accelerate found.

    Raises:
        UserError: if that is not how many were started, or asked for. Each would work alone, and overwrite what the
            others write.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != num_processes:
        raise UserError(f"started as one of {started} processes, but found {num_processes}")
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "asked for several processes, but only one was started, as accelerate does where distributed_type is NO: "
            "use --config_file configs/cpu.yaml, or add --multi_gpu (which serves CPUs too)"
        )


def on_every_process(work: Callable[[], T]) -> T:
    """
    The result of `work`, which every process calls.

    Raises:
        UserError: on all processes, if it is raised on any: the others would wait for that one.
    """
    result, problems = None, []
    try:
        result = work()
    except UserError as error:
        problems = list(error.problems)
    if problems := gather_object(problems):
        raise UserError(*dict.fromkeys(problems))
    return result
