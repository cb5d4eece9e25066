"""Whether the processes that a launcher was asked for are there, and know of each other."""

import os

from pretraining.arguments import UserError


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
