"""A GPT-2 small enough for a test, and transformers' own with the same weights: the reference for everything."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM

SHAPE = {"vocab_size": 101, "n_positions": 24, "n_embd": 48, "n_layer": 3, "n_head": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def tiny_model(**changes) -> GPT2ScratchForCausalLM:
    torch.manual_seed(0)
    return GPT2ScratchForCausalLM(GPT2ScratchConfig(**{**SHAPE, **TOKENS, **changes})).eval()


def tiny_stock_model(**changes) -> GPT2LMHeadModel:
    """transformers' GPT-2, without dropout, with weights at which every part of it matters."""
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**{**SHAPE, **TOKENS, **no_dropout, **changes})).eval()
    randomise(model)
    return model


def stock_model_with_the_weights_of(model: GPT2ScratchForCausalLM, **changes) -> GPT2LMHeadModel:
    """Copied one by one. Stock linear layers hold their weights transposed, and q, k and v in one."""
    stock = tiny_stock_model(**changes)
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


def random_ids(*shape: int, vocab_size: int = 101, seed: int = 2) -> torch.Tensor:
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
