"""The model: GPT-2 exactly, and a transformers model in every way a caller would expect."""

import math
import sys

import pytest
import torch
from conftest import run, succeed
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM, GPT2ScratchModel

SHAPE = {"vocab_size": 101, "n_positions": 24, "n_embd": 48, "n_layer": 3, "n_head": 4}


def tiny_model(**changes) -> GPT2ScratchForCausalLM:
    torch.manual_seed(0)
    config = GPT2ScratchConfig(**{**SHAPE, "bos_token_id": 0, "eos_token_id": 0, **changes})
    return GPT2ScratchForCausalLM(config).eval()


def stock_model_with_the_weights_of(model: GPT2ScratchForCausalLM) -> GPT2LMHeadModel:
    """transformers' own GPT-2. Its linear layers hold their weights transposed, and q, k and v in one."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    stock = GPT2LMHeadModel(GPT2Config(**SHAPE, **no_dropout)).eval()
    with torch.no_grad():
        stock.transformer.wte.weight.copy_(model.model.embed_tokens.weight)
        stock.transformer.wpe.weight.copy_(model.model.embed_positions.weight)
        stock.transformer.ln_f.load_state_dict(model.model.norm.state_dict())
        for theirs, ours in zip(stock.transformer.h, model.model.layers, strict=True):
            theirs.ln_1.load_state_dict(ours.input_layernorm.state_dict())
            theirs.ln_2.load_state_dict(ours.post_attention_layernorm.state_dict())
            attention = ours.self_attn
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            theirs.attn.c_attn.weight.copy_(torch.cat([linear.weight.T for linear in qkv], dim=1))
            theirs.attn.c_attn.bias.copy_(torch.cat([linear.bias for linear in qkv]))
            for conv, linear in (
                (theirs.attn.c_proj, attention.o_proj),
                (theirs.mlp.c_fc, ours.mlp.up_proj),
                (theirs.mlp.c_proj, ours.mlp.down_proj),
            ):
                conv.weight.copy_(linear.weight.T)
                conv.bias.copy_(linear.bias)
    return stock


def randomise(model: torch.nn.Module) -> None:
    """Weights of a size at which every part of the model matters, biases and norms included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


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


def test_left_padded_batches_match_single_sequences():
    model = tiny_model()
    randomise(model)
    short = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = model(padded, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(batch[0, 2:], model(short).logits[0], rtol=0, atol=1e-5)


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


def test_the_default_config_is_gpt2_124m():
    with torch.device("meta"):
        model = GPT2ScratchForCausalLM(GPT2ScratchConfig())
    assert model.num_parameters() == 124_439_808  # of openai-community/gpt2
    assert model.lm_head.weight is model.model.embed_tokens.weight


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
    model.config.auto_map = {"AutoModel": "modeling_gpt2scratch.GPT2ScratchModel"}
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
    cache = model(torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"25 tokens .* 24 positions"):
        model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)


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
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(Exception, match=message):  # the strict dataclass wraps the ValueError in one of its own
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
