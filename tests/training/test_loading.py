"""A model is loaded exactly as its files have it, or refused: by every script, for every way not to fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_model, tiny_stock_model
from transformers import AutoModelForCausalLM

import eval_hellaswag
import publish_model
import train_accelerate
from modeling_gpt2scratch import GPT2ScratchForCausalLM
from pretraining.errors import UserError
from pretraining.training.model import load_model


def without_a_layer(weights: dict, config: dict) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        del weights[name]


def one_layer_more_in_the_config(weights: dict, config: dict) -> None:
    config["n_layer"] += 1


def one_layer_less_in_the_config(weights: dict, config: dict) -> None:
    config["n_layer"] -= 1


def other_positions(weights: dict, config: dict) -> None:
    config["n_positions"] *= 2


def head_of_its_own(weights: dict, config: dict) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


def head_that_is_missing(weights: dict, config: dict) -> None:
    config["tie_word_embeddings"] = False


FAULTS = [
    (without_a_layer, "lacks 16 weights that its config.json asks for, such as model.layers.1."),
    (one_layer_more_in_the_config, "lacks 16 weights that its config.json asks for, such as model.layers.2."),
    (one_layer_less_in_the_config, "has 16 weights that its config.json has no place for, such as model.layers.1."),
    (
        other_positions,
        "has 1 weight of other shapes than its config.json asks for, such as model.embed_positions.weight",
    ),
    (head_of_its_own, "has an output head that differs from its embeddings, but its config.json ties them"),
    (head_that_is_missing, "lacks 1 weight that its config.json asks for, such as lm_head.weight"),
]


def damage(folder, fault) -> None:
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    fault(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
@pytest.mark.parametrize("model_class", [GPT2ScratchForCausalLM, AutoModelForCausalLM])
def test_weights_that_do_not_fit_are_refused(model_class, fault, message, tmp_path, capfd):
    tiny_model(n_layer=2).save_pretrained(tmp_path)
    damage(tmp_path, fault)
    with pytest.raises(UserError) as error:
        load_model(model_class, str(tmp_path))
    (problem,) = error.value.problems
    assert problem.startswith(f"--model_name_or_path {tmp_path} {message}") and "\n" not in problem
    assert "LOAD REPORT" not in capfd.readouterr().err


def same_head(weights: dict, config: dict) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def head_and_config_of_its_own(weights: dict, config: dict) -> None:
    head_of_its_own(weights, config)
    config["tie_word_embeddings"] = False


@pytest.mark.parametrize(("fit", "offset"), [(same_head, 0), (head_and_config_of_its_own, 1)])
def test_a_head_that_is_stored_is_the_models(fit, offset, tmp_path):
    tiny_model(n_layer=2).save_pretrained(tmp_path)
    damage(tmp_path, fit)
    model = load_model(GPT2ScratchForCausalLM, str(tmp_path))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (offset == 0)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + offset)


def test_causal_masks_of_old_stock_checkpoints_are_no_weights(tmp_path):
    tiny_stock_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(weights | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for model_class in (GPT2ScratchForCausalLM, AutoModelForCausalLM):
        assert load_model(model_class, str(tmp_path))


def test_a_missing_attention_package_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot be loaded: .*[Ff]lash") as error:
        tiny_model().save_pretrained(tmp_path)
        load_model(GPT2ScratchForCausalLM, str(tmp_path), attn_implementation="flash_attention_2")
    assert "is not a folder" not in str(error.value)


def test_every_script_refuses_a_model_with_missing_weights(data_dir, tmp_path, refuse):
    folder = tmp_path / "model"
    tiny_model(vocab_size=320, n_positions=32, n_layer=2).save_pretrained(folder)
    shutil.copytree(data_dir / "tokenizer", folder, dirs_exist_ok=True)
    damage(folder, without_a_layer)
    items = tmp_path / "items.jsonl"
    items.write_text(
        json.dumps(
            {
                "ind": 0,
                "activity_label": "",
                "ctx_a": "a b",
                "ctx_b": "",
                "ctx": "a b",
                "label": 0,
                "endings": list("abcd"),
            }
        )
    )
    out = tmp_path / "out"
    commands = [
        (train_accelerate, "--data_dir", data_dir, "--output_dir", out, "--max_steps", 1),
        (eval_hellaswag, "--data_file", items, "--output_file", out),
        (publish_model, "--format", "gpt2", "--output_dir", out),
    ]
    for script, *arguments in commands:
        (error,) = refuse(script, "--model_name_or_path", folder, *arguments)
        assert f"--model_name_or_path {folder} lacks 16 weights that its config.json asks for" in error
        assert not out.exists()
