"""
Packed data: rows of token ids in memory-mapped files, and the order in which they are read.

A data folder is described by its dataset.json. Documents are concatenated, each followed by the end-of-text token,
and cut every `block_size` tokens.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretraining.data.row_order import RowOrder
from pretraining.data.shards import TokenRows, checksum_problem, open_arrow_shard, read_data_folder
from pretraining.distributed.signals import ignore_signals
from pretraining.errors import UserError
from pretraining.hardware import reads_pinned_memory, usable_cores

T = TypeVar("T")


class PackedDataset(Dataset):
    """
    The rows of some files, one after the other: `dataset[i]` is row i, `dataset.__getitems__([i, j, ...])` the rows
    as one tensor (number of indices, block_size), both of the files' type, uint16 or uint32: a quarter as many bytes
    to move to a device as the int64 that it needs there.

    Args:
        statistics: counts of `documents`, `tokens` and `bytes` of text, and `compressed_bytes` by program if known.
    """

    def __init__(self, files: list[TokenRows], statistics: dict):
        self.files = files
        self.statistics = statistics
        self._starts = np.cumsum([0, *map(len, files)])  # the number of each file's first row
        types = {(file.batches.dtype, file.batches.shape[2]) for file in files}
        if len(types) > 1:
            raise UserError("the files have ids of 2 bytes and of 4: one tokenizer's are all of one size")
        self._dtype, self._block_size = types.pop()

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
        found = np.empty((len(rows), self._block_size), self._dtype)
        for place, (number, row) in enumerate(zip(numbers.tolist(), within.tolist(), strict=True)):
            found[place] = self.files[number][row]
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
    if len(datasets) == 1:
        return datasets[0]
    counts = {name: sum(each.statistics[name] for each in datasets) for name in ("documents", "tokens", "bytes")}
    return PackedDataset([file for dataset in datasets for file in dataset.files], counts)


def training_batches(dataset: PackedDataset, order: RowOrder, num_workers: int = 0) -> DataLoader:
    """Return micro-batches (batch_size, block_size), endless. No state of it has to be saved in a checkpoint."""
    return open_loader(dataset, num_workers, _start_worker, batch_sampler=order)


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


@dataclass
class DataFolder:
    """
    An opened folder of packed rows.

    Attributes:
        name, revision, config: of the text that it was made from; the last is a configuration of a dataset.
        fingerprint: sha256 of what identifies the training rows.
        check: reads every file once and returns what is wrong with them, an empty list if nothing is. It may fill in
            statistics that only that reading tells.
    """

    name: str
    revision: str
    block_size: int
    fingerprint: str
    train: PackedDataset
    validation: PackedDataset
    check: Callable[[], list[str]]
    config: str | None = None


def open_data_folder(folder: Path, tokenizer_fingerprint: str | None = None) -> DataFolder:
    """
    A folder that prepare_data.py wrote, mapped into memory. Its bytes are not read yet: that is what `check` is for.

    Args:
        tokenizer_fingerprint: of the tokenizer that is to be used, if it is not the folder's own.

    Raises:
        UserError: with everything about it that is not as its dataset.json says.
    """
    info = read_data_folder(folder)
    tokenizer, block_size = info["tokenizer"], info["block_size"]
    problems, shards = [], []
    files: dict[str, list[TokenRows]] = {"train": [], "validation": []}
    if tokenizer_fingerprint not in (None, tokenizer["fingerprint"]):
        problems.append(
            f"{folder} was made with a tokenizer of the fingerprint {tokenizer['fingerprint'][:16]}..., the one to be "
            f"used has {tokenizer_fingerprint[:16]}...: its vocabulary is another"
        )
    for split, opened in files.items():
        for shard in info["splits"][split]["shards"]:
            shards.append(shard)
            try:
                opened.append(open_arrow_shard(folder / shard["file"], shard, block_size, tokenizer["vocab_size"]))
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)

    def check() -> list[str]:
        with ThreadPoolExecutor(usable_cores()) as pool:
            return list(filter(None, pool.map(checksum_problem, (folder / shard["file"] for shard in shards), shards)))

    source = info["source"]["train"]
    return DataFolder(
        name=Path(source["name"]).name if Path(source["name"]).is_absolute() else source["name"],
        revision=source["revision"],
        config=source.get("config"),
        block_size=block_size,
        fingerprint=hashlib.sha256(json.dumps(info["splits"]["train"]["shards"]).encode()).hexdigest(),
        check=check,
        **{split: PackedDataset(opened, dict(info["splits"][split])) for split, opened in files.items()},
    )
