"""
Packed shards: a folder of fixed-length rows of token ids in Arrow files, described by its dataset.json.

Documents are concatenated, each followed by the end-of-text token, and cut every `block_size` tokens.
"""

import bisect
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pretraining.arguments import UserError
from pretraining.files import sha256_of

FORMAT_VERSION = 1
ROWS_PER_RECORD_BATCH = 1024


class ShardWriter:
    """
    Writes one split: `add` token ids of any length, get full rows in `shard-00000.arrow`, `shard-00001.arrow`, ...

    The bytes depend only on the ids, `block_size` and `shard_tokens`, not on how the ids were handed over.
    """

    def __init__(self, folder: Path, block_size: int, vocab_size: int, shard_tokens: int):
        from datasets import Features, List, Value  # a second of import, for nothing when only reading

        folder.mkdir(parents=True)
        self.folder = folder
        self.block_size = block_size
        self.dtype = np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")
        self.schema = Features({"input_ids": List(Value(str(self.dtype)), length=block_size)}).arrow_schema
        self.rows_per_shard = max(1, shard_tokens // block_size)
        self.shards: list[dict] = []
        self._stream = None  # the Arrow stream of the shard being written
        self._rows_in_shard = 0
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards) + self._rows_in_shard

    def add(self, token_ids: list[int]) -> None:
        self._pending.append(np.asarray(token_ids, dtype=self.dtype))
        self._pending_tokens += len(token_ids)
        if self._pending_tokens >= ROWS_PER_RECORD_BATCH * self.block_size:
            self._write_full_batches()

    def close(self) -> int:
        """Write what is left. Returns the number of tokens in the last, short row, which is dropped."""
        self._write_full_batches()
        left = np.concatenate([*self._pending, np.empty(0, self.dtype)])
        full = len(left) // self.block_size * self.block_size
        self._write_rows(left[:full].reshape(-1, self.block_size))
        self._close_shard()
        return len(left) - full

    def _write_full_batches(self) -> None:
        tokens = np.concatenate([*self._pending, np.empty(0, self.dtype)])
        batch = ROWS_PER_RECORD_BATCH * self.block_size
        full = len(tokens) // batch * batch
        for start in range(0, full, batch):
            self._write_rows(tokens[start : start + batch].reshape(-1, self.block_size))
        self._pending, self._pending_tokens = [tokens[full:]], len(tokens) - full

    def _write_rows(self, rows: np.ndarray) -> None:
        """Append rows (n, block_size), starting new shards where one is full."""
        while len(rows):
            if self._stream is None:
                self._stream = pa.ipc.new_stream(self._shard_path(), self.schema)
            part, rows = np.split(rows, [min(len(rows), self.rows_per_shard - self._rows_in_shard)])
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), self.block_size)
            self._stream.write_batch(pa.record_batch([column], schema=self.schema))
            self._rows_in_shard += len(part)
            if self._rows_in_shard == self.rows_per_shard:
                self._close_shard()

    def _shard_path(self) -> Path:
        return self.folder / f"shard-{len(self.shards):05d}.arrow"

    def _close_shard(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        path = self._shard_path()
        self.shards.append(
            {
                "file": f"{path.parent.name}/{path.name}",
                "rows": self._rows_in_shard,
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
        )
        self._stream, self._rows_in_shard = None, 0


class PackedDataset(Dataset):
    """
    The rows of one split of a data folder, memory-mapped: `dataset[i]` is row i, `dataset.__getitems__([i, j, ...])`
    the rows as one int64 tensor (number of indices, block_size).
    """

    def __init__(self, folder: Path, split: str):
        self.info = read_data_folder(folder)
        self.block_size: int = self.info["block_size"]
        self.statistics: dict = self.info["splits"][split]
        self._parts: list[np.ndarray] = []  # views (rows, block_size) into the mapped files, one per record batch
        self._ends: list[int] = []  # number of rows up to the end of each part
        for shard in self.statistics["shards"]:
            self._map_shard(folder / shard["file"], shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        rows = np.empty((len(indices), self.block_size), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            part = bisect.bisect_right(self._ends, index)
            row[:] = self._parts[part][index - self._ends[part]]  # negative: counted from the part's end
        return torch.from_numpy(rows)

    @property
    def bytes_per_token(self) -> float:
        return self.statistics["bytes"] / self.statistics["tokens"]

    @property
    def compression_rates(self) -> dict[str, float]:
        """Bits per byte that gzip and xz need for the text; empty where that was not measured."""
        sizes = self.statistics.get("compressed_bytes") or {}
        return {name: 8 * size / self.statistics["bytes"] for name, size in sizes.items()}

    def _map_shard(self, path: Path, expected: dict) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing: dataset.json lists it; prepare the data again")
        if path.stat().st_size != expected["bytes"]:
            found = path.stat().st_size
            raise UserError(f"{path} has {found} bytes, dataset.json says {expected['bytes']}; prepare the data again")
        try:
            stream = pa.ipc.open_stream(pa.memory_map(str(path)))
            row_length = stream.schema.field("input_ids").type.list_size
        except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): prepare the data again") from None
        if row_length != self.block_size:
            raise UserError(f"{path} has rows of {row_length} tokens, dataset.json says {self.block_size}")
        for batch in stream:
            values = batch.column("input_ids").flatten().to_numpy(zero_copy_only=True)
            self._parts.append(values.reshape(-1, self.block_size))
            self._ends.append((self._ends[-1] if self._ends else 0) + batch.num_rows)


class RowOrder(Sampler):
    """
    Which rows each process trains on, as a pure function of (seed, step): any step can be reached without replaying
    the ones before it, and the global batch of a step does not depend on how it is split.

    Every epoch is its own permutation of the rows; step s takes rows [s * G, (s + 1) * G) of the permutations put end
    to end, where G = gradient_accumulation_steps * num_processes * batch_size. Yields, for the steps from
    `first_step` on, this process's `gradient_accumulation_steps` lists of `batch_size` row numbers each.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        first_step: int = 0,
    ):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.accumulation = gradient_accumulation_steps
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.first_step = first_step
        self._epoch, self._permutation = -1, None

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            for micro_step in range(self.accumulation):
                yield self.rows(step, micro_step)
            step += 1

    def rows(self, step: int, micro_step: int) -> list[int]:
        """Row numbers of one micro-batch of this process."""
        micro_batch = (step * self.accumulation + micro_step) * self.num_processes + self.process_index
        start = micro_batch * self.batch_size
        return [self._row(position) for position in range(start, start + self.batch_size)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if epoch != self._epoch:
            # A sequence of integers seeds PCG64 through a hash, so that (seed, epoch) pairs do not overlap.
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(self.num_rows)
        return int(self._permutation[offset])


def training_batches(dataset: PackedDataset, order: RowOrder, num_workers: int = 0) -> DataLoader:
    """Micro-batches (batch_size, block_size), endless. It holds no state that a checkpoint would have to save."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Without a generator of its own, every iter() would draw a base seed from the global one and change dropout.
        generator=torch.Generator().manual_seed(0),
    )


def read_data_folder(folder: Path) -> dict:
    """
    dataset.json of a data folder.

    Raises:
        UserError: if there is none, or it is of a format that this version cannot read.
    """
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a data folder, it has no dataset.json: make one with prepare_data.py")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["format_version"]
        missing = {"source", "tokenizer", "block_size", "settings", "splits"} - info.keys()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): prepare the data again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
    if missing:
        raise UserError(f"{path} is damaged, it has no {', '.join(sorted(missing))}: prepare the data again")
    return info


def _as_it_is(batch: torch.Tensor) -> torch.Tensor:
    return batch
