"""Samples: what a model writes while it trains."""

import textwrap

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretraining.errors import UserError
from pretraining.hardware import generator_states, restore_generators

SAMPLE_TOKENS = 64


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str], n_positions: int) -> list[list[int]]:
    """
    Token ids of prompts, each as the beginning of a document.

    Raises:
        UserError: for those that leave no room for a sample.
    """
    encoded = [[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in prompts]
    problems = [
        f"--sample_prompts: {textwrap.shorten(text, 40)!r} is {len(ids)} tokens with the one that begins a document, "
        f"which leaves no room for a sample in the model's {n_positions} positions"
        for text, ids in zip(prompts, encoded, strict=True)
        if len(ids) >= n_positions
    ]
    if problems:
        raise UserError(*problems)
    return encoded


def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int, is_sharded: bool
) -> list[str]:
    """
    One continuation of each prompt (the empty prompt starts a document), `SAMPLE_TOKENS` tokens, sampled at
    temperature 0.7. The same seed every time, and the training's own random numbers are left as they were.

    Args:
        model: unwrapped.
        is_sharded: each process holds a part of the weights, so that all have to call this together.
    """
    model.eval()
    texts: list[str] = []
    before = generator_states(model.device)
    torch.manual_seed(seed)
    try:
        for ids in encode_prompts(tokenizer, prompts, model.config.n_positions):
            input_ids = torch.tensor([ids], device=model.device)
            output = model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(SAMPLE_TOKENS, model.config.n_positions - len(ids)),
                do_sample=True,
                temperature=0.7,
                pad_token_id=tokenizer.eos_token_id,
                synced_gpus=is_sharded,
            )
            texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    finally:
        restore_generators(before, model.device)
    model.train()
    return texts
