"""Whether a micro-batch fits into memory, found out before the first step."""

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from pretraining.arguments import UserError
from pretraining.launch import is_sharded


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
