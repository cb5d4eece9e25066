"""
Text to shards, and shuffled rows out of them, side by side with the two usual recipes on the same text and BPE.

    python benchmarks/data.py                                                # on the Python standard library, repeated
    python benchmarks/data.py --train_file 'texts/*.jsonl' --tokenizer_name openai-community/gpt2

Each way of writing shards runs in a process of its own, in turns, and is timed from the JSON lines to its last file,
loading the tokenizer included and imports excluded. The two recipes are transcriptions of the projects' methods, with
the tiktoken encoding of this tokenizer in place of "gpt2", and JSON lines for `load_dataset` in place of a download.
"""

import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.markdown import table
from pretraining.text.documents import embedded_corpus, local_corpus
from pretraining.tokenization.byte_level_bpe import tiktoken_parts
from pretraining.tokenization.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    import tiktoken

DOCUMENT_CHARACTERS = 4500  # about 1,000 tokens, as in FineWeb-Edu
BLOCK_SIZE = 1024
BATCH_ROWS = 64
# As tiktoken itself spells GPT-2's (tiktoken_ext/openai_public.py).
TIKTOKEN_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass
class BenchmarkArguments:
    train_file: str = flag(None, "text to use; the Python standard library, --repeat times, if left out")
    tokenizer_name: str = flag(None, "a byte-level BPE; one of 32,768 tokens is trained on the text if left out")
    repeat: int = flag(24, "how often the text is taken")
    num_proc: int = flag(2, "cores to use")
    rounds: int = flag(5, "times that each is measured")


def ours(text: Path, tokenizer_dir: str, folder: Path, num_proc: int) -> int:
    """prepare_data.py's own functions: read, split, encode, pack, hash, describe."""
    from prepare_data import PrepareArguments, prepare

    arguments = PrepareArguments(tokenizer_name=tokenizer_dir, num_proc=num_proc, block_size=BLOCK_SIZE)
    corpus = local_corpus(str(text))
    prepare(folder / "data", arguments, {"train": corpus.description}, corpus, None)
    splits = json.loads((folder / "data/dataset.json").read_text())["splits"]
    return sum(split["tokens"] for split in splits.values())


def nanogpt(text: Path, tokenizer_dir: str, folder: Path, num_proc: int) -> int:
    """nanoGPT's data/openwebtext/prepare.py: datasets.map with several processes, then one memmap in 1,024 parts."""
    from datasets import load_dataset

    global ENCODING
    ENCODING = encoding_of(tokenizer_dir)

    def process(example: dict) -> dict:
        ids = ENCODING.encode_ordinary(example["text"])
        ids.append(ENCODING.eot_token)
        return {"ids": ids, "len": len(ids)}

    documents = load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "cache"))
    tokenized = documents.map(process, remove_columns=["text"], num_proc=num_proc)
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    array = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    parts, index = min(1024, len(tokenized)), 0
    for part in range(parts):
        batch = tokenized.shard(num_shards=parts, index=part, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"][:])
        array[index : index + len(ids)] = ids
        index += len(ids)
    array.flush()
    return total


def build_nanogpt(text: Path, tokenizer_dir: str, folder: Path, num_proc: int) -> int:
    """build-nanogpt's fineweb.py: a pool of processes, 16 documents a turn, shards of 100 million tokens as .npy."""
    from datasets import load_dataset

    global ENCODING
    ENCODING = encoding_of(tokenizer_dir)
    documents = load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "cache"))
    shard_size, shard, total = 100_000_000, 0, 0
    array, count = np.empty((shard_size,), dtype=np.uint16), 0
    with multiprocessing.Pool(num_proc) as pool:
        for tokens in pool.imap(build_nanogpt_tokens, documents, chunksize=16):
            total += len(tokens)
            if count + len(tokens) >= shard_size:
                rest = shard_size - count
                array[count:] = tokens[:rest]
                np.save(folder / f"train_{shard:06d}.npy", array)
                shard, tokens, count = shard + 1, tokens[rest:], 0
            array[count : count + len(tokens)] = tokens
            count += len(tokens)
    np.save(folder / f"train_{shard:06d}.npy", array[:count])
    return total


def build_nanogpt_tokens(document: dict) -> np.ndarray:
    tokens = np.array([ENCODING.eot_token, *ENCODING.encode_ordinary(document["text"])])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


WAYS = {"ours": ours, "build-nanogpt's": build_nanogpt, "nanoGPT's": nanogpt}


def encoding_of(tokenizer_dir: str) -> "tiktoken.Encoding":
    """As `tiktoken.get_encoding("gpt2")` would be if this tokenizer were GPT-2's."""
    import tiktoken

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    _, ranks, _ = tiktoken_parts(tokenizer)
    specials = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def measure_one(way: str, text: str, tokenizer_dir: str, num_proc: str) -> None:
    """In a process of its own: prints tokens, seconds, and the peak memory of the process and its children."""
    import datasets.packaged_modules.json.json  # noqa: F401  imported before the clock starts, for all ways

    import prepare_data  # noqa: F401

    load_tokenizer(tokenizer_dir)  # transformers imports what it needs when it is called
    peak, done = [0], threading.Event()
    sampler = threading.Thread(target=sample_memory, args=(peak, done), daemon=True)
    sampler.start()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tokens = WAYS[way](Path(text), tokenizer_dir, Path(folder), int(num_proc))
        seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    print(json.dumps({"tokens": tokens, "seconds": seconds, "megabytes": peak[0] / 1e6}))


