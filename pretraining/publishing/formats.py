"""
A trained model in the formats of other programs. All of them start from the stock GPT-2 that it is equal to, which
every reader of a format knows.
"""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from pretraining.errors import UserError
from pretraining.tokenization.byte_level_bpe import GPT2_PATTERN, merges_of, pattern_of

if TYPE_CHECKING:
    import gguf

# onnx's file format, protobuf, holds 2 GB; of larger models the weights go into a file of their own, model.onnx_data.
ONNX_LIMIT = 2_000_000_000
STOCK = "stock"  # a folder on the way to other formats


def write_stock(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A repository that `GPT2LMHeadModel` loads, and so do vLLM, TGI and whatever else knows GPT-2."""
    model.save_pretrained(folder, save_original_format=True)
    tokenizer.save_pretrained(folder)


def write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """onnx/model.onnx (see `_onnx_program`), beside the files that transformers.js and optimum read with it."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    stock = to_stock(model, folder)
    program = _onnx_program(stock)
    ClearMetadataAndDocStringPass()(program.model)  # where in this machine's files each operation comes from
    is_large = sum(parameter.nbytes for parameter in stock.parameters()) > ONNX_LIMIT
    onnx_file = folder / "onnx" / "model.onnx"
    onnx_file.parent.mkdir(parents=True)
    onnx_ir.save(program.model, onnx_file, external_data="model.onnx_data" if is_large else None)
    stock.config.save_pretrained(folder)
    stock.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _onnx_program(stock: GPT2LMHeadModel) -> torch.onnx.ONNXProgram:
    """
    One graph that reads a prompt and goes on from what it has read, in names and shapes as transformers.js and optimum
    have it:

    | input or output                                    | shape                                |
    |----------------------------------------------------|--------------------------------------|
    | `input_ids`, `position_ids`                        | (batch, tokens)                      |
    | `attention_mask`                                   | (batch, past + tokens)               |
    | `past_key_values.N.key`, `past_key_values.N.value` | (batch, heads, past, width)          |
    | `logits`                                           | (batch, tokens, vocabulary)          |
    | `present.N.key`, `present.N.value`                 | (batch, heads, past + tokens, width) |
    """
    config = stock.config
    heads, width, layers = config.n_head, config.n_embd // config.n_head, range(config.n_layer)
    # Sizes that differ from each other and from 0 and 1, which a trace would take for fixed.
    batch, past, tokens = 2, 3, 4
    cache = [(torch.zeros(batch, heads, past, width), torch.zeros(batch, heads, past, width)) for _ in layers]
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    positions = torch.arange(past, past + tokens).repeat(batch, 1)
    rows, states = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 2: "past_sequence_length"}
    attended = {0: "batch_size", 1: "total_sequence_length"}
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its warnings are of what is not used here
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(  # type: ignore[return-value]  # None without dynamo
            _WithCache(stock),
            (ids, torch.ones(batch, past + tokens, dtype=torch.long), positions, cache),
            dynamo=True,
            dynamic_shapes=(rows, attended, rows, [(states, states) for _ in layers]),
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{part}" for part in parts),
            ],
            output_names=["logits", *(f"present.{part}" for part in parts)],
            verbose=False,
        )


class _WithCache(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list
    ) -> tuple[torch.Tensor, list]:
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, outtype: str) -> None:
    """
    model.gguf, for llama.cpp and what is built on it, and for transformers' `gguf_file`. Names and fields are those of
    llama.cpp's own converter (conversion/gpt2.py).

    Args:
        outtype: of the matrices: `f32`, `f16`, `bf16` or `q8_0`. Vectors stay f32, as llama.cpp wants them.

    Raises:
        UserError: for a tokenizer that is not a byte-level BPE with GPT-2's splitting of words, which is what the
            format would say it is.
    """
    import gguf

    tokens, types, merges = _vocabulary(tokenizer, model.config.vocab_size)
    stock = to_stock(model, folder)
    config = stock.config
    writer = gguf.GGUFWriter(folder / "model.gguf", "gpt2")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{outtype.upper()}" if outtype != "f32" else "ALL_F32"))
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)

    _add_tensors(writer, stock, getattr(gguf.GGMLQuantizationType, outtype.upper()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensors(writer: "gguf.GGUFWriter", stock: GPT2LMHeadModel, quantized: "gguf.GGMLQuantizationType") -> None:
    """The weights under llama.cpp's names, matrices as `quantized` where their rows are whole blocks of it."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, stock.config.n_layer)
    for name, weight in stock.state_dict().items():
        if name == "lm_head.weight" and stock.config.tie_word_embeddings:
            continue
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T  # stock linear layers hold them as (in, out)
        array = weight.float().contiguous().numpy()
        is_matrix = array.ndim == 2 and not name.endswith("wpe.weight")
        fits = array.shape[-1] % gguf.GGML_QUANT_SIZES[quantized][0] == 0
        kind = quantized if is_matrix and fits else gguf.GGMLQuantizationType.F32
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(str(new_name), gguf.quants.quantize(array, kind), raw_dtype=kind)


def to_stock(model: PreTrainedModel, folder: Path) -> GPT2LMHeadModel:
    """transformers' own GPT-2 with the model's weights, in fp32, by way of a folder in `folder` that is deleted."""
    model.save_pretrained(folder / STOCK, save_original_format=True)
    stock = GPT2LMHeadModel.from_pretrained(folder / STOCK, dtype=torch.float32).eval()
    shutil.rmtree(folder / STOCK)
    return stock


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges, as GGUF wants them."""
    import gguf

    description = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    is_bpe = description.get("model", {}).get("type") == "BPE"
    if not is_bpe or description["normalizer"] or pattern_of(description["pre_tokenizer"]) != GPT2_PATTERN:
        raise UserError(
            "--format gguf is for byte-level BPE tokenizers that split words as GPT-2's does, not this one"
        )
    special = {token["id"] for token in description["added_tokens"] if token["special"]}
    added = {token["id"] for token in description["added_tokens"]} - special
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kind = gguf.TokenType
    types: list[int] = [
        kind.UNUSED
        if index not in by_id
        else kind.CONTROL
        if index in special
        else kind.USER_DEFINED
        if index in added
        else kind.NORMAL
        for index in range(vocab_size)
    ]
    return tokens, types, [" ".join(merge) for merge in merges_of(description)]
