"""
Text to packed shards of token ids: read documents, tokenise, split into train and validation, pack into rows.

    python prepare_data.py --output_dir data/demo                                  # the Python standard library
    python prepare_data.py --output_dir data/mine --train_file 'texts/*.txt'       # your own text
    python prepare_data.py --output_dir data/fineweb-edu-10B --dataset_name HuggingFaceFW/fineweb-edu \\
        --dataset_config_name sample-10BT --tokenizer_name openai-community/gpt2 --block_size 1024

With no source given it uses the embedded corpus: the standard library of the interpreter that runs it.
"""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pretraining.cli import flag, parse_arguments, problems_of_range, run_script
from pretraining.data.data_folder import DATASET_FILE, FORMAT_VERSION, read_data_folder
from pretraining.data.packing import PackingProgress, PackingSizes, pack
from pretraining.errors import UserError, counted
from pretraining.files import folder_in_progress
from pretraining.hardware import usable_cores
from pretraining.publishing.dataset_card import push_dataset
from pretraining.text.documents import Corpus, embedded_corpus, open_texts
from pretraining.text.sources import TextFlags
from pretraining.text.validation_split import split_documents
from pretraining.tokenization.tokenizer import (
    SMALLEST_VOCABULARY,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    vocab_size_of,
)

CONTENTS = {"train", "validation", "tokenizer", DATASET_FILE, "README.md"}
TOKENIZER_TRAINING_CHARACTERS = 1 << 30  # more text does not change which pairs are frequent
# Flags that do not decide what a data folder holds, or are recorded as its source.
NEUTRAL = """output_dir dataset_name dataset_config_name dataset_revision train_file validation_file num_proc
    push_to_hub hub_private_repo"""


@dataclass
class SourceFlags(TextFlags):
    _argument_group_name = "text: the standard library of Python, unless one of these names another"

    seed: int = flag(42, "decides which documents are for validation")
    max_train_tokens: int | None = flag(
        None, "stop after the document that makes them so many tokens of training text"
    )


@dataclass
class TokenizerFlags:
    _argument_group_name = "tokenizer"

    tokenizer_name: str | None = flag(None, "one on the Hub or in a folder; else a byte-level BPE is trained here")
    tokenizer_vocab_size: int = flag(4096, "size of the tokenizer that is trained here, in tokens")


@dataclass
class OutputFlags:
    _argument_group_name = "data folder"

    output_dir: str = flag(None, "the data folder to write (required)")
    block_size: int = flag(1024, "tokens in a row")
    shard_tokens: int = flag(100_000_000, "tokens in a shard")
    num_proc: int | None = flag(None, "CPU cores to tokenise on; all of them if left out")
    push_to_hub: str | None = flag(None, "publish the data folder as this dataset on the Hub, as USER/NAME")
    hub_private_repo: bool = flag(False, "make that a private one")


@dataclass
class PrepareArguments(OutputFlags, TokenizerFlags, SourceFlags):
    """All flags, those of the last class first."""

    def problems(self) -> list[str]:
        found = []
        if not self.output_dir:
            found.append("--output_dir is required: the data folder to write")
        if self.dataset_name and self.train_file:
            found.append("--dataset_name and --train_file are two sources: give one of them")
        found += self.problems_of_text() + self.problems_of_split()
        if self.hub_private_repo and not self.push_to_hub:
            found.append("--hub_private_repo is for --push_to_hub: give both")
        if self.tokenizer_vocab_size < SMALLEST_VOCABULARY:
            least = f"{SMALLEST_VOCABULARY} (the bytes and the end of text)"
            found.append(f"--tokenizer_vocab_size must be at least {least}, got {self.tokenizer_vocab_size}")
        found += problems_of_range(self, ["block_size"], 2)
        return found + problems_of_range(self, ["max_train_tokens", "num_proc", "shard_tokens"], 1)

    def settings(self) -> dict:
        """The flags that, with the source, decide what the folder holds. No local path is among them."""
        settings = {key: value for key, value in asdict(self).items() if key not in NEUTRAL.split()}
        if self.tokenizer_name and Path(self.tokenizer_name).is_dir():
            settings["tokenizer_name"] = Path(self.tokenizer_name).resolve().name
        return settings


def main() -> None:
    args = parse_arguments(PrepareArguments, __doc__)
    output_dir = Path(args.output_dir)
    if output_dir.is_symlink() or not output_dir.name:
        output_dir = output_dir.resolve()  # a finished folder is moved into place, which cannot replace a link or "."
    if args.num_proc:
        os.environ["RAYON_NUM_THREADS"] = str(args.num_proc)  # read by tokenizers when it is first used

    train_corpus, validation_corpus = read_sources(args)
    source = {"train": train_corpus.description}
    if validation_corpus:
        source["validation"] = validation_corpus.description
    if already_prepared(output_dir, args, source):
        print(f"{output_dir} is already prepared from these settings; delete it to make it again")
    else:
        prepare(output_dir, args, source, train_corpus, validation_corpus)
    if args.push_to_hub:
        print(f"published as {push_dataset(output_dir, args.push_to_hub, args.hub_private_repo)}")


