"""The training loss without the logits: the plain form's loss and gradients, in a fraction of its memory."""

import pytest
import torch
from support.tiny_models import random_ids, randomise, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_gpt2scratch import linear_cross_entropy as module
from modeling_gpt2scratch.linear_cross_entropy import linear_cross_entropy


def inputs(tokens=300, width=32, vocab_size=101, ignored=40):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[:ignored]] = -100
    return hidden_states, weight, labels


def plain(hidden_states, weight, labels, **kwargs):
    return nn.functional.cross_entropy(nn.functional.linear(hidden_states, weight).float(), labels, **kwargs)


def assert_equal_to(expected, actual, tolerance):
    """Relative to the largest entry."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# 101 is no multiple of 64, 128 is; 300 tokens are one tile, or five of 64; a block of 1 logit is one row at a time
@pytest.mark.parametrize("vocab_size", [101, 128])
@pytest.mark.parametrize(("tile", "cpu_block"), [(8192, 1 << 20), (64 * 4, 1 << 20), (8192, 1)])
def test_loss_and_gradients_are_those_of_the_plain_form(monkeypatch, vocab_size, tile, cpu_block):
    monkeypatch.setattr(module, "CPU_TILE", tile)
    monkeypatch.setattr(module, "CPU_BLOCK", cpu_block)
    hidden_states, weight, labels = inputs(vocab_size=vocab_size)
    expected = plain(hidden_states, weight, labels)
    expected_gradients = torch.autograd.grad(2 * expected, (hidden_states, weight))
    actual = linear_cross_entropy(hidden_states, weight, labels)
    gradients = torch.autograd.grad(2 * actual, (hidden_states, weight))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_equal_to(expected_gradient, gradient, 1e-6)


def test_bf16_autocast_has_the_errors_of_bf16_and_no_others():
    """Both forms against fp32: the one without logits is not further from it than the plain one."""
    hidden_states, weight, labels = inputs(tokens=2000)
    exact = torch.autograd.grad(plain(hidden_states, weight, labels), (hidden_states, weight))
    errors = []
    for form in (plain, linear_cross_entropy):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = form(hidden_states, weight, labels)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, (hidden_states, weight))
        errors.append([(a - b).norm() / b.norm() for a, b in zip(gradients, exact, strict=True)])
    for theirs, ours in zip(*errors, strict=True):
        assert 0 < ours < 1.1 * theirs < 0.02


def test_only_the_gradients_that_are_needed_are_computed():
    hidden_states, weight, labels = inputs()
    frozen = weight.detach()
    linear_cross_entropy(hidden_states, frozen, labels).backward()
    expected = torch.autograd.grad(plain(hidden_states, frozen, labels), hidden_states)[0]
    assert_equal_to(expected, hidden_states.grad, 1e-6)
    with torch.no_grad(), CountProducts() as products:
        loss = linear_cross_entropy(hidden_states, weight, labels)
    torch.testing.assert_close(loss, plain(hidden_states, weight, labels).detach(), rtol=1e-6, atol=0)
    assert not loss.requires_grad
    assert products.number == 1


def test_a_second_backward_pass_adds_the_same_and_a_second_derivative_is_refused():
    hidden_states, weight, labels = inputs()
    loss = linear_cross_entropy(hidden_states, weight, labels)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("num_items_in_batch", [None, 0, torch.tensor(0), 10])
def test_a_batch_without_labels_that_count_leaves_the_weights_alone(num_items_in_batch):
    hidden_states, weight, labels = inputs()
    loss = linear_cross_entropy(hidden_states, weight, torch.full_like(labels, -100), num_items_in_batch)
    loss.backward()
    assert loss == 0 if num_items_in_batch == 10 else loss.isnan()  # 0 / 0, as cross_entropy has it
    assert hidden_states.grad.abs().max() == 0 and weight.grad.abs().max() == 0


@pytest.mark.parametrize("shape", [(3, 8), (2, 9), (2, 7), (16,)])
def test_labels_of_another_shape_are_refused_by_both_shapes(shape):
    with pytest.raises(ValueError, match=rf"\({shape[0]},.* do not fit .*\(2, 8, 48\)"):
        tiny_model().train()(random_ids(2, 8), labels=random_ids(*shape))


class CountProducts(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function._schema.name in ("aten::mm", "aten::addmm")
        return function(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return output


def test_a_training_step_never_holds_the_logits(monkeypatch):
    monkeypatch.setattr(module, "CPU_TILE", 16 * 4)
    model = tiny_model(vocab_size=5000, n_layer=1).train()
    ids = random_ids(4, 24, vocab_size=5000)
    logits = 4 * 24 * 5000
    with LargestTensor() as plain_step:
        model(ids, labels=ids, skip_logits=False).loss.backward()
    with LargestTensor() as step:
        model(ids, labels=ids).loss.backward()
    assert plain_step.entries >= logits
    assert step.entries <= 5000 * 64  # the weight, padded, or a tile of 16 tokens


def step(model, **kwargs):
    """Loss and gradients of a training step, in which some labels do not count."""
    ids = random_ids(3, 24)
    labels = ids.clone()
    labels[0, :7] = labels[2, 20:] = -100
    model.zero_grad()
    output = model(input_ids=ids, labels=labels, **kwargs)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return output, {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}


@pytest.mark.parametrize("num_items_in_batch", [None, 77, torch.tensor(77)])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_the_model_trains_the_same_with_and_without_logits(num_items_in_batch, changes):
    model = tiny_model(**changes).train()
    randomise(model)
    kwargs = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    expected, expected_gradients = step(model, skip_logits=False, **kwargs)
    output, gradients = step(model, **kwargs)
    assert output.logits is None and expected.logits.shape == (3, 24, 101)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        if "k_proj.bias" not in name:  # zero but for rounding: softmax does not see it
            # Either form is 1.3e-6 from float64: rounding on the way back through the layers, not of the loss.
            expected_gradient = expected_gradients[name]
            assert (gradient - expected_gradient).norm() < 2e-6 * expected_gradient.norm(), name


def test_labels_that_were_shifted_before_and_an_ignore_index():
    model = tiny_model().train()
    ids = random_ids(3, 24)
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), 7)], dim=1)
    for kwargs in ({"shift_labels": shifted}, {"ignore_index": 7}, {"shift_labels": shifted, "ignore_index": 7}):
        expected = model(ids, labels=ids, skip_logits=False, **kwargs).loss
        torch.testing.assert_close(model(ids, labels=ids, **kwargs).loss, expected, rtol=1e-6, atol=0)


def test_logits_are_there_for_whoever_asks():
    model = tiny_model()
    ids = random_ids(2, 10)
    assert model(ids, labels=ids).logits.shape == (2, 10, 101)  # in evaluation
    assert model(ids, labels=ids, skip_logits=True).logits is None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (2, 10, 101)
    assert model(ids).logits.shape == (2, 10, 101)
    with torch.no_grad():
        assert model(ids, labels=ids).logits.shape == (2, 10, 101)
    assert len(model(ids, labels=ids, skip_logits=False, use_cache=False, return_dict=False)) == 2


def replaced(model):
    class Head(nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    head = Head(model.config.n_embd, model.config.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def biased(model):
    model.set_output_embeddings(nn.Linear(48, 101))


def patched(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden_states: 2 * forward(hidden_states)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, arguments, output: 2 * output)


def with_a_loss_of_its_own(model):
    model.loss_function = lambda logits, labels, **kwargs: (2 * logits).logsumexp(-1).mean()


@pytest.mark.parametrize("change", [replaced, biased, patched, hooked, with_a_loss_of_its_own])
def test_a_head_or_loss_that_was_changed_is_called(change):
    """What LoRA, quantisation, offloading and others do to a model."""
    model = tiny_model().train()
    ids = random_ids(2, 10)
    before = model(ids, labels=ids).loss
    change(model)
    output = model(ids, labels=ids)
    assert output.logits is not None
    assert not torch.isclose(output.loss, before)
    torch.testing.assert_close(output.loss, model(ids, labels=ids, skip_logits=False).loss)


def test_a_backward_hook_of_the_head_is_called():
    model = tiny_model().train()
    calls = []
    model.lm_head.register_full_backward_hook(lambda *arguments: calls.append(arguments))
    model(random_ids(2, 10), labels=random_ids(2, 10)).loss.backward()
    assert len(calls) == 1


def test_gradients_of_each_row_by_vmap():
    model = tiny_model().train()
    model.set_attn_implementation("eager")
    parameters = dict(model.named_parameters())
    ids = random_ids(3, 10)

    def loss_of(parameters, row):
        arguments = {"input_ids": row.unsqueeze(0), "labels": row.unsqueeze(0), "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=arguments).loss

    gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(parameters, ids)
    for row in range(3):
        model.zero_grad()
        model(ids[row : row + 1], labels=ids[row : row + 1]).loss.backward()
        name = "model.layers.1.mlp.up_proj.weight"
        torch.testing.assert_close(gradients[name][row], parameters[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_under_gradient_checkpointing_and_compile(autocast):
    """Compiled in bf16 alone: tests/distributed/test_scale.py compiles a whole run in fp32."""
    model = tiny_model(n_layer=1).train()
    steps = {}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, expected_gradients = step(model, skip_logits=False)
        model.gradient_checkpointing_enable()
        steps["checkpointed"] = step(model)
        model.gradient_checkpointing_disable()
        if autocast:
            steps["compiled"] = step(torch.compile(model, fullgraph=True), use_cache=False)
    rtol, tolerance = (1e-4, 0.03) if autocast else (1e-6, 1e-5)
    for output, gradients in steps.values():
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected.loss, rtol=rtol, atol=0)
        for name, expected_gradient in expected_gradients.items():
            if "k_proj.bias" not in name:
                assert_equal_to(expected_gradient, gradients[name], tolerance)