def sample_memory(peak: list[int], done: threading.Event) -> None:
    """The most memory seen of the process and its children, mapped files and libraries not counted."""
    process = psutil.Process()
    while not done.wait(0.2):
        total = 0
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                memory = each.memory_info()
                total += memory.rss - memory.shared
        peak[0] = max(peak[0], total)


def run_way(way: str, text: Path, tokenizer_dir: str, num_proc: int) -> dict:
    command = [sys.executable, __file__, "--measure", way, text, tokenizer_dir, num_proc]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def write_text(path: Path, documents: list[str], repeat: int) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(repeat):
            file.write(lines)


def benchmark_shards(args: BenchmarkArguments, work: Path, tokenizer_dir: str, pieces: list[str]) -> tuple[str, str]:
    text, short = work / "text.jsonl", work / "short.jsonl"
    write_text(text, pieces, args.repeat)
    write_text(short, pieces, max(1, args.repeat // 4))
    results = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            results[way].append(run_way(way, text, tokenizer_dir, args.num_proc))
    size = sum(len(piece.encode()) for piece in pieces)
    described = (
        f"Text to shards, {size * args.repeat / 1e6:.0f} MB in {len(pieces) * args.repeat:,} documents, "
        f"{args.num_proc} cores, median of {args.rounds} rounds in turns"
    )
    header = ["recipe", "million tokens/s", "ours is", "peak memory, MB", "with a quarter of the text"]
    rows = []
    rates = {way: [run["tokens"] / run["seconds"] / 1e6 for run in runs] for way, runs in results.items()}
    for way, runs in results.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates[way], strict=True))
        peak = statistics.median(run["megabytes"] for run in runs)
        less = run_way(way, short, tokenizer_dir, args.num_proc)["megabytes"]
        rate = statistics.median(rates[way])
        rows.append([way, f"{rate:.2f}", f"{ratio:.2f} x" if way != "ours" else "", f"{peak:.0f}", f"{less:.0f}"])
    return described, table(header, rows)


def benchmark_rows(args: BenchmarkArguments, work: Path, tokenizer_dir: str) -> str:
    """Batches of shuffled rows as tensors of the files' type: ours, out of several shards, and from one raw memmap."""
    import torch

    from prepare_data import PrepareArguments, prepare
    from pretraining.data.data_folder import open_data_folder

    arguments = PrepareArguments(tokenizer_name=tokenizer_dir, block_size=BLOCK_SIZE, shard_tokens=4_000_000)
    corpus = local_corpus(str(work / "text.jsonl"))
    prepare(work / "data", arguments, {"train": corpus.description}, corpus, None)
    dataset = open_data_folder(work / "data").train
    dataset.__getitems__(list(range(len(dataset)))).numpy().tofile(work / "raw.bin")
    raw = np.memmap(work / "raw.bin", dtype=np.uint16, mode="r").reshape(-1, BLOCK_SIZE)
    shuffled = np.array_split(np.random.default_rng(0).permutation(len(dataset)), len(dataset) // BATCH_ROWS)
    batches = [batch.tolist() for batch in shuffled]

    def seconds(read: Callable, indices: list) -> float:
        started = time.perf_counter()
        for batch in indices:
            read(batch)
        return time.perf_counter() - started

    pairs = [
        (seconds(dataset.__getitems__, batches), seconds(lambda batch: torch.from_numpy(raw[batch]), batches))
        for _ in range(args.rounds + 1)
    ][1:]  # the first one reads the files into memory
    tokens = len(dataset) * BLOCK_SIZE / 1e6
    ours, theirs = (statistics.median(tokens / pair[index] for pair in pairs) for index in (0, 1))
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    shards = len(list((work / "data" / "train").iterdir()))
    return (
        f"Shuffled rows of {BLOCK_SIZE} tokens in batches of {BATCH_ROWS}, out of {shards} shards: ours "
        f"{ours:.0f} million tokens/s, a raw memmap of one file {theirs:.0f}: {ratio:.2f} of it."
    )


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    corpus = local_corpus(args.train_file) if args.train_file else embedded_corpus()
    starts = [(text, start) for text in corpus for start in range(0, len(text), DOCUMENT_CHARACTERS)]
    pieces = [text[start : start + DOCUMENT_CHARACTERS] for text, start in starts]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer_dir = args.tokenizer_name
        if not tokenizer_dir:
            tokenizer_dir = str(work / "tokenizer")
            train_tokenizer(pieces, 32_768).save_pretrained(tokenizer_dir)
        described, rates = benchmark_shards(args, work, tokenizer_dir, pieces)
        rows = benchmark_rows(args, work, tokenizer_dir)
    packages = ("datasets", "tokenizers", "tiktoken", "pyarrow", "numpy")
    print(side_by_side.section(packages, described, rates, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_one(*sys.argv[2:])
    else:
        run_script(main)
