"""
Orthogonalise matrices, each process a share of them.

Muon replaces a matrix's momentum U S V^T by U V^T, nearly. The quintic Newton-Schulz iteration does this with matrix
products alone: each iteration maps every singular value s to a s + b s^3 + c s^5. (Polar Express comes closer to 1 and
learns less: docs/experiments.md.)

Shapes: B matrices in a batch, R rows, C columns, N processes.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

# Jordan et al. 2024, https://kellerjordan.github.io/posts/muon: chosen for their slope at zero, so that small singular
# values grow fast, while large ones need not come closer to 1 than to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7  # keeps a matrix of zeros from becoming NaN; torch.optim.Muon's value
# The same for any number of processes, so that each matrix is computed in the same batch, and with the same rounding,
# on one process and on many. Smaller batches can be shared out more evenly, larger ones start fewer kernels.
MATRICES_IN_BATCH = 4


def orthogonalize(matrices: Tensor) -> Tensor:
    """
    Replace all singular values by approximately 1.

    Args:
        matrices (`(B, R, C)`): computed in their own dtype.

    Returns:
        `(B, R, C)`: singular values are between 0.68 and 1.21 where they were above 0.003 of the Frobenius norm.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    # The largest singular value is at most the Frobenius norm.
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x.mT @ x if is_tall else x @ x.mT  # (B, min(R, C), min(R, C))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if is_tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def batches_of_one_shape(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of `matrices` in batches of at most `MATRICES_IN_BATCH` that have the same shape."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(index)
    return [
        indices[start : start + MATRICES_IN_BATCH]
        for indices in by_shape.values()
        for start in range(0, len(indices), MATRICES_IN_BATCH)
    ]


def share_out(costs: Sequence[float], num_processes: int) -> list[int]:
    """Return a process for each cost: the costliest first, each to the process that has the least so far."""
    loads = [(0.0, process) for process in range(num_processes)]
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, owners[index] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[index], owners[index]))
    return owners


def orthogonalize_together(matrices: Sequence[Tensor]) -> list[Tensor]:
    """
    Orthogonalise matrices on all processes together: each batch is computed by one process, which sends the result to
    the others. All processes have to call this, with the same shapes.

    Args:
        matrices (each `(R, C)`): the same on every process, or DTensors that are sharded by rows, as FSDP2 makes
            them. Of sharded matrices, only the process that computes a batch ever holds it whole. Their dtype is that
            of the computation and of what is sent.

    Returns:
        A result for each matrix. Of a DTensor, the rows that this process holds, as a plain tensor.
    """
    group = _sharding_group(matrices[0])
    kind = _WholeBatch if group is None else _ShardedBatch
    num_processes = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    indices = batches_of_one_shape(matrices)
    costs = [len(each) * min(matrices[each[0]].shape) * matrices[each[0]].numel() for each in indices]
    owners = share_out(costs, num_processes)
    # Nothing is waited for before all of it has begun, so that a batch is computed while others travel. Every process
    # begins the same transfers in the same order.
    batches = [
        kind([matrices[index] for index in each], owner, num_processes, group)
        for each, owner in zip(indices, owners, strict=True)
    ]
    for batch in batches:
        batch.compute()
    results: dict[int, Tensor] = {}
    for each, batch in zip(indices, batches, strict=True):
        results |= zip(each, batch.result(), strict=True)
    return [results[index] for index in range(len(matrices))]


def _sharding_group(matrix: Tensor) -> dist.ProcessGroup | None:
    """Return the processes that hold the rows of a sharded matrix, None for a matrix that is whole."""
    if not isinstance(matrix, DTensor):
        return None
    if matrix.device_mesh.ndim != 1 or not matrix.placements[0].is_shard(0):
        raise ValueError(f"matrices have to be sharded by rows over one group of processes, got {matrix.placements}")
    return matrix.device_mesh.get_group()


class _WholeBatch:
    """Matrices that every process holds: their owner computes the result and sends it to all others."""

    def __init__(
        self,
        matrices: list[Tensor],
        owner: int,
        num_processes: int,
        group: dist.ProcessGroup | None,
    ):
        self.owner = owner
        self.is_alone = num_processes == 1
        self.is_mine = self.is_alone or dist.get_rank() == owner
        if self.is_mine:
            self.matrices = torch.stack(matrices)
        else:  # room for the result
            self.matrices = matrices[0].new_empty((len(matrices), *matrices[0].shape))

    def compute(self) -> None:
        if self.is_mine:
            self.matrices = orthogonalize(self.matrices)
        if not self.is_alone:
            self.work = dist.broadcast(self.matrices, group_src=self.owner, async_op=True)

    def result(self) -> Tensor:
        if not self.is_alone:
            self.work.wait()
        return self.matrices


class _ShardedBatch:
    """Matrices of which every process holds some rows: their owner collects them, computes, and sends rows back."""

    def __init__(
        self,
        matrices: list[Tensor],
        owner: int,
        num_processes: int,
        group: dist.ProcessGroup | None,
    ):
        self.owner = owner
        self.group = group
        self.num_rows = matrices[0].shape[0]
        self.rows_each = -(-self.num_rows // num_processes)  # the last processes may have fewer, or none
        rows = torch.stack([matrix.to_local() for matrix in matrices])  # type: ignore[attr-defined]
        self.num_own_rows = rows.shape[1]
        self.part = pad(rows, (0, 0, 0, self.rows_each - self.num_own_rows))  # (B, ceil(R / N), C)
        is_mine = dist.get_rank(group) == owner
        self.parts = [torch.empty_like(self.part) for _ in range(num_processes)] if is_mine else None
        self.collected = dist.gather(self.part, self.parts, group=group, group_dst=owner, async_op=True)

    def compute(self) -> None:
        results = None
        if self.parts is not None:
            self.collected.wait()
            result = orthogonalize(torch.cat(self.parts, dim=1)[:, : self.num_rows])
            result = pad(result, (0, 0, 0, self.rows_each * len(self.parts) - self.num_rows))
            results = [part.contiguous() for part in result.split(self.rows_each, dim=1)]
        self.received = torch.empty_like(self.part)
        self.sent = dist.scatter(self.received, results, group=self.group, group_src=self.owner, async_op=True)

    def result(self) -> Tensor:
        self.collected.wait()  # also on those that only sent
        self.sent.wait()
        return self.received[:, : self.num_own_rows]
