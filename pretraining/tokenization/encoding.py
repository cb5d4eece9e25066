"""Token ids of many documents: with tiktoken where it gives what the tokenizer gives, being several times as fast."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tiktoken
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pretraining.tokenization.byte_level_bpe import tiktoken_parts
from pretraining.tokenization.tokenizer import token_dtype, vocab_size_of

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 19, 512  # what a thread is handed at once
SEPARATOR = "\x00<|end of document|>\x00"
# What two implementations of a byte-level BPE could disagree on: contractions, kinds of white space and where it
# ends, digits and letters of other scripts, marks, joined emoji, control characters, and special tokens as text.
SAMPLE = [
    "I'm we'LL they've 'tis don't  x\t\ty \n\n z   ",
    "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \u0661\u0662\u0663 \u00bd\u2163 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \x00\x1b\x7f",
    "a\u00a0b\u2003c\u2028d\u0085e\ufefff",
    "<|endoftext|> 12345678 ==== a_b\r\n\r\nend\u3000",
    "   ",
    "",
]


class Encoder:
    """
    `encoder(texts)` is a list of arrays: the ids of each text, then the end-of-text token. Text that looks like a
    special token is text. It may be called from several threads, which then use several cores.

    Args:
        texts: of the documents to come. tiktoken is used if the tokenizer is a byte-level BPE and both give the same
            ids for these and for `SAMPLE`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]):
        self.tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.eos_token_id = tokenizer.eos_token_id
        self.dtype = token_dtype(vocab_size_of(tokenizer))
        self.tiktoken, self.ids_of_ranks = None, np.empty(0, self.dtype)
        if pieces := tiktoken_parts(self.tokenizer):
            pattern, ranks, ids = pieces
            end_of_text = {SEPARATOR: len(ranks)}
            self.tiktoken = tiktoken.Encoding(
                "bulk", pat_str=pattern, mergeable_ranks=ranks, special_tokens=end_of_text
            )
            self.ids_of_ranks = np.append(ids, self.eos_token_id).astype(self.dtype)
            judged = [*SAMPLE, *texts]
            if any(map(_differ, self(judged), self._with_tokenizers(judged))):
                self.tiktoken = None

    @property
    def name(self) -> str:
        return "tiktoken" if self.tiktoken else "tokenizers"

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        if self.tiktoken is None or any(SEPARATOR.strip("\0") in text for text in texts):
            return self._with_tokenizers(texts)
        # One call for all texts: each call gives up Python's lock and has to get it back.
        joined = "".join(text + SEPARATOR for text in texts)
        try:
            ranks = self.tiktoken.encode_to_numpy(joined, allowed_special={SEPARATOR})
        except ValueError:  # its regex gives up on some 100,000 white-space characters in a row
            return self._with_tokenizers(texts)
        ends = (np.flatnonzero(ranks == len(self.ids_of_ranks) - 1) + 1).tolist()
        ids = self.ids_of_ranks[ranks]
        return [ids[start:end] for start, end in itertools.pairwise([0, *ends])]

    def _with_tokenizers(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_token_id], dtype=self.dtype) for encoding in encodings]


def encode_documents(
    documents: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, num_threads: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    """
    Yield (split, text, ids) for each (split, text), in order, encoded on `num_threads` threads; both encoders leave
    Python's lock alone while they work. It reads no further ahead than keeps the threads busy.
    """
    batches = _batches(documents)
    first = next(batches, None)
    if first is None:
        return
    encoder = Encoder(tokenizer, [text for _, text in first])
    pending: deque = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in itertools.chain([first], batches):
            pending.append((batch, pool.submit(encoder, [text for _, text in batch])))
            if len(pending) > 2 * num_threads:
                yield from _join(*pending.popleft())
        while pending:
            yield from _join(*pending.popleft())


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _join(batch: list[tuple[str, str]], future: Future) -> Iterator[tuple[str, str, np.ndarray]]:
    for (split, text), ids in zip(batch, future.result(), strict=True):
        yield split, text, ids


def _differ(ids: np.ndarray, others: np.ndarray) -> bool:
    return not np.array_equal(ids, others)
