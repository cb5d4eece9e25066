"""Parameter groups, Muon against the singular value decomposition, and Muon on several processes against one."""

import json

import pytest
import torch
from conftest import REPOSITORY, succeed
from safetensors.torch import load_file
from support.processes import run_ranks
from support.tiny_models import randomise, tiny_model

from pretraining.optimization.optimizer import ADAM_BETAS, Muon, build_optimizer, has_fused_adamw, parameter_groups
from pretraining.optimization.options import OptimOptions
from pretraining.optimization.orthogonalization import orthogonalize, orthogonalize_together, share_out

CPU = torch.device("cpu")


def set_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_only_matrices_decay_and_every_parameter_is_trained_once(optim):
    model = tiny_model()
    optimizer = build_optimizer(model, optim, 1e-3, 0.1, CPU)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0), name


@pytest.mark.parametrize(("optim", "sizes"), [("adamw", [21, 32]), ("muon", [18, 3, 32])])
def test_without_factors_there_are_the_groups_of_earlier_checkpoints(optim, sizes):
    for decay in (0.1, 0.0):
        optimizer = build_optimizer(tiny_model(tie_word_embeddings=False), optim, 1e-3, decay, CPU)
        assert [len(group["params"]) for group in optimizer.param_groups] == sizes


def test_muon_gets_the_blocks_matrices_and_nothing_else():
    model = tiny_model(tie_word_embeddings=False)
    hidden, embeddings, head, vectors = parameter_groups(model)
    assert len(hidden) == 6 * model.config.n_layer
    assert len(embeddings) == 2 and len(head) == 1  # of tokens and positions; untied
    assert all(parameter.ndim == 1 for parameter in vectors)
    with pytest.raises(ValueError, match="takes matrices alone"):
        Muon([{"params": vectors, "kind": "muon", "weight_decay": 0.0}], lr=1e-3)


def nearly_orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The iteration written out for singular values, which are all that it changes, in double precision."""
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / torch.linalg.matrix_norm(matrices.double())[..., None]
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag_embed(values) @ right


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape, dtype, tolerance):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found, expected = orthogonalize(matrices.to(dtype)).double(), nearly_orthogonal(matrices)
    assert (found - expected).norm() < tolerance * expected.norm()
    values = torch.linalg.svdvals(found)
    large = torch.linalg.svdvals(matrices) > 3e-3 * torch.linalg.matrix_norm(matrices)[:, None]
    assert values[large].min() > 0.66 and values.max() < 1.22


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalize(torch.zeros(1, 8, 4)), torch.zeros(1, 8, 4))


def test_two_steps_of_muon_are_its_formula():
    """Of Nesterov's momentum, the size of Liu et al. 2025 and decoupled decay, written out in double precision."""
    model, learning_rate, decay, momentum = tiny_model(n_embd=32), 1e-2, 0.1, 0.95
    randomise(model)
    optimizer = build_optimizer(model, "muon", learning_rate, decay, CPU)
    weight = model.model.layers[0].mlp.up_proj.weight
    expected, buffer = weight.detach().double().clone(), torch.zeros(weight.shape, dtype=torch.double)
    for seed in (1, 2):
        set_gradients(model, seed)
        gradient = weight.grad.double()
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = 0.2 * max(weight.shape) ** 0.5 * nearly_orthogonal(momentum * buffer + (1 - momentum) * gradient)
        expected = (1 - learning_rate * decay) * expected - learning_rate * update
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_two_steps_of_normuon_are_its_formula(shape):
    """Each row by the root of its mean square over the steps, and all by their root mean square (algorithm 1)."""
    model, learning_rate, beta2 = tiny_model(n_embd=32), 1e-2, 0.9
    randomise(model)
    options = OptimOptions(normuon_beta2=beta2)
    optimizer = build_optimizer(model, "muon", learning_rate, 0.1, CPU, options=options)
    mlp = model.model.layers[0].mlp
    weight = (mlp.down_proj if shape == "wide" else mlp.up_proj).weight
    expected, buffer = weight.detach().double().clone(), torch.zeros(weight.shape, dtype=torch.double)
    second_moment = torch.zeros(len(weight), 1, dtype=torch.double)
    for seed in (1, 2):
        set_gradients(model, seed)
        gradient = weight.grad.double()
        buffer = 0.95 * buffer + 0.05 * gradient
        update = nearly_orthogonal(0.95 * buffer + 0.05 * gradient)
        second_moment = beta2 * second_moment + (1 - beta2) * update.square().mean(dim=1, keepdim=True)
        update = update / second_moment.sqrt()
        update = 0.2 * update * weight.numel() ** 0.5 / update.norm()
        expected = (1 - learning_rate * 0.1) * expected - learning_rate * update
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_a_spectral_update_is_as_large_as_outputs_and_inputs_say():
    """Of matrices of 32 and 128: sqrt(outputs / inputs), in units of a square one's size."""
    updates = {}
    for scale in ("rms", "spectral"):
        model = tiny_model(n_embd=32)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, "muon", 1e-2, 0.0, CPU, options=OptimOptions(muon_scale=scale))
        set_gradients(model, 1)
        optimizer.step()
        updates[scale] = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    unit = 1e-2 * 0.2 * 32**0.5
    for name, ratio in (("self_attn.q_proj", 1), ("mlp.up_proj", 4), ("mlp.down_proj", 1 / 4)):
        update = updates["spectral"][f"model.layers.0.{name}.weight"]
        largest = torch.linalg.matrix_norm(update, ord=2)
        assert 0.7 * ratio**0.5 < largest / unit < 1.21 * ratio**0.5, name
        factor = 1 / 4 if "down" in name else 1
        torch.testing.assert_close(
            update, factor * updates["rms"][f"model.layers.0.{name}.weight"], rtol=1e-4, atol=1e-7
        )


