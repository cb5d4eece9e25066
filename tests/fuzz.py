"""
Damage every file that the scripts read, in many ways, and see that each reader succeeds or says in one line what is
wrong.

    PYTHONPATH=. python tests/fuzz.py                           # 2,000 damages of each file
    PYTHONPATH=. python tests/fuzz.py --examples 50000 --only json_lines

The tests run a few of them (test_fuzz.py).
"""

import argparse
import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from support.generated_items import generated_records
from support.tiny_models import tiny_model
from transformers.utils.logging import disable_progress_bar

import prepare_data
import publish_model
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining.checkpoints.checkpoint import CheckpointWriter, load_checkpoint
from pretraining.checkpoints.folders import best_checkpoint, checkpoint_to_resume, mark_best, verify
from pretraining.checkpoints.identity import differences
from pretraining.checkpoints.run_folder import open_run_folder
from pretraining.checkpoints.state import Position
from pretraining.cli import parse_arguments
from pretraining.data.data_folder import open_data_folder
from pretraining.data.token_files import open_borrowed_folder
from pretraining.errors import UserError
from pretraining.evaluation.hellaswag_items import encode_items, hellaswag_source, load_items
from pretraining.files import sha256_of
from pretraining.optimization.optimizer import build_optimizer
from pretraining.publishing.card_edits import converted_card, renamed_card, update_model_card
from pretraining.publishing.push import published, read_card
from pretraining.records.metrics import read_metrics, truncate
from pretraining.records.task_results import task_results
from pretraining.text.documents import local_corpus
from pretraining.tokenization.byte_level_bpe import bytes_of_tokens
from pretraining.tokenization.encoding import Encoder
from pretraining.tokenization.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from pretraining.training.flags import TrainArguments
from pretraining.training.model import load_config, load_model, parse_overrides

SECONDS, MEGABYTES = 10, 2048  # that one reading may take
LINES, CHARACTERS = 12, 2000  # of a message: several problems are told at once, each in a line

# Damages

DEEP = "a value that is nested deeply"
STRANGE = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), -0.5),
    *("", " ", "\x00", "\ud800", "\u202e\ufeff", "../../outside", "/etc/passwd", "a" * 5000, "1e5", "nan", "\r\n"),
    *([], {}, [[]], [None], {"": None}, DEEP),
]
STRANGE_WORDS = [word for word in STRANGE if isinstance(word, str)] + ["--", "=", "{", "-1", "1" * 400, "null"]


@st.composite
def damaged_bytes(draw: Callable, content: bytes) -> bytes:
    """Some bytes are cut off, flipped, removed, inserted or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        size = draw(st.one_of(st.integers(1, 8), st.integers(1, max(1, len(content)))))
        kind = draw(st.sampled_from(["cut", "flip", "remove", "insert", "repeat"]))
        part = content[start : start + size]
        if kind == "cut":
            content = content[:start]
        elif kind == "flip":
            mask = draw(st.integers(1, 255))
            content = content[:start] + bytes(byte ^ mask for byte in part) + content[start + size :]
        elif kind == "remove":
            content = content[:start] + content[start + size :]
        elif kind == "insert":
            content = content[:start] + draw(st.binary(max_size=16)) + content[start:]
        else:
            content = content[:start] + part + content[start:]
    return content


@st.composite
def damaged_tree(draw: Callable, tree: Any) -> Any:
    """Some values of a tree of dictionaries and lists are removed, replaced, wrapped, repeated or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        parent, key, value = None, None, tree
        while isinstance(value, dict | list) and len(value) and draw(st.integers(0, 5)):
            parent = value
            key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
            value = parent[key]
        strange = copy.deepcopy(draw(st.sampled_from(STRANGE)))  # which a later damage may change
        if parent is None:
            if draw(st.integers(0, 20)) == 0:
                return strange
            continue
        kind = draw(st.sampled_from(["remove", "replace", "replace", "replace", "wrap", "repeat", "rename"]))
        if kind == "remove":
            del parent[key]
        elif kind == "replace":
            parent[key] = strange
        elif kind == "wrap":
            parent[key] = draw(st.sampled_from([[value], {"value": value}]))
        elif kind == "repeat" and isinstance(parent, list):
            parent.insert(key, value)
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(STRANGE_WORDS))] = parent.pop(key)
    return tree