def prepare(
    output_dir: Path, args: PrepareArguments, source: dict, train_corpus: Corpus, validation_corpus: Corpus | None
) -> None:
    """Make the data folder: it is there when all of it is there, and else not at all."""
    corpora = [train_corpus, *([validation_corpus] if validation_corpus else [])]

    def documents() -> Iterator[tuple[str, str]]:
        if validation_corpus is None:
            return split_documents(train_corpus, args.validation_split_percentage, args.seed)
        train = (("train", document) for document in train_corpus)
        return itertools.chain((("validation", document) for document in validation_corpus), train)

    tokenizer = get_tokenizer(args, documents())
    with folder_in_progress(output_dir, CONTENTS) as folder:
        sizes = PackingSizes(args.block_size, args.shard_tokens, args.max_train_tokens)
        progress = PackingProgress(corpora, args.max_train_tokens)
        splits = pack(documents(), tokenizer, folder, sizes, progress, args.num_proc or usable_cores())
        tokenizer.save_pretrained(folder / "tokenizer")
        # Documents are read ahead of the last one that --max_train_tokens lets in, how far depends on the cores.
        last = splits["train"]["documents"] + (0 if validation_corpus else splits["validation"]["documents"])
        counts = [train_corpus.counts(last if args.max_train_tokens else None)]
        counts += [validation_corpus.counts()] if validation_corpus else []
        info = {
            "format_version": FORMAT_VERSION,
            "source": source,
            "documents": {name: sum(each[name] for each in counts) for name in counts[0]},
            "tokenizer": {
                "fingerprint": tokenizer_fingerprint(tokenizer),
                "vocab_size": vocab_size_of(tokenizer),
                "eos_token_id": tokenizer.eos_token_id,
            },
            "block_size": args.block_size,
            "settings": args.settings(),
            "splits": splits,
        }
        (folder / DATASET_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    print(summary(output_dir, info))


def read_sources(args: PrepareArguments) -> tuple[Corpus, Corpus | None]:
    """The text for training, and that for validation if it is given apart."""
    return open_texts(args) if args.train_file or args.dataset_name else (embedded_corpus(), None)


def already_prepared(output_dir: Path, args: PrepareArguments, source: dict) -> bool:
    """
    Whether `output_dir` holds just what is asked for.

    Raises:
        UserError: if it holds something else, which is never overwritten.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    if not (output_dir / DATASET_FILE).is_file():
        raise UserError(f"--output_dir {output_dir} exists and is not a data folder: choose another")
    info = read_data_folder(output_dir)
    wanted = {**args.settings(), "source": source}
    found = {**info["settings"], "source": info["source"]}
    if args.tokenizer_name:  # the name of a folder says little
        wanted["tokenizer"] = tokenizer_fingerprint(load_tokenizer(args.tokenizer_name))
        found["tokenizer"] = info["tokenizer"].get("fingerprint")
    changed = [key for key in wanted if wanted[key] != found.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {found.get(key)}, now {wanted[key]}" for key in changed)
        raise UserError(f"{output_dir} holds other data: {differences}. Delete it or choose another --output_dir")
    return True


def get_tokenizer(args: PrepareArguments, documents: Iterator[tuple[str, str]]) -> PreTrainedTokenizerBase:
    """The tokenizer that was named, or one trained on the training part of the text."""
    if args.tokenizer_name:
        return load_tokenizer(args.tokenizer_name)

    def training_text() -> Iterator[str]:
        size = 0
        with tqdm(desc="reading for the tokenizer", unit="char", unit_scale=True) as bar:
            for split, document in documents:
                if split == "train":
                    yield document
                    size += len(document)
                    bar.update(len(document))
                if size > TOKENIZER_TRAINING_CHARACTERS:
                    break

    tokenizer = train_tokenizer(training_text(), args.tokenizer_vocab_size)
    if len(tokenizer) == SMALLEST_VOCABULARY:
        source = args.train_file or args.dataset_name or "the standard library"
        raise UserError(f"no text found: {source} is empty, or too small to train a tokenizer on")
    return tokenizer


def summary(output_dir: Path, info: dict) -> str:
    lines = [f"wrote {output_dir}"]
    for name, split in info["splits"].items():
        lines.append(
            f"  {name:<10} {split['documents']:>9,} documents {split['bytes']:>14,} bytes "
            f"{split['tokens']:>13,} tokens {split['rows']:>9,} rows ({split['dropped_tokens']} tokens dropped)"
        )
    counts = info["documents"]
    if counts["without_text"]:
        lines.append(f"  left out: {counted(counts['without_text'], 'document')} without text")
    if counts["with_invalid_utf8"]:
        lines.append(f"  {counted(counts['with_invalid_utf8'], 'document')} with invalid UTF-8, which became U+FFFD")
    validation = info["splits"]["validation"]
    if validation["compressed_bytes"]:
        sizes = validation["compressed_bytes"].items()
        rates = ", ".join(f"{name} {8 * size / validation['bytes']:.2f}" for name, size in sizes)
        lines.append(f"  bits per byte of the validation text: {rates}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
