"""The model: GPT-2 exactly, and a transformers model in every way a caller would expect."""

import math
import sys

import pytest
import torch
from conftest import run, succeed
from support.tiny_models import SHAPE, random_ids, randomise, stock_model_with_the_weights_of, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
)

from modeling_gpt2scratch import PRESETS, GPT2ScratchConfig, GPT2ScratchForCausalLM, GPT2ScratchModel


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_logits_loss_and_gradients_are_those_of_stock_gpt2(attn_implementation):
    model = tiny_model()
    randomise(model)
    model.set_attn_implementation(attn_implementation)
    stock = stock_model_with_the_weights_of(model)
    input_ids = torch.randint(0, 101, (3, 24), generator=torch.Generator().manual_seed(2))
    ours, theirs = model(input_ids, labels=input_ids), stock(input_ids, labels=input_ids)
    assert theirs.logits.std() > 1  # not a comparison of zeros
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    ours, theirs = model.model.embed_tokens.weight.grad, stock.transformer.wte.weight.grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_is_where_stock_gpt2_has_it(name):
    """They draw from the same generator in the same order, so that even the noise is the same."""
    model = tiny_model(**{name: 0.3})
    randomise(model)
    stock = GPT2LMHeadModel(
        GPT2Config(**SHAPE, **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, name: 0.3})
    )
    stock.load_state_dict(stock_model_with_the_weights_of(model).state_dict())
    ids = random_ids(2, 16)
    logits = []
    for either in (model, stock):
        either.set_attn_implementation("eager")
        torch.manual_seed(7)
        logits.append(either.train()(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert (logits[0] - model.eval()(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("prompt_length", [1, 7])
def test_greedy_text_is_the_same_with_and_without_a_cache_and_as_stock_gpt2s(prompt_length):
    model = tiny_model(eos_token_id=None)
    randomise(model)
    stock = stock_model_with_the_weights_of(model)
    prompt = torch.randint(1, 101, (2, prompt_length), generator=torch.Generator().manual_seed(3))
    arguments = {
        "attention_mask": torch.ones_like(prompt),
        "max_length": 24,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with_cache = model.generate(prompt, use_cache=True, **arguments)
    assert with_cache.shape == (2, 24)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **arguments))
    assert torch.equal(with_cache, stock.generate(prompt, use_cache=True, **arguments))


def test_residual_projections_start_smaller_by_the_depth():
    model = tiny_model(n_embd=256, n_layer=8, vocab_size=500)
    for layer in model.model.layers:
        for linear, expected in (
            (layer.self_attn.q_proj, 0.02),
            (layer.mlp.up_proj, 0.02),
            (layer.self_attn.o_proj, 0.02 / math.sqrt(16)),
            (layer.mlp.down_proj, 0.02 / math.sqrt(16)),
        ):
            assert linear.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert linear.bias.abs().max() == 0
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    ("preset", "parameters"),  # of openai-community/gpt2, gpt2-medium, gpt2-large, gpt2-xl
    [("124M", 124_439_808), ("350M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_the_presets_have_the_parameters_of_the_published_models(preset, parameters):
    with torch.device("meta"):
        model = GPT2ScratchForCausalLM(GPT2ScratchConfig.from_preset(preset))
    assert model.num_parameters() == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_default_config_is_the_smallest_preset_and_presets_take_changes():
    assert GPT2ScratchConfig().to_dict() == GPT2ScratchConfig.from_preset("124M").to_dict()
    assert GPT2ScratchConfig.from_preset("350M", n_layer=2, n_positions=8).n_layer == 2
    with pytest.raises(ValueError, match=f"'1.5B'.*{', '.join(PRESETS)}"):
        GPT2ScratchConfig.from_preset("1.5B")


def test_a_saved_model_loads_with_the_auto_classes(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GPT2ScratchConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), GPT2ScratchModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, GPT2ScratchForCausalLM)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name


def test_a_fresh_process_loads_the_saved_folder_with_its_own_code_alone(tmp_path):
    model = tiny_model()
    randomise(model)
    model.save_pretrained(tmp_path / "saved")
    program = """
import importlib.util, torch
from transformers import AutoModel, AutoModelForCausalLM
assert importlib.util.find_spec("modeling_gpt2scratch") is None
model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
headless = AutoModel.from_pretrained("saved", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
ids = torch.arange(10).unsqueeze(0)
hidden = headless(ids).last_hidden_state
torch.save((model(ids).logits, model.lm_head(hidden)), "logits.pt")
"""
    succeed(run(sys.executable, "-c", program, cwd=tmp_path, HF_HOME=str(tmp_path / "home"), PYTHONPATH=""))
    with torch.no_grad():
        expected = model(torch.arange(10).unsqueeze(0)).logits
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_sequence_beyond_the_positions_is_refused_with_both_lengths():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"25 tokens .* 24 positions"):
        model(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match=r"25 tokens .* 24 positions"):
        model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=9, min_new_tokens=9, pad_token_id=0)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=40)):
        model(torch.zeros(1, 20, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match=r"25 tokens .* 24 positions"):
            model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("outside", [101, -1])
def test_ids_outside_the_vocabulary_are_refused_by_value(outside):
    model = tiny_model()
    input_ids = random_ids(2, 5)
    input_ids[1, 3] = outside
    with pytest.raises(ValueError, match=f"id {outside} is outside .* vocabulary of 101"):
        model(input_ids)
    for skip_logits in (False, True):
        with pytest.raises(ValueError, match=f"id {outside} is outside .* vocabulary of 101"):
            model(random_ids(2, 5), labels=input_ids, skip_logits=skip_logits)


def test_both_or_neither_of_ids_and_embeddings_is_refused():
    model = tiny_model()
    input_ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="neither"):
        model()
    with pytest.raises(ValueError, match="both"):
        model(input_ids, inputs_embeds=model.model.embed_tokens(input_ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 50}, r"n_embd \(50\) must be a multiple of n_head \(4\)"),
        ({"n_layer": 0}, "n_layer .* got 0"),
        ({"attn_pdrop": 2.0}, "attn_pdrop .* got 2.0"),
        ({"activation_function": "foo"}, "activation_function 'foo'"),
        ({"n_head": 0}, "n_head .* got 0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon .* got 0.0"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT2ScratchConfig(**{**SHAPE, **changes})


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny_model().train()
    input_ids = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(4))
    model(input_ids, labels=input_ids).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids, labels=input_ids).loss.backward()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-8)


def test_logits_to_keep_and_num_items_in_batch():
    model = tiny_model()
    input_ids = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(5))
    everything = model(input_ids, labels=input_ids)
    torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, everything.logits[:, -3:])
    total = model(input_ids, labels=input_ids, num_items_in_batch=1).loss
    torch.testing.assert_close(total / (2 * 23), everything.loss)
