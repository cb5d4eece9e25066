"""
Streams: documents are read, tokenised and packed while the model trains, and every row knows how to go on from it.

Each consumer (a data loader's worker of a process, or the process itself) reads a share of each source's documents.
Every micro-batch carries the position behind it: where the reading stood, and the tokens that were left over. So a
checkpoint needs nothing from the data loader, which may be any number of batches ahead.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from pretraining.data.packed_rows import PackedDataset, full_rows, open_loader
from pretraining.data.row_order import SourceOrder, StepSplit
from pretraining.data.training_data import DEFAULT_BLOCK_SIZE, Batches, TrainingData, digest, with_shares
from pretraining.distributed.signals import ignore_signals
from pretraining.errors import ProcessError, UserError, counted
from pretraining.text.documents import Corpus, open_texts
from pretraining.text.sources import Source
from pretraining.text.validation_split import is_for_validation
from pretraining.tokenization.encoding import Encoder
from pretraining.tokenization.tokenizer import load_tokenizer, token_dtype, tokenizer_fingerprint, vocab_size_of


class RowStream:
    """
    Endless rows of one consumer's share of one source, epoch after epoch, each an array (block_size,).

    Args:
        validation_percentage: percentage of the documents that is for validation, and left out here.
        share: (index, count) of the consumers.
        position: what `position()` gave after the row before the first one that is wanted.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        validation_percentage: int,
        share: tuple[int, int],
        seed: int,
        position: dict | None = None,
    ):
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.validation_percentage = validation_percentage
        self.share = share
        self.seed = seed
        self._encoder: Encoder | None = None
        position = position or {"epoch": 0, "upstream": None, "leftover": [], "row": 0}
        # The tokens at hand are those left over from earlier documents and those of the documents read last.
        dtype = token_dtype(vocab_size_of(tokenizer))
        self._leftover = self._tokens = np.array(position["leftover"], dtype=dtype)
        self._start_epoch(position["epoch"], position["upstream"])
        if position["row"]:
            self._read()
        self._row = position["row"]

    def __next__(self) -> np.ndarray:
        while (self._row + 1) * self.block_size > len(self._tokens):
            self._read()
        start = self._row * self.block_size
        self._row += 1
        return self._tokens[start : start + self.block_size]

    def position(self) -> dict:
        """
        As JSON: the epoch, the source's state before the documents read last, the tokens left over from before them,
        and how many rows of both together are taken.
        """
        leftover = self._leftover.tolist()
        return {"epoch": self._epoch, "upstream": self._upstream, "leftover": leftover, "row": self._row}

    def _start_epoch(self, epoch: int, upstream: dict | None) -> None:
        """From its beginning, or from a state of the source."""
        self._epoch, self._upstream, self._next_upstream = epoch, upstream, upstream
        self._is_dry = upstream is None  # no text has been seen of the whole epoch
        self._share = self.corpus.share(*self.share, epoch, self.seed)
        if upstream is not None:
            self._share.load_state_dict(upstream)
        self._reads = self._share.batches()

    def _read(self) -> None:
        """The next documents' tokens, after what the rows have left of those at hand."""
        _, self._leftover = full_rows(self._tokens, self.block_size)
        self._tokens, self._row, self._upstream = self._leftover, 0, self._next_upstream
        texts = next(self._reads, None)
        if texts is None:
            if self._is_dry:
                number = f"{self.share[1]} processes and workers"
                raise UserError(f"{self.corpus.description['name']} has no text for one of {number}: use fewer")
            self._start_epoch(self._epoch + 1, None)
            return
        self._next_upstream = self._share.state_dict()
        if self.validation_percentage:
            texts = [text for text in texts if not is_for_validation(text, self.validation_percentage)]
        if texts:
            self._is_dry = False
            self._encoder = self._encoder or Encoder(self.tokenizer, texts)
            self._tokens = np.concatenate([self._leftover, *self._encoder(texts)])


class PackedStream(IterableDataset):
    """
    Micro-batches of one process: rows (batch_size, block_size) of uint16 or uint32, and the position behind them as
    JSON, which a loader passes on as it is, where it would look at every number of a dictionary.

    Args:
        corpora: the sources; `weights` are theirs.
        process: (index, count).
        positions: of this process's consumers, by number; None for one that starts at the beginning.
        first_consumer: whose turn it is. A loader always begins with its worker 0.
    """

    def __init__(
        self,
        corpora: list[Corpus],
        weights: list[float],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        batch_size: int,
        validation_percentages: list[int],
        process: tuple[int, int],
        seed: int,
        positions: list[dict | None],
        first_consumer: int,
    ):
        self.corpora = corpora
        self.weights = weights
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.batch_size = batch_size
        self.validation_percentages = validation_percentages
        self.process = process
        self.seed = seed
        self.positions = positions
        self.first_consumer = first_consumer

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str] | UserError]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        consumer = (index + self.first_consumer) % count
        try:
            yield from self._micro_batches(consumer, count)
        except UserError as error:
            yield error  # raised here, a loader would wrap it into a traceback of its worker

    def _micro_batches(self, consumer: int, count: int) -> Iterator[tuple[torch.Tensor, str]]:
        process, num_processes = self.process
        share = (process * count + consumer, num_processes * count)
        beginning: dict[str, Any] = {"rows": 0, "sources": [None] * len(self.corpora)}
        position = self.positions[consumer] or beginning  # None: it has not had its first turn yet
        streams = [
            RowStream(corpus, self.tokenizer, self.block_size, percentage, share, self.seed, at)
            for corpus, percentage, at in zip(
                self.corpora, self.validation_percentages, position["sources"], strict=True
            )
        ]
        order = SourceOrder(self.weights, [self.seed, share[0]])
        first = position["rows"]
        while True:
            sources, _ = order.locate(np.arange(first, first + self.batch_size))
            rows = np.stack([next(streams[source]) for source in sources])
            first += self.batch_size
            position = {"rows": first, "sources": [stream.position() for stream in streams]}
            yield torch.from_numpy(rows), json.dumps(position)