def test_a_cautious_decay_is_where_weight_and_update_have_one_sign():
    weights = {}
    for cautious, decay in ((False, 0.0), (True, 30.0)):
        model = tiny_model()
        randomise(model)
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        options = OptimOptions(cautious_weight_decay=cautious)
        optimizer = build_optimizer(model, "muon", 1e-2, decay, CPU, options=options)
        set_gradients(model, 2)  # which are not the random numbers of the weights
        optimizer.step()
        weights[cautious] = model.model.layers[0].mlp.up_proj.weight.detach()
    update = before - weights[False]
    expected = torch.where(update * before > 0, 0.7 * before, before) - update
    torch.testing.assert_close(weights[True], expected)
    assert 0.3 < (update * before > 0).float().mean() < 0.7


def test_a_run_of_zeros_stays_where_it_is():
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = OptimOptions(normuon_beta2=0.95, cautious_weight_decay=True)
    optimizer = build_optimizer(model, "muon", 1e-2, 0.0, CPU, options=options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_what_is_not_muons_is_torchs_adamw_to_the_bit():
    model, other = tiny_model(), tiny_model()
    muon = build_optimizer(model, "muon", 1e-2, 0.1, CPU)
    _, matrices, _, vectors = parameter_groups(other)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=ADAM_BETAS, eps=1e-8, fused=True)
    for seed in range(3):
        for each, optimizer in ((model, muon), (other, adamw)):
            set_gradients(each, seed)
            optimizer.step()
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    found = dict(model.named_parameters())
    for parameter in matrices + vectors:
        assert torch.equal(found[names[id(parameter)]], parameter)


def test_a_device_without_the_fused_kernel_is_updated_alike_without_it():
    assert has_fused_adamw(CPU) and not has_fused_adamw(torch.device("meta"))
    fused, plain = tiny_model(), tiny_model()
    for model, device in ((fused, CPU), (plain, torch.device("meta"))):
        optimizer = build_optimizer(model, "muon", 1e-2, 0.1, device)
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.step()
    for parameter, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


