"""Tokenizers whose ids have gaps: each id is stored, trained on and decoded as it is."""

import json

import numpy as np
import pytest
from conftest import make_documents, script, succeed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from pretraining.data.data_folder import open_data_folder
from pretraining.tokenization.byte_level_bpe import bytes_of_tokens
from pretraining.tokenization.encoding import Encoder
from pretraining.tokenization.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer, vocab_size_of

DOCUMENTS = make_documents(40)
RARE = "Ġreturn"


def with_ids(folder, ids: dict[str, int], vocab_size: int = 300):
    """A byte-level BPE of which some tokens have other ids."""
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    assert ids.keys() <= description["model"]["vocab"].keys()
    description["model"]["vocab"] |= ids
    for token in description["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    moved = Tokenizer.from_str(json.dumps(description))
    PreTrainedTokenizerFast(tokenizer_object=moved, eos_token=END_OF_TEXT).save_pretrained(folder)


def word_level(folder):
    words = {word: 2 * number for number, word in enumerate(sorted({*" ".join(DOCUMENTS).split(), "<unk>", "<eot>"}))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eot>", unk_token="<unk>").save_pretrained(folder)


TOKENIZERS = {
    "a rare token": (lambda folder: with_ids(folder, {RARE: 70_000}), 70_001),
    "end of text": (lambda folder: with_ids(folder, {END_OF_TEXT: 70_000}), 70_001),
    "end of text after a gap": (lambda folder: with_ids(folder, {END_OF_TEXT: 50_256}), 50_257),
    "the largest in two bytes": (lambda folder: with_ids(folder, {RARE: 65_535}), 65_536),
    "the smallest in four": (lambda folder: with_ids(folder, {RARE: 65_536}), 65_537),
    "every second one": (word_level, None),
}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS, scope="module")
def tokenizer(request, tmp_path_factory):
    make, vocab_size = request.param
    folder = tmp_path_factory.mktemp("tokenizer")
    make(folder)
    tokenizer = load_tokenizer(folder)
    assert vocab_size in (None, vocab_size_of(tokenizer)) and vocab_size_of(tokenizer) > len(tokenizer)
    return tokenizer


def expected_ids(tokenizer, texts: list[str]) -> list[int]:
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [token for ids in encoded for token in [*ids, tokenizer.eos_token_id]]


def test_the_encoder_gives_the_tokenizers_ids(tokenizer):
    found = np.concatenate(Encoder(tokenizer, DOCUMENTS[:5])(DOCUMENTS)).tolist()
    assert found == expected_ids(tokenizer, DOCUMENTS)
    assert max(found) < vocab_size_of(tokenizer)


def test_bytes_of_tokens_are_those_of_the_text(tokenizer):
    sizes = bytes_of_tokens(tokenizer)
    if sizes is not None:  # only a byte-level BPE's are known
        assert sizes[expected_ids(tokenizer, DOCUMENTS)].sum() == sum(len(text.encode()) for text in DOCUMENTS)


def test_packed_and_streamed_text_trains(tokenizer, tmp_path):
    name, texts = tokenizer.name_or_path, tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    sizes = ("--tokenizer_name", name, "--block_size", 16)
    source = ("--train_file", texts, "--validation_file", texts)
    succeed(script("prepare_data.py", *source, *sizes, "--output_dir", tmp_path / "data"))
    data = open_data_folder(tmp_path / "data").train
    ids = data.__getitems__(list(range(len(data)))).flatten().tolist()
    assert ids == expected_ids(tokenizer, DOCUMENTS)[: len(ids)] and len(ids) > 1000

    flags = ("--config_overrides", "n_layer=1,n_embd=8,n_head=1,n_positions=16", "--max_steps", 2)
    for run, data in (("packed", ("--data_dir", tmp_path / "data")), ("streamed", ("--streaming", *source, *sizes))):
        succeed(script("train_accelerate.py", *data, "--output_dir", tmp_path / run, *flags, "--report_to", "none"))
        assert AutoConfig.from_pretrained(tmp_path / run).vocab_size == vocab_size_of(tokenizer)
