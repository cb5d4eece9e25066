"""Weights of any stock GPT-2 come in, and go out again, exactly."""

import json
import os
import sys

import pytest
import torch
from conftest import run, succeed
from optimum.quanto import QLinear
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.tiny_models import (
    SHAPE,
    TOKENS,
    random_ids,
    randomise,
    stock_model_with_the_weights_of,
    tiny_model,
    tiny_stock_model,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, QuantoConfig

from modeling_gpt2scratch import PRESETS, GPT2ScratchConfig, GPT2ScratchForCausalLM, GPT2ScratchModel


def load(folder, cls=GPT2ScratchForCausalLM, **kwargs):
    """Every weight has to come from the checkpoint, and every one of the checkpoint's has to have a place."""
    model, report = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(report.values()), report
    return model


def assert_same_function(ours, theirs):
    """Logits to 1e-5, and the same greedy text."""
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.5  # not a comparison of zeros
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **arguments), theirs.generate(ids, **arguments))


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_go_in_and_out_at_the_proportions_of_all_four_sizes(preset, tmp_path):
    n_layer, n_head, n_embd = PRESETS[preset]
    stock = tiny_stock_model(n_layer=n_layer, n_head=n_head, n_embd=n_embd // 16)
    stock.save_pretrained(tmp_path / "stock")
    ours = load(tmp_path / "stock")
    assert_same_function(ours, stock)
    ours.save_pretrained(tmp_path / "exported", save_original_format=True)
    assert_same_function(load(tmp_path / "exported", GPT2LMHeadModel), stock)


@pytest.mark.parametrize("cls", [GPT2ScratchForCausalLM, AutoModelForCausalLM])
def test_weights_that_are_quantised_while_they_are_loaded_are_those_of_the_model(cls, tmp_path):
    """From stock's layout, where query, key and value are one weight, as from this model's own."""
    stock = tiny_stock_model(n_embd=64)
    stock.save_pretrained(tmp_path / "stock")
    load(tmp_path / "stock").save_pretrained(tmp_path / "own")
    if cls is AutoModelForCausalLM:  # by name, which a stock config's would be stock's class
        config = json.loads((tmp_path / "own/config.json").read_text())
        (tmp_path / "stock/config.json").write_text(json.dumps(config))
    quantization = QuantoConfig(weights="int8")
    logits = []
    for layout in ("stock", "own"):
        model = load(tmp_path / layout, cls, quantization_config=quantization)
        assert isinstance(model, GPT2ScratchForCausalLM)
        assert all(isinstance(layer.self_attn.k_proj, QLinear) for layer in model.model.layers)
        logits.append(model(random_ids(2, 12)).logits)
    assert torch.equal(*logits)
    expected = stock(random_ids(2, 12)).logits
    assert 0 < (logits[0] - expected).norm() < 0.05 * expected.norm()


def test_checkpoints_without_the_prefix_and_with_old_buffers(tmp_path):
    """As openai-community/gpt2 is: `h.0.attn.bias` there is a causal mask, not a bias."""
    stock = tiny_stock_model()
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    for layer in range(SHAPE["n_layer"]):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_function(load(tmp_path), stock)
    ids = random_ids(2, 12)
    expected = stock.transformer(ids).last_hidden_state
    torch.testing.assert_close(load(tmp_path, GPT2ScratchModel)(ids).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_a_stock_checkpoint_in_several_files_and_one_with_a_head_of_its_own(tmp_path):
    stock = tiny_stock_model(tie_word_embeddings=False)
    stock.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = load(tmp_path)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    assert_same_function(ours, stock)


def test_weights_are_loaded_in_the_dtype_that_is_asked_for(tmp_path):
    tiny_stock_model().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_pickled_checkpoint_is_loaded_but_not_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    stock = tiny_stock_model()
    stock.config.save_pretrained(tmp_path)
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_function(load(tmp_path), stock)
    torch.save({**stock.state_dict(), "attack": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        GPT2ScratchForCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_model_from_a_stock_checkpoint_is_saved_in_its_own_layout(tmp_path):
    """Or a resume that loads the weights by name would find none of them."""
    stock = tiny_stock_model()
    stock.save_pretrained(tmp_path / "stock")
    ours = load(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == ours.state_dict().keys() - {"lm_head.weight"}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "gpt2scratch"
    assert_same_function(load(tmp_path / "ours"), stock)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"tie_word_embeddings": False}, {"n_inner": 80}])
def test_an_export_is_a_stock_repository_of_the_same_function(changes, tmp_path):
    ours = tiny_model(**changes)
    randomise(ours)
    ours.generation_config.max_new_tokens = 7
    ours.save_pretrained(tmp_path, save_original_format=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert "auto_map" not in config
    stock = load(tmp_path, GPT2LMHeadModel)
    assert stock.generation_config.max_new_tokens == 7
    assert_same_function(ours, stock)


def test_the_export_has_every_weight_where_it_belongs(tmp_path):
    """Against a copy by hand, since a mistake that the map makes in both directions would cancel out."""
    ours = tiny_model()
    randomise(ours)
    ours.save_pretrained(tmp_path, save_original_format=True)
    exported = load(tmp_path, GPT2LMHeadModel).state_dict()
    for name, weight in stock_model_with_the_weights_of(ours).state_dict().items():
        assert torch.equal(exported[name], weight), name


def test_a_headless_model_is_exported_as_one(tmp_path):
    ours = tiny_model().model
    randomise(ours)
    ours.save_pretrained(tmp_path, save_original_format=True)
    ids = random_ids(2, 12)
    expected = load(tmp_path, GPT2Model)(ids).last_hidden_state
    torch.testing.assert_close(ours(ids).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_adapters_are_not_exported_in_silence(tmp_path):
    ours = tiny_model()
    ours.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(ValueError, match=r"adapters \(mine\)"):
        ours.save_pretrained(tmp_path / "out", save_original_format=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"scale_attn_weights": False},
    ],
)
def test_stock_options_that_this_model_lacks_are_refused_by_name(option, tmp_path):
    config = GPT2Config(**SHAPE, **TOKENS, **option)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    ((name, value),) = option.items()
    for construct in (
        lambda: GPT2ScratchConfig(**config.to_dict()),
        lambda: GPT2ScratchConfig.from_pretrained(tmp_path),
        lambda: GPT2ScratchForCausalLM.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"{name}={value} is not supported"):
            construct()


def test_a_config_of_another_architecture_is_refused_by_its_name(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        GPT2ScratchConfig.from_pretrained(tmp_path)


def test_a_stock_config_becomes_one_of_this_model(tmp_path):
    stock = GPT2Config(**SHAPE, **TOKENS, resid_pdrop=0.25)
    stock.save_pretrained(tmp_path)
    for config in (GPT2ScratchConfig.from_pretrained(tmp_path), GPT2ScratchConfig(**stock.to_dict())):
        assert config.model_type == "gpt2scratch"
        assert config.resid_pdrop == 0.25
        assert config.hidden_size == SHAPE["n_embd"] and config.num_hidden_layers == SHAPE["n_layer"]


def test_the_code_on_the_hub_converts_stock_weights_by_itself(tmp_path):
    """In a process that has no gpt2scratch but the files which were saved with a model."""
    tiny_model().save_pretrained(tmp_path / "ours")
    stock = tiny_stock_model()
    stock.save_pretrained(tmp_path / "stock")
    program = """
import importlib.util, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("modeling_gpt2scratch") is None
cls = type(AutoModelForCausalLM.from_pretrained("ours", trust_remote_code=True))
model = cls.from_pretrained("stock")
model.save_pretrained("exported", save_original_format=True)
model.train()
ids = torch.arange(10).unsqueeze(0)
output = model(ids, labels=ids)
assert output.logits is None
torch.save(output.loss, "loss.pt")
"""
    succeed(run(sys.executable, "-c", program, cwd=tmp_path, HF_HOME=str(tmp_path / "home"), PYTHONPATH=""))
    assert_same_function(load(tmp_path / "exported", GPT2LMHeadModel), stock)
    ids = torch.arange(10).unsqueeze(0)
    torch.testing.assert_close(torch.load(tmp_path / "loss.pt"), stock(ids, labels=ids).loss, rtol=1e-5, atol=0)
