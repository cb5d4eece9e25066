"""Byte-level BPE, as GPT-2 has it: what stands in a tokenizer's description of one."""

import json

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# GPT-2's pattern (openai/gpt-2, src/encoder.py). The alternatives that look no further than they match are grouped:
# tiktoken's regex engine then leaves all of them to its fast half, and is 1.8 times as fast.
GPT2_PATTERN = r"(?:'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"
# The byte that a character stands for in a byte-level BPE's vocabulary (openai/gpt-2, src/encoder.py): printable ones
# for themselves, the others, in order, for the characters from 256 on.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}


def merges_of(description: dict) -> list[list[str]]:
    """The pairs of tokens that are joined, in order: "a b" in older files, ["a", "b"] in newer ones."""
    merges = description["model"].get("merges", [])
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def tiktoken_parts(tokenizer: Tokenizer) -> tuple[str, dict[bytes, int], np.ndarray] | None:
    """
    Pattern, ranks and the token id of each rank, as tiktoken wants them; None if the tokenizer is of another kind. The
    ranks are the 256 bytes and then the merges in their order, as tiktoken merges the pair of the lowest rank first.
    """
    description = json.loads(tokenizer.to_str())
    model, pattern = description["model"], pattern_of(description["pre_tokenizer"])
    kinds = model.get("type"), description["normalizer"], bool(model.get("byte_fallback")), model.get("dropout")
    all_special = all(token["special"] for token in description["added_tokens"])
    if kinds != ("BPE", None, False, None) or pattern is None or not all_special or model.get("ignore_merges"):
        return None
    vocabulary = model["vocab"]
    tokens = dict.fromkeys([*BYTE_OF_CHARACTER, *("".join(merge) for merge in merges_of(description))])
    if not tokens.keys() <= vocabulary.keys():
        return None  # a byte without a token: what it becomes is the tokenizer's own affair
    ranks = {bytes(BYTE_OF_CHARACTER[character] for character in token): rank for rank, token in enumerate(tokens)}
    return pattern, ranks, np.array([vocabulary[token] for token in tokens])


def pattern_of(pre_tokenizer: dict | None) -> str | None:
    """The pattern that text is split by before merging: GPT-2's own, or that of a Split before the byte level."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """
    Return the bytes of text that each id of a byte-level tokenizer stands for, 0 for special tokens and where an id
    has no token; None for other tokenizers.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    if decoder.get("type") != "ByteLevel":
        return None
    vocabulary, special_ids = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)  # ids may have gaps
    for token, token_id in vocabulary.items():
        if token_id not in special_ids:
            if not set(token) <= BYTE_OF_CHARACTER.keys():
                return None
            sizes[token_id] = len(token)
    return sizes
