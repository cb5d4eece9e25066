"""Tokenizers whose ids have gaps: each id is stored, trained on and decoded as it is."""

import json
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_documents, script, succeed
from support.tiny_models import randomise, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from pretraining.data.data_folder import open_data_folder
from pretraining.data.row_order import StepSplit
from pretraining.data.streaming import open_streams
from pretraining.publishing.formats import write_gguf, write_onnx, write_stock
from pretraining.text.sources import Source
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


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request, tmp_path_factory):
    make, vocab_size = TOKENIZERS[request.param]
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


@pytest.fixture
def source(tmp_path):
    for name, documents in (("texts", DOCUMENTS), ("validation", DOCUMENTS[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return ("--train_file", tmp_path / "texts.jsonl", "--validation_file", tmp_path / "validation.jsonl")


def test_packed_rows_hold_the_tokenizers_ids(tokenizer, source, tmp_path):
    sizes = ("--tokenizer_name", tokenizer.name_or_path, "--block_size", 16)
    succeed(script("prepare_data.py", *source, *sizes, "--output_dir", tmp_path / "data"))
    data = open_data_folder(tmp_path / "data").train
    ids = data.__getitems__(list(range(len(data)))).flatten().tolist()
    assert ids == expected_ids(tokenizer, DOCUMENTS)[: len(ids)] and len(ids) > 1000


def test_streamed_rows_hold_the_tokenizers_ids(tokenizer, source):
    flags = dict(zip([flag.removeprefix("--") for flag in source[::2]], map(str, source[1::2]), strict=True))
    data = open_streams([Source(**flags)], tokenizer.name_or_path, 16, 5)
    batches = data.batches(StepSplit(4, 1, 1, 0, 0), seed=7, first_step=0, position=None)
    rows = torch.cat([next(batches) for _ in range(20)])
    assert rows.flatten().tolist() == expected_ids(tokenizer, DOCUMENTS)[: rows.numel()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("tokenizer", ["a rare token", "end of text"], indirect=True)
def test_a_model_trains_on_them(streaming, tokenizer, source, tmp_path):
    data = ("--streaming", *source, "--tokenizer_name", tokenizer.name_or_path, "--block_size", 16)
    if not streaming:
        succeed(script("prepare_data.py", *data[1:], "--output_dir", tmp_path / "data"))
        data = ("--data_dir", tmp_path / "data")
    flags = ("--config_overrides", "n_layer=1,n_embd=8,n_head=1,n_positions=16", "--max_steps", 2)
    succeed(script("train_accelerate.py", *data, "--output_dir", tmp_path / "run", *flags, "--report_to", "none"))
    assert AutoConfig.from_pretrained(tmp_path / "run").vocab_size == vocab_size_of(tokenizer)


def test_a_model_with_ids_beyond_65536_goes_into_every_format(tmp_path):
    with_ids(tmp_path / "tokenizer", {RARE: 70_000})
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model = tiny_model(vocab_size=70_001, n_embd=32, n_layer=1, n_head=1)
    randomise(model)
    ids = torch.tensor([tokenizer("x return y")["input_ids"]])
    assert 70_000 in ids
    with torch.no_grad():
        expected = model(ids).logits
    for name, write in (("gpt2", write_stock), ("onnx", write_onnx), ("gguf", partial(write_gguf, outtype="f32"))):
        (tmp_path / name).mkdir()
        write(model, tokenizer, tmp_path / name)
    with torch.no_grad():
        stock = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")(ids).logits
        sizes = {"n_positions": model.config.n_positions, "n_inner": model.config.n_inner}
        gguf = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", **sizes)(ids).logits
    nothing = np.zeros((1, 1, 0, 32), np.float32)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
    }
    past = {f"past_key_values.0.{part}": nothing for part in ("key", "value")}
    session = onnxruntime.InferenceSession(tmp_path / "onnx/onnx/model.onnx")
    onnx = session.run(["logits"], {name: each.numpy() for name, each in inputs.items()} | past)[0]
    for found in (stock, gguf, torch.from_numpy(onnx)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for folder, options in (("gpt2", {}), ("onnx", {}), ("gguf", {"gguf_file": "model.gguf"})):
        other = AutoTokenizer.from_pretrained(tmp_path / folder, **options)
        assert other("x return y")["input_ids"] == ids[0].tolist(), folder
