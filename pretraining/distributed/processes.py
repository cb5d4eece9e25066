"""The processes of a launch: whether they are there, accelerate's view of them, and errors that all of them share."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from pretraining.distributed.launcher import is_told_threads
from pretraining.errors import UserError
from pretraining.hardware import physical_cores

T = TypeVar("T")

# How many processes there are, by the launchers that set it: torchrun and accelerate, Slurm's srun, and three MPIs.
WORLD_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def open_state(timeout_seconds: float | None = None) -> PartialState:
    """
    Find the processes of this launch and the device of this one: the accelerator that accelerate finds, or the CPU
    where there is none or the launch asks for it.

    Args:
        timeout_seconds: how long the processes wait for each other; torch's default if left out.
    """
    is_told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    # Of several processes on a CPU, accelerate connects them only if it knows beforehand that it is a CPU. Its own
    # answer to which device there is needs no state.
    default_device = PartialState.__new__(PartialState).default_device
    timeout = {} if timeout_seconds is None else {"timeout": timedelta(seconds=timeout_seconds)}
    state = PartialState(cpu=is_told_cpu or default_device.type == "cpu", **timeout)
    if state.device.type == "cpu" and not is_told_threads():
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, physical_cores() // local_processes))
    return state


def check_launch(num_processes: int) -> None:
    """
    Args:
        num_processes: how many accelerate found.

    Raises:
        UserError: if that is not how many were started, or asked for. Each would work alone, and overwrite what the
            others write.
    """
    if "WORLD_SIZE" in os.environ:
        started = {"WORLD_SIZE": int(os.environ["WORLD_SIZE"])}  # srun may start one launcher a machine
    else:
        started = {name: int(os.environ[name]) for name in WORLD_SIZES if name in os.environ}
    for name, number in started.items():
        if number != num_processes:
            raise UserError(
                f"started as one of {number} processes ({name}), but found {num_processes}: "
                "start them with accelerate launch"
            )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "asked for several processes, but only one was started, as accelerate does where distributed_type is NO: "
            "use --config_file configs/cpu.yaml, or add --multi_gpu (which serves CPUs too)"
        )


def open_accelerator(
    state: PartialState, gradient_accumulation_steps: int, torch_compile: bool, mixed_precision: str
) -> Accelerator:
    """
    Raises:
        UserError: if the launch config asks for sharding that this machine cannot do: every process would hold the
            whole model.
    """
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    accelerator = Accelerator(
        cpu=state.device.type == "cpu",
        mixed_precision=mixed_precision,
        # Accelerate would end an accumulation early at the end of a data loader; the rows here have no end.
        # Gradients that are only exchanged after the last micro-batch would be held whole where they are sharded.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, sync_with_dataloader=False, sync_each_batch=wants_fsdp
        ),
        fsdp_plugin=_fsdp_plugin(mixed_precision) if wants_fsdp else None,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if torch_compile else None,
    )
    if wants_fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("the launch config asks for FSDP, which needs several processes with a GPU each")
    if wants_fsdp and not accelerator.is_fsdp2:
        raise UserError("the launch config asks for the first FSDP: fsdp_version: 2, as in configs/fsdp2.yaml")
    if mixed_precision == "fp16" and state.device.type == "cpu":
        # Accelerate would train in fp32 on a CPU, without a word. With these two it does there what it does elsewhere.
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def _fsdp_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """
    As the launch config has it, but for bf16: there the products are computed in bf16 while gradients are added up in
    fp32 and the loss comes out in fp32. Accelerate's own policy rounds both to bf16.
    """
    policy = None
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights, so that a forward pass takes all of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def on_main_process(state: PartialState, work: Callable[[], T]) -> T:
    """
    The result of `work`, which the first process alone calls, on all of them.

    Raises:
        UserError: on all processes, if `work` raised it.
    """
    answer: list = [None, None]
    if state.is_main_process:
        try:
            answer = [work(), None]
        except UserError as error:
            answer = [None, error.problems]
    result, problems = broadcast_object_list(answer)
    if problems:
        raise UserError(*problems)
    return result


def on_every_process(work: Callable[[], T]) -> T:
    """
    The result of `work`, which every process calls.

    Raises:
        UserError: on all processes, if it is raised on any: the others would wait for that one.
    """
    result: Any = None
    problems: list[str] = []
    try:
        result = work()
    except UserError as error:
        problems = list(error.problems)
    if problems := gather_object(problems):
        raise UserError(*dict.fromkeys(problems))
    return result