def json_text(tree: Any) -> bytes:
    return json.dumps(tree).replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000).encode()


def yaml_text(tree: Any) -> bytes:
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)
    return text.replace(DEEP, "[" * 2_000 + "]" * 2_000).encode()


def damaged_json(content: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(damaged_tree(json.loads(content)).map(json_text), damaged_bytes(content))


def damaged_json_lines(content: bytes) -> st.SearchStrategy[bytes]:
    lines = damaged_tree([json.loads(line) for line in content.splitlines()])
    texts = lines.map(lambda tree: b"\n".join(map(json_text, tree)) if isinstance(tree, list) else json_text(tree))
    return st.one_of(texts, damaged_bytes(content))


def damaged_yaml(content: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(damaged_tree(yaml.safe_load(content)).map(yaml_text), damaged_bytes(content))


# Readers


@dataclass
class Reader:
    """
    Attributes:
        make: writes valid files into a folder.
        file: the one of them that is damaged.
        damage: from its content, a strategy of damaged ones.
        read: reads the folder, and raises nothing but a UserError.
    """

    make: Callable[[Path], None]
    file: str
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    read: Callable[[Path], object]


TEXTS = ["def one(two):\n    return three\n", "print('four')\n" * 9, "caf\u00e9 \u65e5\u672c"] * 8


@cache
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def make_data(folder: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text(lines)
    corpus = local_corpus(str(folder / "texts.jsonl"))
    arguments = prepare_data.PrepareArguments(
        tokenizer_vocab_size=300, block_size=4, shard_tokens=80, validation_split_percentage=20
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare_data.prepare(folder / "data", arguments, {"train": corpus.description}, corpus, None)


def read_data(folder: Path) -> None:
    data = open_data_folder(folder / "data")
    if not data.check():
        data.train.__getitems__(list(range(len(data.train))))


def read_described_shard(folder: Path) -> None:
    """A damaged shard whose size and sum are as dataset.json says, as somebody may have published it."""
    info = json.loads((folder / "data/dataset.json").read_text())
    shard, path = info["splits"]["train"]["shards"][0], folder / SHARD
    shard["bytes"], shard["sha256"] = path.stat().st_size, sha256_of(path)
    (folder / "data/dataset.json").write_text(json.dumps(info))
    read_data(folder)


SHARD = "data/train/shard-00000.arrow"
IDS = np.arange(200, dtype=np.uint16) % 300


def make_npy(folder: Path) -> None:
    for name in ("train", "val"):
        np.save(folder / f"{name}.npy", IDS)


def make_llmc(folder: Path) -> None:
    for name in ("train", "val"):
        header = struct.pack("<256i", 20240520, 1, len(IDS), *[0] * 253)
        (folder / f"{name}.bin").write_bytes(header + IDS.tobytes())


def make_nanogpt(folder: Path) -> None:
    for name in ("train", "val"):
        IDS.tofile(folder / f"{name}.bin")


def read_token_files(folder: Path) -> None:
    borrowed = open_borrowed_folder(folder, tokenizer(), 8)
    borrowed.check()
    borrowed.train.__getitems__([0, len(borrowed.train) - 1])


def make_tokenizer(folder: Path) -> None:
    tokenizer().save_pretrained(folder)


def read_tokenizer(folder: Path) -> None:
    loaded = load_tokenizer(folder)
    tokenizer_fingerprint(loaded)
    bytes_of_tokens(loaded)
    Encoder(loaded, TEXTS)(TEXTS)


def make_json_lines(folder: Path) -> None:
    rows = [{"id": number, "text": text, "more": {"a": [1, None]}} for number, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), folder / "texts.parquet", row_group_size=5)


def make_text(folder: Path) -> None:
    (folder / "texts.txt").write_text("\n".join(TEXTS))


def read_texts(folder: Path) -> None:
    (path,) = folder.glob("texts.*")
    for texts in local_corpus(str(path)).batches():
        "".join(texts).encode()


def make_items(folder: Path) -> None:
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in generated_records(5)))


def read_items(folder: Path) -> None:
    config = GPT2ScratchConfig(vocab_size=300, n_positions=64, bos_token_id=0, eos_token_id=0)
    encode_items(config, tokenizer(), load_items(folder / "items.jsonl"), "lm_eval")


def make_recipe(folder: Path) -> None:
    recipe = {
        **{"output_dir": "runs/x", "data_dir": "data/x", "max_steps": 5, "learning_rate": 1e-3, "optim": "muon"},
        **{"sample_prompts": ["a", "b"], "streaming": False, "seed": 3, "warmup_steps": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def make_mixture(folder: Path) -> None:
    sources = [{"data_dir": "data/a", "weight": 0.7}, {"data_dir": "data/b", "weight": 1}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": "runs/x", "mixture": sources}))


def read_recipe(folder: Path) -> None:
    parse_arguments(TrainArguments, "", ["--config", str(folder / "recipe.yaml")]).sources()


def make_flags(folder: Path) -> None:
    words = "--output_dir runs/x --data_dir data/x --max_steps 5 --learning_rate 1e-3 --sample_prompts a b --seed=3"
    (folder / "flags").write_text(words.replace(" ", "\n"))


def damaged_words(content: bytes) -> st.SearchStrategy[bytes]:
    words = damaged_tree(content.decode().split("\n")).filter(lambda tree: isinstance(tree, list))
    return words.map(lambda tree: "\n".join(map(str, tree)).encode(errors="replace"))


def read_flags(folder: Path) -> None:
    words = (folder / "flags").read_bytes().decode(errors="replace").split("\n")
    arguments = [word for word in words if word not in ("-h", "--help")]
    parse_arguments(TrainArguments, "", arguments).sources()


def make_overrides(folder: Path) -> None:
    (folder / "overrides").write_text("n_layer=2,n_embd=32,n_head=2,activation_function=gelu,qkv_bias=true")


def read_overrides(folder: Path) -> None:
    text = (folder / "overrides").read_bytes().decode(errors="replace")
    parse_overrides(text)
    load_config(None, "124M", text, 300, 0)


# A run with a checkpoint

IDENTITY = {
    "settings": {"max_steps": 9, "learning_rate": 1e-3},
    "config": {"n_layer": 2},
    "tokenizer": "abc",
    "data": {"name": "x", "fingerprint": "y"},
    "binding": {},
    "tokens_per_step": 64,
}


@cache
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@cache
def model_and_optimizer() -> tuple:
    model = tiny_model(vocab_size=40, n_embd=8, n_layer=1, n_head=1)
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.1, torch.device("cpu"))
    return accelerator().prepare(model, optimizer)


def make_run(folder: Path) -> None:
    model, optimizer = model_and_optimizer()
    model(torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    run = folder / "run"
    run.mkdir()
    lines = [{"step": step, "tokens": 64 * step, "elapsed_seconds": 1.0 * step, "loss": 4.0} for step in range(1, 5)]
    lines.append({"step": 4, "tokens": 256, "elapsed_seconds": 5.0, "eval_loss": 3.9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = {"output_dir": "run", "resume_from_checkpoint": "elsewhere"}
    (run / "training_args.yaml").write_text(yaml.safe_dump(arguments))
    (run / "identity.json").write_text(json.dumps(IDENTITY))
    generators = {"cpu": torch.get_rng_state()}
    position = Position(4, 1.5, False, IDENTITY, {"recent": [4.0, 3.9]}, [None], generators)
    with CheckpointWriter(accelerator(), run, model, optimizer, 2) as writer:
        writer.save(position)
        writer.wait()


CHECKPOINT = "run/checkpoint-000004"


def read_run(folder: Path) -> None:
    arguments = {"resume_from_checkpoint": "auto", "allow_changes": [], "output_dir": "run"}
    with open_run_folder(folder / "run", arguments, IDENTITY, {}, accelerator().state):
        pass


def read_other_run(folder: Path) -> None:
    """As a run that began from a checkpoint elsewhere is continued: training_args.yaml says which."""
    arguments = {"resume_from_checkpoint": "elsewhere", "allow_changes": [], "output_dir": "run"}
    with open_run_folder(folder / "run", arguments, IDENTITY, {}, accelerator().state):
        pass


def make_finished_run(folder: Path) -> None:
    make_run(folder)
    shutil.copy(folder / CHECKPOINT / "model.safetensors", folder / "run")


def read_checkpoint(folder: Path) -> None:
    load_checkpoint(accelerator(), folder / CHECKPOINT, *model_and_optimizer())


def read_manifest(folder: Path) -> None:
    verify(folder / CHECKPOINT)
    checkpoint_to_resume(folder / "run", "auto")


def read_position(folder: Path) -> None:
    position = Position.read(folder / CHECKPOINT)
    differences(position.identity, IDENTITY, [], {})
    position.of_process(0)


def read_metrics_file(folder: Path) -> None:
    read_metrics(folder / "run")
    best_checkpoint(folder / "run")
    mark_best(folder / "run")
    truncate(folder / "run/metrics.jsonl", 3, False)


# A folder to publish


def make_model(folder: Path) -> None:
    model = tiny_model(vocab_size=300, n_embd=8, n_layer=1, n_head=1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


CARD = """---
license: mit
library_name: transformers
tags: [gpt2]
model_name: model
model-index:
- name: model
  results:
  - task: {type: text-generation}
    dataset: {type: x, name: x}
    metrics: [{type: loss, value: 1.0, name: loss}]
---

# model

## Use it

```python
generator = pipeline("text-generation", model="model", trust_remote_code=True)
print(generator("def ", max_new_tokens=60)[0]["generated_text"])
```

## Licence

The weights: `mit`.
"""


def read_model(folder: Path) -> None:
    if not publish_model.problems_of_model(str(folder), "gpt2"):
        load_model(GPT2ScratchForCausalLM, str(folder))


def read_model_config(folder: Path) -> None:
    load_config(str(folder), None, None, 300, 0)
    read_model(folder)


def read_published(folder: Path) -> None:
    for path in published(folder):
        assert path.resolve().is_relative_to(folder.resolve()), path


def damaged_card(content: bytes) -> st.SearchStrategy[bytes]:
    _, metadata, text = content.split(b"---\n", 2)
    trees = damaged_tree(yaml.safe_load(metadata)).map(lambda tree: b"---\n" + yaml_text(tree) + b"---\n" + text)
    return st.one_of(trees, damaged_bytes(content))


def read_cards(folder: Path) -> None:
    text = read_card(folder)
    renamed_card(text, "us/other", "apache-2.0")
    converted_card(text, folder / "out", "gguf", GPT2ScratchConfig(), "f32", None)
    source = hellaswag_source("us/items", None, 5, "completion", is_whole=True)
    update_model_card(str(folder), task_results([source], {"hellaswag_acc": 0.2, "hellaswag_acc_stderr": 0.1}))
    ModelCard.load(folder / "README.md")


READERS = {
    "recipe": Reader(make_recipe, "recipe.yaml", damaged_yaml, read_recipe),
    "mixture": Reader(make_mixture, "recipe.yaml", damaged_yaml, read_recipe),
    "flags": Reader(make_flags, "flags", damaged_words, read_flags),
    "config_overrides": Reader(make_overrides, "overrides", damaged_bytes, read_overrides),
    "dataset_json": Reader(make_data, "data/dataset.json", damaged_json, read_data),
    "arrow_shard": Reader(make_data, SHARD, damaged_bytes, read_data),
    "described_shard": Reader(make_data, SHARD, damaged_bytes, read_described_shard),
    "npy": Reader(make_npy, "train.npy", damaged_bytes, read_token_files),
    "llmc_bin": Reader(make_llmc, "train.bin", damaged_bytes, read_token_files),
    "nanogpt_bin": Reader(make_nanogpt, "train.bin", damaged_bytes, read_token_files),
    "tokenizer_json": Reader(make_tokenizer, "tokenizer.json", damaged_json, read_tokenizer),
    "tokenizer_config": Reader(make_tokenizer, "tokenizer_config.json", damaged_json, read_tokenizer),
    "json_lines": Reader(make_json_lines, "texts.jsonl", damaged_json_lines, read_texts),
    "parquet": Reader(make_parquet, "texts.parquet", damaged_bytes, read_texts),
    "text": Reader(make_text, "texts.txt", damaged_bytes, read_texts),
    "hellaswag_items": Reader(make_items, "items.jsonl", damaged_json_lines, read_items),
    "manifest": Reader(make_run, f"{CHECKPOINT}/manifest.json", damaged_json, read_manifest),
    "position": Reader(make_run, f"{CHECKPOINT}/position.json", damaged_json, read_position),
    "optimizer": Reader(make_run, f"{CHECKPOINT}/optimizer.pt", damaged_bytes, read_checkpoint),
    "rng": Reader(make_run, f"{CHECKPOINT}/rng.pt", damaged_bytes, read_checkpoint),
    "checkpoint_weights": Reader(make_run, f"{CHECKPOINT}/model.safetensors", damaged_bytes, read_checkpoint),
    "training_args": Reader(make_run, "run/training_args.yaml", damaged_yaml, read_other_run),
    "identity": Reader(make_finished_run, "run/identity.json", damaged_json, read_run),
    "metrics": Reader(make_run, "run/metrics.jsonl", damaged_json_lines, read_metrics_file),
    "model_card": Reader(make_model, "README.md", damaged_card, read_cards),
    "model_config": Reader(make_model, "config.json", damaged_json, read_model_config),
    "model_weights": Reader(make_model, "model.safetensors", damaged_bytes, read_model),
    "modeling_code": Reader(make_model, "modeling_gpt2scratch.py", damaged_bytes, read_published),
}


# Trying them


class Late(BaseException):
    """Not an Exception, which a reader may take for an error of the file."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Late(f"not done after {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def try_reader(name: str, examples: int, number: int = 0) -> dict[str, int]:
    """
    Damage the reader's file `examples` times.

    Returns:
        How often it was read, and how often refused.

    Raises:
        Exception: whatever else came of a damage, with the damaged content.
    """
    reader, outcomes = READERS[name], {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as temporary:
        valid = Path(temporary) / "valid"
        valid.mkdir()
        reader.make(valid)
        content = (valid / reader.file).read_bytes()
        place = Path(temporary) / "place"
        shutil.copytree(valid, place / "work", symlinks=True)
        reader.read(place / "work")  # what is not damaged is read

        before = peak_megabytes()

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            verbosity=Verbosity.quiet,  # it would print whole files
        )
        @given(reader.damage(content))
        def attempt(damaged: bytes) -> None:
            shutil.rmtree(place)
            shutil.copytree(valid, place / "work", symlinks=True)
            path = place / "work" / reader.file
            path.write_bytes(damaged)
            try:
                with time_limit(SECONDS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader.read(place / "work")
                outcomes["read"] += 1
            except UserError as error:
                lines = str(error).splitlines()
                assert len(lines) == len(error.problems) <= LINES, f"{len(lines)} lines: {error}"
                longest = max(map(len, lines), default=0)
                assert 0 < longest <= CHARACTERS, f"a line of {longest} characters"
                outcomes["refused"] += 1
            except (Exception, Late) as error:
                error.add_note(f"damaged: {damaged[:200]!r}{'...' if len(damaged) > 200 else ''}")
                raise
            assert peak_megabytes() - before < MEGABYTES, f"it took more than {MEGABYTES} MB"
            assert os.listdir(place) == ["work"], "something was written outside of the folder"

        attempt()
    return outcomes


def describe(error: BaseException) -> None:
    """Print an error, the last of our own lines that it came through, and the damage that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if "site-packages" not in each.filename and Path(each.filename) != Path(__file__)]
    place = f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "here"
    print(f"    {type(error).__name__} at {place}: {textwrap.shorten(str(error), 300)}")
    for note in getattr(error, "__notes__", []):
        print("       ", textwrap.shorten(note, 500), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="damages of each file")
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS), help="these files alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = []
    for name in args.only:
        started = time.monotonic()
        try:
            outcomes = try_reader(name, args.examples, args.seed)
            seconds = time.monotonic() - started
            print(f"{name}: {outcomes['read']} read, {outcomes['refused']} refused, {seconds:.0f} s", flush=True)
        except (Exception, Late) as error:
            failed.append(name)
            print(f"{name}: FAILED", flush=True)
            for each in getattr(error, "exceptions", [error]):
                describe(each)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    disable_progress_bar()
    main()
