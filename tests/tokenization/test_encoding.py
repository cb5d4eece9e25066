"""Bulk encoding gives what the tokenizer gives, with tiktoken where that can be had, and else without."""

import random
import sys

import numpy as np
import pytest
from conftest import make_documents
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pretraining.tokenization import byte_level_bpe, encoding
from pretraining.tokenization.byte_level_bpe import bytes_of_tokens
from pretraining.tokenization.encoding import SEPARATOR, Encoder, encode_documents
from pretraining.tokenization.tokenizer import train_tokenizer

# The pattern of GPT-4's tokenizer (openai/tiktoken, tiktoken_ext/openai_public.py).
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_texts(number: int) -> list[str]:
    """Of all of Unicode but surrogates, mostly the part below U+3000, with white space and digits in between."""
    generator = random.Random(0)
    alphabet = [*range(0x3000), *generator.sample([*range(0x3000, 0xD800), *range(0xE000, sys.maxunicode)], 2000)]
    alphabet += [ord(character) for character in " \n\t\r'sdm<|endoftext|>0123456789"] * 200
    return ["".join(map(chr, generator.choices(alphabet, k=generator.randrange(300)))) for _ in range(number)]


TEXTS = [
    *make_documents(20),
    *random_texts(100),
    "a text about <|endoftext|>, which is only a word here",
    f"even {SEPARATOR} in it",
    f"or nearly so at the end{SEPARATOR[:-1]}",
    "x" + " " * 300_000 + "y",  # beyond what tiktoken's regex bears
    "\n" * 50_000,
    "a" * 100_000,
    "",
]


def trained(pre_tokenizer, normalizer=None, trainer_class=trainers.BpeTrainer, model=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainer_class(vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(make_documents(50, seed=3), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def byte_level(**options) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


TOKENIZERS = {
    "ours": ("tiktoken", lambda: train_tokenizer(make_documents(50, seed=3), 500)),
    "split by a pattern": (
        "tiktoken",
        lambda: trained(
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K), "isolated"), byte_level(use_regex=False)])
        ),
    ),
    "with a prefix space": ("tokenizers", lambda: trained(byte_level(add_prefix_space=True))),
    "normalising": ("tokenizers", lambda: trained(byte_level(), normalizer=normalizers.NFKC())),
    "no BPE": (
        "tokenizers",
        lambda: trained(byte_level(), trainer_class=trainers.UnigramTrainer, model=models.Unigram()),
    ),
}


@pytest.mark.parametrize(("name", "make"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_text_gets_the_tokenizers_own_ids_and_an_end(name, make):
    tokenizer = make()
    encoder = Encoder(tokenizer, [])
    assert encoder.name == name
    reference = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reference.encode_special_tokens = True
    # Several texts at once, the long ones among others; and each alone, where no other one can be why it is right.
    batches = [TEXTS[start : start + 7] for start in range(0, len(TEXTS), 7)] + [[text] for text in TEXTS]
    for texts in batches:
        for text, ids in zip(texts, encoder(texts), strict=True):
            expected = [*reference.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
            assert ids.tolist() == expected, text[:100]
            assert ids.dtype == np.uint16


def test_tiktoken_is_not_used_where_it_gives_other_ids(monkeypatch):
    tokenizer = train_tokenizer(make_documents(50, seed=3), 500)
    monkeypatch.setattr(byte_level_bpe, "GPT2_PATTERN", r"\w+|\W")
    assert Encoder(tokenizer, []).name == "tokenizers"
    monkeypatch.undo()
    # A difference that only the documents themselves show.
    monkeypatch.setattr(byte_level_bpe, "GPT2_PATTERN", " zebra|" + byte_level_bpe.GPT2_PATTERN)
    assert Encoder(tokenizer, []).name == "tiktoken"
    assert Encoder(tokenizer, ["no zebras"]).name == "tokenizers"


@pytest.mark.parametrize("threads", [1, 3])
def test_documents_come_back_in_order_whatever_the_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
    tokenizer = train_tokenizer(make_documents(50, seed=3), 500)
    documents = [("train" if index % 3 else "validation", text) for index, text in enumerate(make_documents(200))]
    encoded = list(encode_documents(documents, tokenizer, threads))
    assert [(split, text) for split, text, _ in encoded] == documents
    assert all(tokenizer.decode(ids[:-1]) == text for _, text, ids in encoded)
    assert list(encode_documents([], tokenizer, threads)) == []


def test_the_bytes_of_tokens_add_up_to_those_of_the_text():
    tokenizer = train_tokenizer(make_documents(50, seed=3), 500)
    text = "".join(random_texts(10))
    ids = Encoder(tokenizer, [])([text])[0]
    assert bytes_of_tokens(tokenizer)[ids].sum() == len(text.encode())
