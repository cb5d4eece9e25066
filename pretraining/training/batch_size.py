"""Whether a micro-batch fits into memory, found out before the first step."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from pretraining.data.row_order import StepSplit
from pretraining.distributed.processes import is_sharded
from pretraining.errors import ProcessError, UserError
from pretraining.records.progress import Progress
from pretraining.training.flags import TrainArguments
from pretraining.training.setup import Setup


def fit_into_memory(setup: Setup, model: nn.Module) -> StepSplit:
    """
    Return the split, or with --auto_batch_size one of smaller micro-batches that fit into memory, of the same global
    batch.

    Raises:
        UserError: if the micro-batches do not fit, with the size of ones that do.
    """

    args, accelerator, split = setup.args, setup.accelerator, setup.split

    def try_batch(batch_size: int) -> None:
        rows = torch.zeros(batch_size, setup.data.block_size, dtype=torch.int32)
        try_micro_batch(model, setup.model_inputs(rows), accelerator)

    batch_size = fitting_batch_size(try_batch, split.batch_size)
    if batch_size == split.batch_size:
        return split
    fits = flags_for(args, split, batch_size)
    if not args.auto_batch_size:
        raise UserError(
            f"out of memory with --per_device_train_batch_size {split.batch_size}: {fits} fits and trains the same "
            "(--auto_batch_size goes on with it)"
        )
    accelerator.print(f"out of memory with {split.batch_size} rows at once: going on with {fits}")
    split = split.with_batch_size(batch_size)
    accelerator.gradient_accumulation_steps = split.gradient_accumulation_steps
    return split


def flags_for(args: TrainArguments, split: StepSplit, batch_size: int) -> str:
    """The flags by which micro-batches of `batch_size`, which divides the split's, make up the same global batch."""
    accumulation = split.with_batch_size(batch_size).gradient_accumulation_steps
    flags = f"--per_device_train_batch_size {batch_size}"
    # Of --tokens_per_step it is worked out, and may not be given.
    return flags if args.tokens_per_step else f"{flags} with --gradient_accumulation_steps {accumulation}"


@contextlib.contextmanager
def out_of_memory_explained(args: TrainArguments, split: StepSplit, progress: Progress) -> Iterator[None]:
    """
    Explain what takes less memory where it runs out.

    Raises:
        ProcessError: instead of the error of the device.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        less = "--gradient_checkpointing"
        if split.batch_size % 2 == 0:
            less = f"{flags_for(args, split, split.batch_size // 2)}, or {less}"
        raise ProcessError(f"out of memory in step {progress.step + 1}: try {less}") from error


def try_micro_batch(model: nn.Module, inputs: dict, accelerator: Accelerator) -> None:
    """
    Forward and backward pass of a micro-batch, twice, as the second one of a step adds to gradients that are there,
    with room for AdamW's two moments, which the first step makes. Leaves no gradients. The processes do not exchange
    theirs: where one has too little memory, the others do not wait for it.
    """
    moments = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
    # A sharded model's processes take part in each other's passes all the same.
    with contextlib.nullcontext() if is_sharded(accelerator) else accelerator.no_sync(model):
        for _ in range(2):
            loss = model(**inputs, num_items_in_batch=inputs["labels"].numel(), use_cache=False).loss
            accelerator.backward(loss)
    model.zero_grad()
    del moments


def fitting_batch_size(try_batch: Callable[[int], None], batch_size: int) -> int:
    """
    `batch_size`, or the first of its halves for which `try_batch` does not run out of memory on any process.

    Raises:
        UserError: on all processes, if there is none.
    """
    size = batch_size
    while True:
        if all(gather_object([_fits(try_batch, size)])):
            return size
        if size % 2:
            raise UserError(
                f"out of memory with --per_device_train_batch_size {batch_size}, and with {size} too, which cannot be "
                "halved: a smaller model, --gradient_checkpointing or a shorter --block_size takes less"
            )
        size //= 2
        torch.compiler.reset()  # or the next size is compiled for any size


def _fits(try_batch: Callable[[int], None], size: int) -> bool:
    try:
        try_batch(size)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    else:
        return True
    clear_device_cache(garbage_collection=True)  # once the error no longer refers to the tensors
    return False
