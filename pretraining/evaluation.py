"""What a model is worth while it trains: the loss on the validation rows, and what it writes."""

import math

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretraining.data import PackedDataset

SAMPLE_TOKENS = 64


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PackedDataset,
    accelerator: Accelerator,
    batch_size: int,
    eval_iters: int | None,
    document_token_id: int | None,
) -> dict[str, float]:
    """
    Loss over a fixed set of rows, the first `eval_iters * batch_size` of `dataset` or all of them, shared out over
    the processes; every row counts once, whatever the number of processes.

    Args:
        document_token_id: see `document_positions`; None lets tokens see the documents before theirs.

    Returns:
        eval_loss: mean cross-entropy in nats per token.
        eval_perplexity: exp(eval_loss).
        eval_bits_per_byte: the loss per byte of text instead, which can be compared between tokenizers:
            eval_loss / ln 2 * tokens / bytes of the validation text. The tokens between documents count, with no
            bytes of their own.
    """
    num_rows = min(len(dataset), eval_iters * batch_size) if eval_iters else len(dataset)
    rows_per_round = batch_size * accelerator.num_processes
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    for start in range(0, num_rows, rows_per_round):
        # All processes take part in every round, with rows that count for nothing once there are no more: a sharded
        # model needs all of them for a forward pass.
        first = start + accelerator.process_index * batch_size
        rows = [min(row, num_rows - 1) for row in range(first, first + batch_size)]
        input_ids = dataset.__getitems__(rows).to(accelerator.device).long()
        labels = input_ids.clone()
        labels[max(0, num_rows - first) :] = -100
        loss_sum = model(
            input_ids=input_ids,
            position_ids=document_positions(input_ids, document_token_id),
            labels=labels,
            num_items_in_batch=1,
            use_cache=False,
            skip_logits=True,
        ).loss
        total += torch.tensor([loss_sum.item(), (labels[:, 1:] != -100).sum().item()])
    model.train()
    loss_sum, tokens = accelerator.reduce(total.to(accelerator.device), "sum").tolist()
    loss = loss_sum / tokens
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows a float
        "eval_bits_per_byte": loss / math.log(2) / dataset.bytes_per_token,
    }


def document_positions(input_ids: torch.Tensor, document_token_id: int | None) -> torch.Tensor | None:
    """
    Positions (B, T) that start again at each document of a row, which keeps documents apart in this model; None, the
    plain concatenation, without a `document_token_id`.

    The end-of-text token counts as the first of the document behind it: so its one place in a document teaches how to
    end one, by being foretold, and how to begin one, as it does when text is generated from nothing.
    """
    if document_token_id is None:
        return None
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = torch.where(input_ids == document_token_id, index, 0).cummax(-1).values
    return index - starts


def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int
) -> list[str]:
    """
    One continuation of each prompt (the empty prompt starts a document), `SAMPLE_TOKENS` tokens, sampled at
    temperature 0.7. The same seed every time, and the training's own random numbers are left as they were.
    """
    model.eval()
    texts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            input_ids = torch.tensor([ids], device=model.device)
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_length=min(len(ids) + SAMPLE_TOKENS, model.config.n_positions),
                do_sample=True,
                temperature=0.7,
                pad_token_id=tokenizer.eos_token_id,
            )
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    model.train()
    return texts