def test_work_is_shared_out_evenly():
    costs = [3.0] * 6 + [1.0] * 12  # as of GPT-2 124M: MLPs and attention
    for num_processes in (1, 2, 3, 4):
        owners = share_out(costs, num_processes)
        loads = [
            sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == n) for n in range(num_processes)
        ]
        assert max(loads) <= 1.1 * sum(costs) / num_processes, loads


# Steps of Muon on each process, all with the same gradients. A matrix of 30 rows does not divide by four processes.
SHARED = """
import json, os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from support.tiny_models import tiny_model
from pretraining.optimization import orthogonalization
from pretraining.optimization.optimizer import build_optimizer
from pretraining.optimization.options import OptimOptions

_, _, kind, dtype, normuon_beta2, folder = sys.argv
num_processes = int(os.environ.get("WORLD_SIZE", 1))
if num_processes > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if num_processes > 1 else 0
model = tiny_model(n_embd=30, n_head=2, n_layer=4)
if kind == "shards":
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
optimizer = build_optimizer(model, "muon", 1e-2, 0.1, torch.device("cpu"), getattr(torch, dtype),
    options=OptimOptions(normuon_beta2=float(normuon_beta2)))
work, compute = [], orthogonalization.orthogonalize
def counted(matrices):
    work.append(matrices.numel() * min(matrices.shape[1:]))
    return compute(matrices)
orthogonalization.orthogonalize = counted
for seed in range(4):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()
whole = lambda parameter: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
weights = {name: whole(parameter).detach().contiguous() for name, parameter in model.named_parameters()}
save_file(weights, f"{folder}/{rank}.safetensors")
open(f"{folder}/{rank}.json", "w").write(json.dumps(sum(work)))
if num_processes > 1:
    del model, optimizer, weights
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    program = tmp_path_factory.mktemp("program") / "shared.py"
    program.write_text(SHARED)

    def call(num_processes: int, kind: str, dtype: str, normuon_beta2: float = 0.0) -> tuple[list[dict], list[int]]:
        """The weights that each process ends with, and how many multiplications it did."""
        folder = tmp_path_factory.mktemp("steps")
        for result in run_ranks(num_processes, program, REPOSITORY, kind, dtype, normuon_beta2, folder):
            succeed(result)
        ranks = range(num_processes)
        work = [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]
        return [load_file(folder / f"{rank}.safetensors") for rank in ranks], work

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_gives_the_same_bits_on_any_number_of_processes_and_each_does_its_share(dtype, shared):
    (expected,), (all_of_it,) = shared(1, "copies", dtype)
    for num_processes, kind in ((2, "copies"), (4, "copies"), (2, "shards"), (4, "shards")):
        found, work = shared(num_processes, kind, dtype)
        for weights in found:
            assert weights.keys() == expected.keys()
            for name in expected:
                if ".layers." in name and expected[name].ndim == 2:
                    assert torch.equal(weights[name], expected[name]), (num_processes, kind, name)
                else:  # torch's fused AdamW rounds the last elements of a shard in another way
                    torch.testing.assert_close(weights[name], expected[name], rtol=1e-6, atol=1e-7)
        assert sum(work) == all_of_it
        assert max(work) <= (1 if num_processes == 2 else 1.6) * all_of_it / num_processes, (num_processes, kind, work)


def test_normuon_is_the_same_on_shards(shared):
    """But for rounding, as the squares of a matrix are added up in another order."""
    (expected,), _ = shared(1, "copies", "float32", 0.9)
    for weights in shared(4, "shards", "float32", 0.9)[0]:
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-7)


def test_matrices_come_back_in_their_order():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in [(8, 4), (4, 4), (8, 4), (4, 8)] * 6]
    for matrix, result in zip(matrices, orthogonalize_together(matrices), strict=True):
        torch.testing.assert_close(result, orthogonalize(matrix[None])[0], rtol=1e-4, atol=1e-5)
