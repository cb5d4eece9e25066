"""Byte-level BPE tokenizers: trained here, or taken from elsewhere, and told apart by a fingerprint."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pretraining.errors import UserError, one_line
from pretraining.hub import check_name
from pretraining.tokenization.byte_level_bpe import merges_of

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of text


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE of GPT-2's kind: the same pre-tokenisation, all 256 bytes in the alphabet, so that any text can
    be encoded, and one special token, `<|endoftext|>`, which has id 0 here. A small corpus may give fewer tokens
    than `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # the default's token_type_ids are BERT's
    )


def open_tokenizer(name_or_path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """
    Open a tokenizer of any kind.

    Args:
        options: more arguments of `from_pretrained`.

    Raises:
        UserError: if it cannot be loaded.
    """
    try:
        check_name(str(name_or_path))
        return AutoTokenizer.from_pretrained(name_or_path, **options)
    except BaseException as error:  # tokenizers raises nothing more special, and panics on some damaged files
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer {name_or_path} cannot be loaded: {one_line(error)}") from None


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """
    A tokenizer on the Hub or in a folder.

    Raises:
        UserError: if it cannot be loaded, or has no end-of-text token.
    """
    import modeling_gpt2scratch  # noqa: F401  so that a folder trained here needs no remote code to be known

    if isinstance(name_or_path, Path) and not name_or_path.is_dir():
        raise UserError(f"the tokenizer's folder {name_or_path} is missing")
    tokenizer = open_tokenizer(name_or_path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {name_or_path} has no tokenizer.json: only fast tokenizers can be used")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name_or_path} has no end-of-text token, which goes between documents")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    sha256 of the vocabulary and the merges: ids written with one tokenizer mean the same to another of the same
    fingerprint.
    """
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{token_id} {token}\n".encode())
    for merge in merges_of(json.loads(tokenizer.backend_tokenizer.to_str())):
        digest.update(f"{' '.join(merge)}\n".encode())
    return digest.hexdigest()


def vocab_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Return the vocabulary that a model needs for a tokenizer: its highest id plus 1. Where ids have gaps,
    `len(tokenizer)`, which counts tokens, is less.
    """
    return max(tokenizer.get_vocab().values()) + 1


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type that ids below `vocab_size` are stored in."""
    return np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")
