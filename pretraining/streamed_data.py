"""Training on streams of text: the sources that a run's flags name, opened, and what is kept back for validation."""

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretraining.arguments import UserError, counted
from pretraining.corpus import Corpus, open_texts
from pretraining.data import PackedDataset
from pretraining.encoding import Encoder
from pretraining.held_out import is_for_validation
from pretraining.mixture import Source
from pretraining.shards import TokenRows
from pretraining.sources import DEFAULT_BLOCK_SIZE, Batches, TrainingData, digest, with_shares
from pretraining.step_split import StepSplit
from pretraining.stream import PackedStream, StreamBatches
from pretraining.tokenizer import load_tokenizer, tokenizer_fingerprint

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
    num_rows = len(ids) // block_size
    if not num_rows:
        raise UserError(
            f"the validation text is {len(ids)} tokens in {counted(documents, 'document')}, less than one row of "
            f"--block_size {block_size}: give more text, a larger --validation_split_percentage or a --validation_file"
        )
    rows = ids[: num_rows * block_size].reshape(-1, 1, block_size)
    return PackedDataset([TokenRows(rows, num_rows)], {"documents": documents, "tokens": len(ids), "bytes": size})
