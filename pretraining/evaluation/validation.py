"""The loss on the validation rows. (Which documents those are: data/validation_split.py.)"""

import math

import torch
from accelerate import Accelerator
from torch import nn

from pretraining.data.packed_rows import ModelInputs, PackedDataset, next_tokens


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PackedDataset,
    accelerator: Accelerator,
    batch_size: int,
    num_rows: int | None,
    model_inputs: ModelInputs,
) -> dict[str, float]:
    """
    Loss over a fixed set of rows, the first `num_rows` of `dataset` or all of them, shared out over the processes;
    every row counts once, whatever the number of processes and the size of a batch.

    Args:
        model: as `accelerator.prepare` returned it.
        model_inputs: makes the model's arguments of rows.

    Returns:
        eval_loss: mean cross-entropy in nats per token.
        eval_perplexity: exp(eval_loss).
        eval_bits_per_byte: the loss per byte of text instead, which can be compared between tokenizers:
            eval_loss / ln 2 * tokens / bytes of the validation text. The tokens between documents count, with no
            bytes of their own.
    """
    num_rows, block_size = min(len(dataset), num_rows or len(dataset)), dataset.block_size
    rows_per_round = batch_size * accelerator.num_processes
    sums = []  # loss and tokens of each round, read at the end only: to read is to wait for the device
    model.eval()
    for start in range(0, num_rows, rows_per_round):
        # All processes take part in every round, with rows that count for nothing once there are no more: a sharded
        # model needs all of them for a forward pass.
        first = start + accelerator.process_index * batch_size
        rows = dataset.__getitems__([min(row, num_rows - 1) for row in range(first, first + batch_size)])
        targets = next_tokens(rows, block_size)
        targets[max(0, num_rows - first) :] = -100
        inputs = model_inputs(rows[:, :block_size])
        inputs["shift_labels"] = targets.to(inputs["input_ids"].device)
        loss_sum = model(**inputs, num_items_in_batch=1, use_cache=False, skip_logits=True).loss
        sums.append(torch.stack([loss_sum, (inputs["shift_labels"] != -100).sum()]))
    model.train()
    everyone = accelerator.gather(torch.stack(sums).flatten()).view(-1, 2).tolist()
    loss_sum, tokens = (math.fsum(values) for values in zip(*everyone, strict=True))
    loss = loss_sum / tokens
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows a float
        "eval_bits_per_byte": loss / math.log(2) / dataset.bytes_per_token,
    }
