"""Attention in tiles gives what its formula gives, written out here in double precision."""

import pytest
import torch
from support.tiny_models import random_ids, randomise, tiny_model

from pretraining.kernels import tiled_attention
from pretraining.kernels.tiled_attention import TILE_QUERIES, TILED, causal_attention
from pretraining.training.model import attention_on

LENGTH = 2 * TILE_QUERIES + 44  # three tiles, the last one short


def inputs(dtype: torch.dtype, batch: int = 3) -> list[torch.Tensor]:
    """Scaled queries, keys, values (B, H, T, D), strided as a model's are, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, LENGTH, 2, 8, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]


def documents(batch: int = 3) -> torch.Tensor:
    """(B, 1, T, T): each row with documents of its own, one of which ends within a tile."""
    ends = torch.tensor([[100, 200], [TILE_QUERIES, 2 * TILE_QUERIES], [1, 299]])[:batch]
    number = (torch.arange(LENGTH) >= ends.unsqueeze(-1)).sum(1)  # (B, T)
    return ((number.unsqueeze(1) == number.unsqueeze(2)) & torch.ones(LENGTH, LENGTH).tril().bool()).unsqueeze(1)


def written_out(query, key, value, mask):
    mask = torch.ones(LENGTH, LENGTH).tril().bool() if mask is None else mask
    scores = (query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value


def with_gradients(attention, tensors: list[torch.Tensor], mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    *leaves, gradient = (tensor.detach().requires_grad_() for tensor in tensors)
    output = attention(*leaves, mask)
    return output, *torch.autograd.grad(output, leaves, gradient)


@pytest.mark.parametrize("mask", [None, documents(), documents(batch=1)], ids=["causal", "documents", "one mask"])
@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
def test_output_and_gradients(mask, rows_at_once, monkeypatch):
    monkeypatch.setattr(tiled_attention, "TILE_SCORES", rows_at_once * 2 * TILE_QUERIES * LENGTH)
    tensors = inputs(torch.float32)
    expected = with_gradients(written_out, [tensor.double() for tensor in tensors], mask)
    for actual, reference in zip(with_gradients(causal_attention, tensors, mask), expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=1e-5, atol=1e-5)


def test_in_bf16_it_is_as_exact_as_attention_whose_scores_are_bf16():
    tensors = inputs(torch.bfloat16)
    expected = with_gradients(written_out, [tensor.double() for tensor in tensors], None)
    plain = with_gradients(written_out, tensors, None)
    tiled = with_gradients(causal_attention, tensors, None)
    for actual, other, reference in zip(tiled, plain, expected, strict=True):
        error, usual = ((each.double() - reference).norm() / reference.norm() for each in (actual, other))
        assert 0 < error < 1.1 * usual < 0.01


def changed(*arguments):
    raise TypeError("_softmax_backward_data() takes 3 positional arguments but 4 were given")


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
@pytest.mark.parametrize("operation", [None, changed], ids=["missing", "changed"])
def test_without_torchs_kernel_the_gradients_are_the_same_but_for_rounding(operation, dtype, most, monkeypatch):
    with_kernel = with_gradients(causal_attention, inputs(dtype), None)
    monkeypatch.delattr(torch, "_softmax_backward_data")
    if operation:
        monkeypatch.setattr(torch, "_softmax_backward_data", operation, raising=False)
    without = with_gradients(causal_attention, inputs(dtype), None)
    for actual, expected in zip(without, with_kernel, strict=True):
        assert (actual.double() - expected.double()).norm() < most * expected.double().norm()


def test_a_query_that_sees_nothing_makes_no_nan():
    mask = documents()
    mask[1, 0, :5] = False  # padding on the left
    assert all(tensor.isfinite().all() for tensor in with_gradients(causal_attention, inputs(torch.bfloat16), mask))


def test_the_operators_keep_torchs_rules():
    """Of fake tensors, strides, and autograd, which torch.compile relies on."""
    *leaves, _ = (tensor.detach().requires_grad_() for tensor in inputs(torch.float32))
    torch.library.opcheck(causal_attention, (*leaves, None))
    torch.library.opcheck(causal_attention, (*leaves, documents()))


@pytest.mark.parametrize("changes", [{}, {"attn_pdrop": 0.5}], ids=["", "dropout"])
def test_a_model_trains_as_with_torchs_own(changes):
    ids, gradients = random_ids(2, 150, seed=1), []
    for name in ("sdpa", TILED):
        model = tiny_model(n_positions=150, **changes)
        randomise(model)
        model.set_attn_implementation(name)
        torch.manual_seed(5)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_model_generates_as_with_torchs_own():
    model, texts = tiny_model(n_positions=150), []
    randomise(model)
    for name in ("sdpa", TILED):
        model.set_attn_implementation(name)
        texts.append(model.generate(random_ids(2, 140, seed=1), max_new_tokens=8, do_sample=False, pad_token_id=0))
    torch.testing.assert_close(*texts, rtol=0, atol=0)


def test_where_it_is_used():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert attention_on(cpu, "bf16", "sdpa") == TILED
    assert attention_on(cpu, "no", "sdpa") == attention_on(gpu, "bf16", "sdpa") == "sdpa"
    assert attention_on(cpu, "bf16", "eager") == "eager"
