"""Tokens and HellaSwag items that are made up on the spot, for measurements that need no real text."""

import random
import re
import textwrap
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretraining.tokenization.tokenizer import train_tokenizer

TEXT = Path(textwrap.__file__).read_text(encoding="utf-8")  # 20 kB that every Python has
VOCAB_SIZE = 1000


def build_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerBase:
    return train_tokenizer([TEXT], vocab_size)


def write_token_files(folder: Path, tokens: int, validation_tokens: int, vocab_size: int = VOCAB_SIZE) -> Path:
    """
    Write `train.bin` and `val.bin` in nanoGPT's format, a text over and over, into a folder that exists.

    Returns:
        The folder of the tokenizer that they were made with.
    """
    tokenizer = build_tokenizer(vocab_size)
    ids = np.array([*tokenizer.encode(TEXT), tokenizer.eos_token_id], dtype="<u2")
    np.resize(ids, tokens).tofile(folder / "train.bin")
    np.resize(ids, validation_tokens).tofile(folder / "val.bin")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def hellaswag_items(count: int) -> list[dict]:
    """Return items as `load_items` does: contexts of 10 to 40 words, and endings of 5 to 20."""
    choose = random.Random(0)
    words = sorted(set(re.findall("[a-z]+", TEXT)))

    def sentence(least: int, most: int) -> str:
        return " ".join(choose.choices(words, k=choose.randint(least, most))) + "."

    items = []
    for number in range(count):
        ctx_a, ctx_b = sentence(5, 30), sentence(5, 10)
        items.append(
            {
                "ind": number,
                "activity_label": sentence(1, 2),
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "ctx": f"{ctx_a} {ctx_b}",
                "endings": [sentence(5, 20) for _ in range(4)],
                "label": choose.randrange(4),
            }
        )
    return items
