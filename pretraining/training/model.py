"""Models: loaded exactly as their files have them, or made from scratch from flags."""

import os
import re
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.hub import has_file

from modeling_gpt2scratch import PRESETS, GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining.cli import parse_pairs
from pretraining.errors import UserError, counted, nearest, one_line
from pretraining.hub import check_name
from pretraining.kernels.tiled_attention import TILED
from pretraining.model_flags import LoadedModelFlags
from pretraining.tokenization.tokenizer import load_tokenizer, open_tokenizer, tokenizer_fingerprint

CAUSAL_MASK = r"\.attn\.(masked_)?bias$"  # a buffer of old stock checkpoints, no weight


def load_model(model_class: Any, name_or_path: str, **options: Any) -> PreTrainedModel:
    """
    Load a causal language model in eval mode, and refuse weights that are not those of its config. transformers makes
    missing ones at random, leaves others out, and unties a head that is stored and differs, with a warning at most.

    Args:
        model_class: one with `from_pretrained`.
        name_or_path: a folder, or a name on the Hub.
        options: more arguments of `from_pretrained`.

    Raises:
        UserError: if it cannot be loaded, or the weights do not fit its config.
    """
    flag, verbosity = f"--model_name_or_path {name_or_path}", logging.get_verbosity()
    logging.set_verbosity_error()  # its report of weights that do not fit, which are refused here
    try:
        check_name(name_or_path)
        loaded: Any = model_class.from_pretrained(
            name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # damaged files, another kind of model: of several libraries
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{flag} comes with code of its own: read it, and if it may run here, give --trust_remote_code"
            ) from None
        is_place = isinstance(error, ImportError) or os.path.isdir(name_or_path)
        kind = "" if is_place else "is not a folder, and "
        raise UserError(f"{flag} {kind}cannot be loaded: {one_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    if problems := problems_of_weights(model, report):
        raise UserError(*(f"{flag} {problem}" for problem in problems))
    return model


def problems_of_weights(model: PreTrainedModel, report: dict) -> list[str]:
    """
    Args:
        report: the loading info of `from_pretrained`.
    """
    problems = []
    if missing := sorted(report["missing_keys"]):
        problems.append(f"lacks {counted(len(missing), 'weight')} that its config.json asks for, such as {missing[0]}")
    if unexpected := sorted(name for name in report["unexpected_keys"] if not re.search(CAUSAL_MASK, name)):
        number = counted(len(unexpected), "weight")
        problems.append(f"has {number} that its config.json has no place for, such as {unexpected[0]}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        number = counted(len(mismatched), "weight")
        problems.append(
            f"has {number} of other shapes than its config.json asks for, such as {name}: {list(found)}, not "
            f"{list(wanted)}"
        )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not problems and is_tied and head is not None and head.weight is not embeddings.weight:
        problems.append(
            "has an output head that differs from its embeddings, but its config.json ties them: set "
            "tie_word_embeddings to false there, if the head is to be used"
        )
    return problems


def load_model_and_tokenizer(
    model_class: Any, name_or_path: str, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a model as `load_model` does, and its tokenizer.

    Raises:
        UserError: if either cannot be loaded.
    """
    return load_model(model_class, name_or_path, **options), open_tokenizer(name_or_path, **options)


def load_from_flags(
    flags: LoadedModelFlags, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load the model and tokenizer that the flags name.

    Args:
        dtype: of the weights; that of their files if left out.

    Raises:
        UserError: if either cannot be loaded.
    """
    name, revision = flags.model_name_or_path, flags.model_revision or "main"
    options = {"revision": revision, "trust_remote_code": flags.trust_remote_code}
    model = load_model(AutoModelForCausalLM, name, **options, **({} if dtype is None else {"dtype": dtype}))
    return model, open_tokenizer(name, **options)


def load_config(
    model_name_or_path: str | None, config_name: str | None, overrides: str | None, vocab_size: int, eos_token_id: int
) -> PreTrainedConfig:
    """
    The config to train with: that of the weights to start from, or else the named one (GPT-2 124M if none is) with
    `overrides`. From scratch, the vocabulary and the end-of-text token are the tokenizer's unless overridden.

    Args:
        model_name_or_path, config_name: a folder or a Hub id, of this model or of a stock GPT-2; a config may also be
            one of `PRESETS`.

    Raises:
        UserError: for a name that cannot be loaded, an unknown override, or values that make no model.
    """
    source = model_name_or_path or config_name
    try:
        check_name(source or "")
        if source is None or source in PRESETS:
            config = GPT2ScratchConfig.from_preset(source or "124M")
        elif not PreTrainedConfig.get_config_dict(source)[0]:  # from_pretrained would take the defaults
            raise OSError("it has no config.json")
        else:
            config = GPT2ScratchConfig.from_pretrained(source)
    except Exception as error:  # no such config, or one with anything in it: of several libraries
        presets = "" if model_name_or_path else f" (or use a preset: {', '.join(PRESETS)})"
        raise UserError(f"{source} cannot be loaded: {one_line(error)}{presets}") from None
    if model_name_or_path:
        return config
    changes: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    changes |= parse_overrides(overrides or "")
    if "n_embd" in changes:
        changes.setdefault("n_inner", None)  # four times the new width, not the old one
    try:
        return GPT2ScratchConfig(**{**config.to_dict(), **changes})
    except Exception as error:  # the strict dataclass wraps ours and its own in errors of several classes
        raise UserError(f"--config_overrides {overrides}: {one_line(error.__cause__ or error)}") from None


def parse_overrides(text: str) -> dict:
    """
    `n_layer=4,n_embd=256` to `{"n_layer": 4, "n_embd": 256}`.

    Raises:
        UserError: for what is not `name=value`, or a name that the config does not have.
    """
    known = [*GPT2ScratchConfig.__annotations__, *GPT2ScratchConfig.attribute_map]
    pairs = parse_pairs("--config_overrides", text)
    if unknown := [key for key in pairs if key not in known]:
        raise UserError(*(f"--config_overrides: the config has no '{key}'{nearest(key, known)}" for key in unknown))
    return {GPT2ScratchConfig.attribute_map.get(key, key): value for key, value in pairs.items()}


def check_fit(config: PreTrainedConfig, vocab_size: int, block_size: int) -> None:
    """
    Args:
        vocab_size: that the tokenizer of the data needs.
        block_size: tokens in a row.

    Raises:
        UserError: with everything in which data, tokenizer and model do not fit together.
    """
    problems = []
    if block_size > config.n_positions:
        problems.append(
            f"--block_size {block_size} is beyond the model's {config.n_positions} positions: "
            f"--config_overrides n_positions={block_size} makes room, or use shorter rows"
        )
    if vocab_size > config.vocab_size:
        problems.append(
            f"the tokenizer of the data has ids up to {vocab_size - 1}, beyond the model's vocabulary of "
            f"{config.vocab_size} (vocab_size)"
        )
    if problems:
        raise UserError(*problems)


def check_tokenizer(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Args:
        model_name_or_path: of the weights to start from, with or without a tokenizer beside them.
        tokenizer: that the data was made with.

    Raises:
        UserError: if it is another one than the model's, for which the ids of the data are other tokens.
    """
    # Of the weights alone nobody can tell, and transformers makes a tokenizer without a vocabulary for them.
    if not has_file(model_name_or_path, "tokenizer.json"):
        return
    if tokenizer_fingerprint(load_tokenizer(model_name_or_path)) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"the data was made with another tokenizer than that of {model_name_or_path}: prepare it with "
            f"--tokenizer_name {model_name_or_path}"
        )


def attention_on(device: torch.device, mixed_precision: str, attn_implementation: str) -> str:
    """`attn_implementation`, or `TILED` in place of sdpa on a CPU in bf16, where torch's kernel is slow."""
    is_slow = attn_implementation == "sdpa" and device.type == "cpu" and mixed_precision == "bf16"
    return TILED if is_slow else attn_implementation


def build_model(
    config: PreTrainedConfig, model_name_or_path: str | None, attn_implementation: str, gradient_checkpointing: bool
) -> PreTrainedModel:
    """
    Return the model in training mode, in fp32: under bf16 autocast the weights and the optimizer's sums stay exact.

    Raises:
        UserError: if there are no such weights, or the attention implementation is not installed.
    """
    if model_name_or_path:
        options = {"attn_implementation": attn_implementation, "dtype": torch.float32}
        model = load_model(GPT2ScratchForCausalLM, model_name_or_path, **options)
    else:
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
        except (ImportError, ValueError) as error:  # an attention that is not installed
            raise UserError(f"the model cannot be made: {one_line(error)}") from None
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()
