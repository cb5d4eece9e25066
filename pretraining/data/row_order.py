"""The rows of each optimizer step: how a step is divided among processes, and which rows come in which order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Sampler

from pretraining.errors import UserError

ROWS_PER_ROUND = 1024  # weights hold to one part in so many


@dataclass(frozen=True)
class StepSplit:
    """How a global batch is divided."""

    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    process_index: int
    num_workers: int

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes

    def with_batch_size(self, batch_size: int) -> "StepSplit":
        """The same global batch in micro-batches of `batch_size`, which divides that of now."""
        accumulation = self.gradient_accumulation_steps * self.batch_size // batch_size
        return replace(self, batch_size=batch_size, gradient_accumulation_steps=accumulation)


def accumulation_steps(
    tokens_per_step: int, per_device_train_batch_size: int, block_size: int, num_processes: int
) -> int:
    """
    Return the micro-batches of one process in an optimizer step.

    Raises:
        UserError: if `--tokens_per_step` is not a multiple of what all processes have at once.
    """
    unit = per_device_train_batch_size * block_size * num_processes  # of all processes at once
    steps, rest = divmod(tokens_per_step, unit)
    if rest or not steps:
        possible = " or ".join(str(unit * count) for count in (steps, steps + 1) if count)
        rows, odd = divmod(tokens_per_step, block_size)
        fitting = [str(count) for count in range(1, 2 * num_processes + 1) if not odd and rows % count == 0]
        raise UserError(
            f"--tokens_per_step {tokens_per_step} is not a multiple of {unit} (block {block_size} x batch "
            f"{per_device_train_batch_size} x {num_processes} processes); nearest: {possible}"
            + (f"; its {rows} rows can be split over {', '.join(fitting)} processes" if fitting else "")
        )
    return steps


class RowOrder(Sampler):
    """
    Which rows each process trains on, as a pure function of (seed, step): any step can be reached without replaying
    the ones before it, and the global batch of a step does not depend on how it is split.

    Every epoch of a source is its own permutation of its rows, or of those of one of its parts after the other; step s
    takes places [s * G, (s + 1) * G) of the permutations put end to end, where G = gradient_accumulation_steps *
    num_processes * batch_size. Of several sources, a `SourceOrder` says whose turn it is. Yields, for the steps from
    `first_step` on, this process's `gradient_accumulation_steps` lists of `batch_size` row numbers each, counted
    through all sources.

    Args:
        num_rows: of each source, or of each part of a source whose parts come in their order.
    """

    def __init__(
        self,
        num_rows: Sequence[int | Sequence[int]],
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        first_step: int = 0,
        weights: list[float] | None = None,
    ):
        parts = [[each] if isinstance(each, int) else each for each in num_rows]
        self.parts = [np.cumsum([0, *each]) for each in parts]  # of each source, the number of each part's first row
        self.num_rows = np.array([sum(each) for each in parts])
        self.starts = np.cumsum([0, *self.num_rows])
        self.batch_size = batch_size
        self.accumulation = gradient_accumulation_steps
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.first_step = first_step
        self.source_order = SourceOrder(weights or [1.0] * len(num_rows), [seed])
        self._permutations: dict[int, tuple[tuple, np.ndarray]] = {}  # by source: the epoch and part, and its order

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            for micro_step in range(self.accumulation):
                yield self.rows(step, micro_step)
            step += 1

    def rows(self, step: int, micro_step: int) -> list[int]:
        """Row numbers of one micro-batch of this process."""
        micro_batch = (step * self.accumulation + micro_step) * self.num_processes + self.process_index
        places = np.arange(micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size)
        sources, numbers = self.source_order.locate(places)
        epochs, offsets = np.divmod(numbers, self.num_rows[sources])
        rows = zip(sources.tolist(), epochs.tolist(), offsets.tolist(), strict=True)
        return [int(self.starts[source]) + self._row(source, epoch, offset) for source, epoch, offset in rows]

    def _row(self, source: int, epoch: int, offset: int) -> int:
        starts = self.parts[source]
        part = int(np.searchsorted(starts, offset, side="right")) - 1
        start, end = int(starts[part]), int(starts[part + 1])
        if self._permutations.get(source, (None,))[0] != (epoch, part):
            # A sequence of integers seeds PCG64 through a hash.
            generator = np.random.default_rng([self.seed, epoch, source, *([part] if len(starts) > 2 else [])])
            self._permutations[source] = (epoch, part), generator.permutation(end - start)
        return start + int(self._permutations[source][1][offset - start])


class SourceOrder:
    """
    From which source each row comes, as a pure function of its place: any place can be asked for, in any order.

    Every `ROWS_PER_ROUND` places in a row hold each source as often as its weight says, to within one row,
    in an order of their own.

    Args:
        weights: of the sources, of any sum.
        seed: whole numbers that the order depends on.
    """

    def __init__(self, weights: list[float], seed: list[int]):
        shares = np.array(weights) / sum(weights) * ROWS_PER_ROUND
        self.quotas = np.floor(shares).astype(int)
        largest_remainders = np.argsort(self.quotas - shares, kind="stable")
        self.quotas[largest_remainders[: ROWS_PER_ROUND - self.quotas.sum()]] += 1
        if not self.quotas.all():
            raise UserError(
                f"a weight of {min(weights):g} of {sum(weights):g} is too small: 1 in {ROWS_PER_ROUND} at least"
            )
        self.seed = seed

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each place the source, and how many rows of that source lie before it."""
        if len(self.quotas) == 1:
            return np.zeros_like(places), places
        sources, numbers = np.empty_like(places), np.empty_like(places)
        rounds, offsets = np.divmod(places, ROWS_PER_ROUND)
        for number in np.unique(rounds):
            order = np.repeat(np.arange(len(self.quotas)), self.quotas)
            np.random.default_rng([*self.seed, number]).shuffle(order)
            earlier = np.empty_like(order)  # rows of the same source before each place of the round
            for source, quota in enumerate(self.quotas):
                earlier[order == source] = np.arange(quota)
            here = rounds == number
            sources[here] = order[offsets[here]]
            numbers[here] = number * self.quotas[sources[here]] + earlier[offsets[here]]
        return sources, numbers