class StreamBatches:
    """
    The micro-batches of a `PackedStream`, endless, and `position()` behind the last one that was taken.

    Args:
        make_stream: the stream from given `positions` and `first_consumer`.
        position: to continue from, if not at the beginning.
    """

    def __init__(
        self, make_stream: "Callable[[list[dict | None], int], PackedStream]", num_workers: int, position: dict | None
    ):
        self.num_consumers = max(1, num_workers)
        self.taken = position["taken"] if position else 0
        self.positions = position["consumers"] if position else [None] * self.num_consumers
        stream = make_stream(list(self.positions), self.taken % self.num_consumers)
        loader = open_loader(stream, num_workers, _after_fork, batch_size=None)
        self.batches = iter(loader)

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> torch.Tensor:
        batch = next(self.batches)
        if isinstance(batch, UserError):
            raise ProcessError(*batch.problems)
        rows, position = batch
        self.positions[self.taken % self.num_consumers] = json.loads(position)
        self.taken += 1
        return rows

    def position(self) -> dict:
        """As JSON: how many micro-batches were taken, and where each consumer stood at its last one."""
        return {"taken": self.taken, "consumers": list(self.positions)}


def _after_fork(worker: int) -> None:
    """A fork leaves threads behind: those of `tokenizers`, which would warn of it, and of fsspec, which would hang."""
    ignore_signals()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fsspec.asyn.reset_lock()


VALIDATION_TOKENS = 1 << 19  # at most: it is read again at each start, at 5 % out of twenty times as many


@dataclass
class StreamedData(TrainingData):
    stream: dict = field(default_factory=dict)  # arguments of PackedStream

    def binding(self, split: StepSplit) -> dict:
        return {"num_processes": split.num_processes, "dataloader_num_workers": split.num_workers}

    def batches(self, split: StepSplit, seed: int, first_step: int, position: dict | None) -> Batches:
        def make_stream(positions: list[dict | None], first_consumer: int) -> PackedStream:
            return PackedStream(
                **self.stream,
                tokenizer=self.tokenizer,
                block_size=self.block_size,
                batch_size=split.batch_size,
                process=(split.process_index, split.num_processes),
                seed=seed,
                positions=positions,
                first_consumer=first_consumer,
            )

        return StreamBatches(make_stream, split.num_workers, position)


def open_streams(
    sources: list[Source], tokenizer_name: str, block_size: int | None, validation_split_percentage: int
) -> StreamedData:
    """
    Texts on the Hub or in files, tokenised and packed while training.

    Raises:
        UserError: if one of them cannot be read, or there is no text for validation.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    block_size = block_size or DEFAULT_BLOCK_SIZE
    opened = [open_texts(source) for source in sources]
    corpora = [corpus for corpus, _ in opened]
    validation = [apart or corpus for corpus, apart in opened]
    validation_percentages = [0 if apart else validation_split_percentage for _, apart in opened]
    weights = [source.weight for source in sources]
    descriptions = [corpus.description for corpus in corpora]
    identity = [descriptions, weights, validation_percentages, [corpus.text_column for corpus in corpora], block_size]
    return StreamedData(
        tokenizer=tokenizer,
        block_size=block_size,
        validation=validation_rows(validation, validation_percentages, tokenizer, block_size),
        sources=with_shares(descriptions, weights),
        fingerprint=digest([*identity, tokenizer_fingerprint(tokenizer)]),
        stream={"corpora": corpora, "weights": weights, "validation_percentages": validation_percentages},
    )


def validation_rows(
    corpora: list[Corpus], validation_percentages: list[int], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PackedDataset:
    """
    The first documents that training leaves out, `VALIDATION_TOKENS` of them, from each source as many.

    Raises:
        UserError: if there is not enough text for one row.
    """
    tokens, documents, size = [], 0, 0
    for corpus, percentage in zip(corpora, validation_percentages, strict=True):
        limit, encoder, read = VALIDATION_TOKENS // len(corpora), None, 0
        for texts in corpus.batches():
            texts = [text for text in texts if not percentage or is_for_validation(text, percentage)]
            if texts:
                encoder = encoder or Encoder(tokenizer, texts)
                tokens += encoder(texts)
                documents += len(texts)
                size += sum(len(text.encode()) for text in texts)
                read += sum(map(len, tokens[-len(texts) :]))
            if read >= limit:
                break
    ids = np.concatenate(tokens) if tokens else np.empty(0, np.uint16)
    rows, _ = full_rows(ids, block_size)
    if not len(rows):
        raise UserError(
            f"the validation text is {len(ids)} tokens in {counted(documents, 'document')}, less than one row of "
            f"--block_size {block_size}: give more text, a larger --validation_split_percentage or a --validation_file"
        )
    return PackedDataset([rows], {"documents": documents, "tokens": len(ids), "bytes": size})
