"""
Rows of token ids: cut from documents, read in batches, and handed to the model.

Documents are concatenated, each followed by the end-of-text token, and cut every `block_size` tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretraining.data.row_order import RowOrder
from pretraining.distributed.signals import ignore_signals
from pretraining.errors import ProcessError, UserError
from pretraining.hardware import reads_pinned_memory

T = TypeVar("T")


def full_rows(token_ids: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return views of the full rows (rows, block_size) of token ids (tokens,), and of the tokens left behind them."""
    end = len(token_ids) // block_size * block_size
    return token_ids[:end].reshape(-1, block_size), token_ids[end:]


class PackedDataset(Dataset):
    """
    Rows of token ids, in memory or in mapped files.

    `dataset[i]` is row i, `dataset.__getitems__([i, j, ...])` the rows as one tensor (number of indices, block_size).
    Both are of the files' type, uint16 or uint32: a quarter as many bytes to move to a device as the int64 that it
    needs there.

    Args:
        parts: the rows, one part (rows, block_size) after the other. They may have a token more, which only counts
            as what follows the last one.
        statistics: counts of `documents`, `tokens` and `bytes` of text, and `compressed_bytes` by program if known.
        block_size: that of the parts if left out.
    """

    def __init__(self, parts: Sequence[Any], statistics: dict, block_size: int | None = None):
        self.parts = parts
        self.statistics = statistics
        self._starts = np.cumsum([0, *map(len, parts)])  # the number of each part's first row
        types = {(part.dtype, part.shape[1]) for part in parts}
        if len(types) > 1:
            raise UserError("the files have ids of 2 bytes and of 4: one tokenizer's are all of one size")
        self._dtype, self._row_size = types.pop()
        self.block_size = block_size or self._row_size

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        rows = np.asarray(indices)
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        within = rows - self._starts[numbers]
        found = np.empty((len(rows), self._row_size), self._dtype)
        for place, (number, row) in enumerate(zip(numbers.tolist(), within.tolist(), strict=True)):
            found[place] = self.parts[number][row]
        return torch.from_numpy(found)

    def __reduce__(self):
        raise TypeError("rows mapped into memory cannot be sent to another process: fork it, or open the files there")

    @property
    def bytes_per_token(self) -> float:
        return self.statistics["bytes"] / self.statistics["tokens"]

    @property
    def compression_rates(self) -> dict[str, float]:
        """Bits per byte that gzip and xz need for the text; empty where that was not measured."""
        sizes = self.statistics.get("compressed_bytes") or {}
        return {name: 8 * size / self.statistics["bytes"] for name, size in sizes.items()}


def concatenate(datasets: list[PackedDataset]) -> PackedDataset:
    """Return the rows of several datasets. What one of them does not know of itself is not known of all."""
    if len(datasets) == 1:
        return datasets[0]
    counts: dict[str, int | None] = {}
    for name in ("documents", "tokens", "bytes"):
        values = [each.statistics[name] for each in datasets]
        counts[name] = None if None in values else sum(values)
    parts = [part for dataset in datasets for part in dataset.parts]
    block_size = datasets[0].block_size
    if len({part.shape[1] for part in parts}) > 1:  # some with the token that follows, some without
        parts = [part[:, :block_size] for part in parts]
    return PackedDataset(parts, counts, block_size)


class RowsOrError(Dataset):
    """Rows, or the `UserError` why they cannot be read: raised in a worker process, it would become a traceback."""

    def __init__(self, dataset: PackedDataset):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> torch.Tensor | UserError:
        try:
            return self.dataset.__getitems__(indices)
        except UserError as error:
            return error


def training_batches(dataset: PackedDataset, order: RowOrder, num_workers: int = 0) -> DataLoader:
    """
    Return micro-batches (batch_size, block_size), endless, each as `RowsOrError` has it. No state of it has to be
    saved in a checkpoint.
    """
    return open_loader(RowsOrError(dataset), num_workers, _start_worker, batch_sampler=order)


def open_loader(dataset: Dataset, num_workers: int, start_worker: Callable[[int], None], **options: Any) -> DataLoader:
    """
    Return a loader of whole micro-batches.

    Args:
        start_worker: called in each worker process with its number.
        options: more of `DataLoader`'s.
    """
    return DataLoader(
        dataset,
        collate_fn=as_it_is,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # workers share the maps
        pin_memory=reads_pinned_memory(),
        worker_init_fn=start_worker,
        # Without a generator of its own, every iter() would draw a base seed from the global one and change dropout.
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def as_it_is(batch: T) -> T:
    return batch


def _start_worker(worker: int) -> None:
    ignore_signals()


@dataclass(frozen=True)
class ModelInputs:
    """
    `model_inputs(rows)` is what the model takes for rows of tokens.

    Attributes:
        device, vocab_size: the model's.
        document_token_id: see `document_positions`; None lets tokens see the documents before theirs.
    """

    device: torch.device
    vocab_size: int
    document_token_id: int | None = None

    def __call__(self, rows: torch.Tensor) -> dict[str, Any]:
        """
        Args:
            rows (`(B, T)`): token ids of any integer type.

        Raises:
            ProcessError: a ValueError, for an id that the model has no embedding for: a GPU would only say that an
                assertion failed, and could not be used any more.
        """
        if (largest := rows.numpy().max()) >= self.vocab_size:
            raise ProcessError(
                f"the data has the token id {largest}, but the model's vocabulary ends with {self.vocab_size - 1}: "
                "prepare the data with the model's tokenizer"
            )
        input_ids = rows.to(self.device, non_blocking=True).long()
        document_token_id = self.document_token_id
        position_ids = None if document_token_id is None else document_positions(input_ids, document_token_id)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids}


def document_positions(input_ids: torch.Tensor, document_token_id: int) -> torch.Tensor:
    """
    Positions (B, T) that start again at each document of a row, which keeps documents apart in this model.

    The end-of-text token counts as the first of the document behind it: so its one place in a document teaches how to
    end one, by being predicted, and how to begin one, as it does when text is generated from nothing.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = torch.where(input_ids == document_token_id, index, 0).cummax(-1).values
    return index - starts


def next_tokens(rows: torch.Tensor, block_size: int) -> torch.Tensor:
    """
    Return the token that follows each of the first `block_size` of a row, -100 where the row ends with it.

    Args:
        rows (`(B, T)` or `(B, T + 1)`): token ids, T being the block size.
    """
    following = rows[:, 1:].long()
    return torch.nn.functional.pad(following, (0, block_size - following.shape[1]), value=-100)


def num_targets(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens a loss over labels (B, T) counts: the first of a row has nothing before it to be told from."""
    return (labels[:, 1:] != -100).sum()
