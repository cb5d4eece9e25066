"""The recipe for fewer tokens, at GPT-2's width and vocabulary: its first losses are stock GPT-2's in a plain loop."""

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from conftest import REPOSITORY, make_documents, metrics, script, succeed
from support.generated_items import generated_records, write_items
from support.tiny_models import stock_model_with_the_weights_of
from transformers import GPT2LMHeadModel

from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining.data.row_order import RowOrder
from pretraining.optimization.optimizer import build_optimizer
from pretraining.optimization.options import OptimOptions
from pretraining.tokenization.tokenizer import train_tokenizer

LAYERS = 1  # of 12, with which this takes two minutes, and passes too
STEPS, ROWS, BLOCK = 3, 2, 32


@pytest.fixture
def token_files(tmp_path):
    """As llm.c writes them."""
    generator = np.random.default_rng(0)
    for name in ("fineweb_train_000001", "fineweb_val_000000"):
        ids = generator.integers(0, 300, 20 * BLOCK + 1).astype("<u2")
        header = np.array([20240520, 1, len(ids), *[0] * 253], "<i4")
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + ids.tobytes())
    train_tokenizer(make_documents(20), 300).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def copy_gradients(stock: GPT2LMHeadModel, ours: GPT2ScratchForCausalLM) -> None:
    """From the layout of stock GPT-2, whose matrices are transposed, with query, key and value in one."""
    ours.model.embed_tokens.weight.grad = stock.transformer.wte.weight.grad
    ours.model.embed_positions.weight.grad = stock.transformer.wpe.weight.grad
    pairs = [(stock.transformer.ln_f, ours.model.norm)]
    for theirs, layer in zip(stock.transformer.h, ours.model.layers, strict=True):
        pairs += [(theirs.ln_1, layer.input_layernorm), (theirs.ln_2, layer.post_attention_layernorm)]
        qkv = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        weights, biases = theirs.attn.c_attn.weight.grad.chunk(3, dim=1), theirs.attn.c_attn.bias.grad.chunk(3)
        for linear, weight, bias in zip(qkv, weights, biases, strict=True):
            linear.weight.grad, linear.bias.grad = weight.T.contiguous(), bias
        for conv, linear in (
            (theirs.attn.c_proj, layer.self_attn.o_proj),
            (theirs.mlp.c_fc, layer.mlp.up_proj),
            (theirs.mlp.c_proj, layer.mlp.down_proj),
        ):
            linear.weight.grad, linear.bias.grad = conv.weight.grad.T.contiguous(), conv.bias.grad
    for norm, other in pairs:
        other.weight.grad, other.bias.grad = norm.weight.grad, norm.bias.grad


def test_the_first_losses_are_those_of_stock_gpt2_in_a_plain_loop(token_files, tmp_path):
    items = write_items(tmp_path / "items.jsonl", generated_records(1))
    recipe = ("--config", REPOSITORY / "configs/gpt2-124m-fast.yaml", "--output_dir", tmp_path / "run")
    data = ("--dataset_name", "", "--data_dir", token_files, "--tokenizer_name", token_files / "tokenizer")
    size = ("--block_size", BLOCK, "--per_device_train_batch_size", 1, "--tokens_per_step", ROWS * BLOCK)
    steps = ("--max_steps", STEPS, "--warmup_steps", 2, "--logging_steps", 1, "--eval_iters", 1)
    model = ("--config_overrides", f"vocab_size=50257,n_layer={LAYERS}")
    rest = ("--torch_compile", False, "--dataloader_num_workers", 0, "--hellaswag_file", items, "--report_to", "none")
    succeed(script("train_accelerate.py", *recipe, *data, *size, *steps, *model, *rest, "--sample_prompts", ""))
    found = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]

    set_seed(42)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    ours = GPT2ScratchForCausalLM(GPT2ScratchConfig(n_layer=LAYERS, **tokens)).train()
    options = OptimOptions(matrix_lr=0.5)
    cpu = torch.device("cpu")
    optimizer = build_optimizer(ours, "muon", 3.6e-3, 0.0, cpu, betas=(0.9, 0.99), options=options)
    ids = np.fromfile(token_files / "fineweb_train_000001.bin", "<u2", offset=1024).astype(np.int64)
    rows = torch.from_numpy(ids[: 20 * BLOCK].reshape(20, BLOCK))
    order = RowOrder([20], batch_size=ROWS, seed=42)
    expected = []
    for step in range(STEPS):
        shape = {name: getattr(ours.config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_head")}
        stock = stock_model_with_the_weights_of(ours, n_layer=LAYERS, **shape)
        input_ids = rows[order.rows(step, 0)]
        logits = stock(input_ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
        loss.backward()
        expected.append(loss.item())
        copy_gradients(stock, ours)
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        for group in optimizer.param_groups:  # two steps of warm-up, and one of a decay over the last 0.29 of it
            group["lr"] = 3.6e-3 * (0.5, 1.0, 1.0)[step] * group["lr_factor"]
            if group["kind"] == "muon":
                group["momentum"] = 0.85 + step / 300 * 0.1
        optimizer.step()
    assert found == pytest.approx(expected, rel=2e-5)
    assert found[-1] < found[0]
