"""oneDNN's products in training: the same gradients, taken where they are faster, left where torch has none."""

import pytest
import torch
from support.tiny_models import random_ids, randomise, tiny_model

from pretraining.kernels import cpu_products
from pretraining.kernels.cpu_products import onednn_speed, use_fastest_products


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = random_ids(3, 16)
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_they_give_the_same_gradients(checkpointed, monkeypatch):
    model = tiny_model().train()
    randomise(model)
    expected = gradients(model)
    calls = []
    plain = cpu_products._onednn_linear
    monkeypatch.setattr(cpu_products, "_onednn_linear", lambda *arguments: calls.append(1) or plain(*arguments))
    monkeypatch.setattr(cpu_products, "onednn_speed", lambda: 2.0)
    assert use_fastest_products(model, 768) == "linear layers use oneDNN's products, 2.0 times as fast here as MKL's"
    if checkpointed:
        model.gradient_checkpointing_enable()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert len(calls) >= 2 * 6 * model.config.n_layer  # forward, and for the gradient of the input


@pytest.mark.parametrize(("times", "is_used"), [([1.0, 2.2], False), ([2.2, 1.0], True), ([1.3, 1.0], False)])
def test_they_are_taken_only_where_they_are_far_faster(times, is_used, monkeypatch):
    monkeypatch.setattr(cpu_products, "_fastest_times", lambda works: times)
    assert (use_fastest_products(tiny_model(), 768) is not None) == is_used


def missing(*arguments):
    raise AttributeError("no such operation")


def changed(*arguments):
    raise RuntimeError("expected at most 5 arguments but received 6")


@pytest.mark.parametrize("operation", [missing, changed])
def test_without_the_operation_everything_stays_as_it_is(operation, monkeypatch):
    monkeypatch.setattr(cpu_products, "_onednn_linear", operation)
    model = tiny_model()
    assert use_fastest_products(model, 768) is None
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_measurement_is_real():
    assert 0.2 < onednn_speed() < 20


def test_a_narrow_model_is_not_even_measured(monkeypatch):
    monkeypatch.setattr(cpu_products, "onednn_speed", missing)
    assert use_fastest_products(tiny_model(), 64) is None
