"""Matrix products of a CPU by the faster library, where nothing else changes."""

import pytest
import torch
from support.tiny_models import random_ids, tiny_model
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_gpt2scratch import one_dnn
from modeling_gpt2scratch.one_dnn import OneDnnLinear, onednn_linear
from pretraining.hardware import device_description, peak_flops, reads_pinned_memory


@pytest.mark.parametrize(("accelerator", "is_pinned"), [(None, False), ("cuda", True), ("xpu", True), ("mps", False)])
def test_memory_is_pinned_for_the_accelerator_that_torch_reports(accelerator, is_pinned, monkeypatch):
    found = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert reads_pinned_memory() == is_pinned


def test_an_apple_gpu_has_a_name():
    assert device_description(torch.device("mps"), 1) == "1 x Apple GPU"


class Recorder(TorchDispatchMode):
    """The names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("Tesla T4", 65e12),
    ],
)
def test_the_peak_is_that_of_the_very_device(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops


def product(with_bias: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """What comes out within the mode, by which operations, and in float64 without it."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 5, 24), torch.nn.Parameter(torch.randn(7, 24)), torch.randn(7)
    arguments = (hidden, weight, bias if with_bias else None)
    expected = linear(*(tensor if tensor is None else tensor.double() for tensor in arguments))
    arguments = tuple(tensor if tensor is None else tensor.to(dtype) for tensor in arguments)
    mode = OneDnnLinear()
    with Recorder() as recorder, mode:
        found = linear(*arguments[: 2 + with_bias])
    return found, recorder.names, expected.detach()


@pytest.mark.parametrize("with_bias", [True, False])
def test_within_the_mode_onednn_gives_the_same_product(with_bias):
    with torch.no_grad():
        found, names, expected = product(with_bias)
    assert names == ["mkldnn::_linear_pointwise"]
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.fixture
def forgotten():
    onednn_linear.cache_clear()
    yield
    onednn_linear.cache_clear()


def test_a_torch_without_the_operation_or_with_another_one_takes_its_own_products(forgotten, monkeypatch):
    """The operation is a private one, and the published code has to outlive it."""
    works = torch.ops.mkldnn._linear_pointwise
    for broken in (
        None,  # not there
        lambda hidden, weight: works(hidden, weight, None, "none", [], ""),  # of another signature
        lambda *arguments: works(*arguments) + 1,  # of another meaning
    ):
        onednn_linear.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", broken)
        with torch.no_grad():
            found, names, expected = product(True)
        assert "mkldnn::_linear_pointwise" not in names and names
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_torch_that_does_not_tell_of_transforms_trains_the_same(monkeypatch):
    model, ids = tiny_model().train(), random_ids(2, 8)
    expected = model(ids, labels=ids)
    assert expected.logits is None  # the loss by tiles
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    found = model(ids, labels=ids)
    assert found.logits is not None
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("case", ["gradients", "autocast", "float64"])
def test_what_it_is_not_for_is_as_it_was(case):
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        found, names, expected = product(True, torch.float64 if case == "float64" else torch.float32)
    assert "mkldnn::_linear_pointwise" not in names and names
    assert torch.allclose(found.double(), expected, atol=0.1 if case == "autocast" else 1e-5)
    assert found.requires_grad == (case == "gradients")
    assert found.dtype == {"autocast": torch.bfloat16, "float64": torch.float64}.get(case, torch.float32)


def test_the_measurement_is_real():
    assert 0.2 < one_dnn.onednn_speed() < 20


def test_a_model_generates_with_onednns_products_where_they_are_faster_and_leaves_the_rest_to_torch(monkeypatch):
    model = tiny_model()
    prompt = random_ids(1, 4)
    monkeypatch.setattr(one_dnn, "onednn_speed", lambda: 1.0)
    with Recorder() as recorder:
        model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert "mkldnn::_linear_pointwise" not in recorder.names
    monkeypatch.setattr(one_dnn, "onednn_speed", lambda: 1.3)
    with Recorder() as recorder:
        model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert recorder.names.count("mkldnn::_linear_pointwise") == 2 * (6 * model.config.n_layer + 1)  # with the head
    with Recorder() as recorder, torch.no_grad():
        model(prompt)
    assert "mkldnn::_linear_pointwise" not in recorder.names
