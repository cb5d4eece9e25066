"""What a run trains on: data folders, borrowed token files and mixtures, all checked before a row is used."""

import itertools
import json
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import TINY, make_documents, metrics, script, succeed
from support.processes import run_ranks
from support.tiny_models import randomise, stock_model_with_the_weights_of, tiny_model
from transformers import AutoTokenizer

from pretraining.data import data_folder
from pretraining.data.data_folder import open_data_folder
from pretraining.data.packed_rows import document_positions
from pretraining.data.row_order import ROWS_PER_ROUND, RowOrder, SourceOrder
from pretraining.data.training_data import open_packed
from pretraining.errors import UserError
from pretraining.text.sources import Source

FLAGS = ("--config_overrides", TINY, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--max_steps", 6)


def train(output_dir, *arguments):
    return script("train_accelerate.py", "--output_dir", output_dir, *FLAGS, *arguments)


def losses(run_dir) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in metrics(run_dir)]


def all_rows(dataset) -> np.ndarray:
    return dataset.__getitems__(list(range(len(dataset)))).numpy()


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory, corpus_file):
    """The session's corpus, tokenizer and rows, in shards of 20 rows."""
    folder = tmp_path_factory.mktemp("small") / "data"
    flags = ("--train_file", corpus_file, "--tokenizer_vocab_size", 320, "--block_size", 32, "--shard_tokens", 640)
    succeed(script("prepare_data.py", "--output_dir", folder, *flags))
    return folder


# What is on the disk


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def swap_with_another(path):
    other = path.with_name("shard-00004.arrow")
    content, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(content)


DAMAGES = {
    "bit-flipped": (flip_a_bit, r"shard-00003.arrow is damaged: its sha256 is [0-9a-f]{64}, dataset.json has"),
    "swapped": (swap_with_another, r"shard-00003.arrow is damaged: its sha256 is [0-9a-f]{64}, dataset.json has"),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        r"shard-00003.arrow is damaged: it has \d+ bytes, dataset.json has \d+",
    ),
    "empty": (
        lambda path: path.write_bytes(b""),
        r"shard-00003.arrow is damaged: it has 0 bytes, dataset.json has \d+",
    ),
    "missing": (lambda path: path.unlink(), r"shard-00003.arrow is missing: dataset.json lists it"),
    "of another version": (
        lambda path: rewrite_description(path, format_version=7),
        r"dataset.json has format version 7, this program reads 1",
    ),
    "of another row length": (
        lambda path: rewrite_description(path, block_size=64),
        r"shard-00000.arrow has 20 rows of 32 tokens of type uint16, dataset.json has 20 rows of 64 tokens",
    ),
    "of another tokenizer": (
        lambda path: change_tokenizer(path.parent.parent / "tokenizer"),
        r"was made with a tokenizer of the fingerprint [0-9a-f]{16}..., the one to be used has [0-9a-f]{16}...",
    ),
}


def rewrite_description(path, **changes):
    description = path.parent.parent / "dataset.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | changes))


def change_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["snowman ☃"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_data_folder_stops_the_run_before_a_row_is_used(damage, message, small_shards, tmp_path):
    shutil.copytree(small_shards, tmp_path / "data")
    damage(tmp_path / "data/train/shard-00003.arrow")
    with pytest.raises(UserError, match=message):
        open_packed([Source(data_dir=str(tmp_path / "data"))], None, None, PartialState(cpu=True))


def tell_reads() -> None:
    """Have a process say which shards it reads through."""
    read = data_folder.sha256_of

    def told(path):
        sys.stdout.write(f"reads {path.name}\n")  # in one piece: several threads do
        return read(path)

    data_folder.sha256_of = told


def test_every_shard_is_read_once_on_a_machine_whatever_the_number_of_processes(small_shards, tmp_path):
    flags = ("--data_dir", small_shards, "--output_dir", tmp_path / "run", *FLAGS)
    results = run_ranks(2, "train_accelerate.py", *flags, faults={0: tell_reads, 1: tell_reads})
    first, second = (
        [line for line in succeed(each).stdout.splitlines() if line.startswith("reads ")] for each in results
    )
    assert sorted(first) == sorted(f"reads {path.name}" for path in small_shards.rglob("*.arrow")) and not second

    shutil.copytree(small_shards, tmp_path / "data")
    flip_a_bit(tmp_path / "data/train/shard-00003.arrow")
    flags = (*flags, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "no")
    results = run_ranks(2, "train_accelerate.py", *flags)
    assert [result.returncode for result in results] == [2, 2]
    assert (results[0].stderr + results[1].stderr).count("shard-00003.arrow is damaged: its sha256 is") == 1
    assert not (tmp_path / "no").exists()


def look_elsewhere() -> None:
    sys.argv[sys.argv.index("--data_dir") + 1] = "nowhere"


def test_a_folder_that_one_process_alone_cannot_read_is_told_and_ends_all(small_shards, tmp_path):
    flags = ("--data_dir", small_shards, "--output_dir", tmp_path / "run", *FLAGS)
    results = run_ranks(2, "train_accelerate.py", *flags, faults={1: look_elsewhere})
    assert [result.returncode for result in results] == [2, 2]
    assert results[0].stderr.count("error: nowhere is not a data folder") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"splits": None},
        {"splits": {"train": {"shards": []}}},
        {"tokenizer": {"vocab_size": 320}},
        {"block_size": "32"},
        {"source": {}},
    ],
)
def test_a_damaged_description_is_one_line(change, small_shards, tmp_path):
    shutil.copytree(small_shards, tmp_path / "data")
    rewrite_description(tmp_path / "data/train/shard-00003.arrow", **change)
    with pytest.raises(UserError, match=r"dataset.json is damaged"):
        open_data_folder(tmp_path / "data")


def test_rows_of_many_small_files_are_those_of_one_large(small_shards, data_dir):
    small, large = open_data_folder(small_shards), open_data_folder(data_dir)
    assert len(list((small_shards / "train").iterdir())) > 5 and len(list((data_dir / "train").iterdir())) == 1
    assert np.array_equal(all_rows(small.train), all_rows(large.train))
    indices = np.random.default_rng(0).integers(len(small.train), size=100).tolist()
    assert torch.equal(small.train.__getitems__(indices), large.train.__getitems__(indices))
    assert small.check() == large.check() == []
    for outside in (-1, len(small.train)):
        with pytest.raises(IndexError):
            small.train[outside]


# Token files of other projects


def write_npy(path, ids):
    np.save(path.with_suffix(".npy"), ids)


def write_llmc(path, ids, version=1):
    header = struct.pack("<256i", 20240520, version, len(ids), *[0] * 253)
    path.with_suffix(".bin").write_bytes(header + ids.astype("<u2").tobytes())


def write_nanogpt(path, ids):
    ids.astype(np.uint16).tofile(path.with_suffix(".bin"))


WRITERS = {
    "build-nanogpt": (write_npy, ["edufineweb_train_000001", "edufineweb_train_000002"], "edufineweb_val_000000"),
    "llm.c": (write_llmc, ["fineweb_train_000001", "fineweb_train_000002"], "fineweb_val_000000"),
    "nanoGPT": (write_nanogpt, ["train"], "val"),
}


@pytest.fixture(params=WRITERS)
def borrowed(request, small_shards, tmp_path):
    """The rows of the session's data folder, as another project would have written them."""
    write, train_names, validation_name = WRITERS[request.param]
    folder = tmp_path / "borrowed"
    folder.mkdir()
    data = open_data_folder(small_shards)
    for name, rows in zip(train_names, np.array_split(all_rows(data.train), len(train_names)), strict=True):
        write(folder / name, np.append(rows.reshape(-1), [1, 2, 3]).astype(np.uint16))  # and an incomplete row
    write(folder / validation_name, all_rows(data.validation).reshape(-1))
    return folder


def test_token_files_of_other_projects_train_as_the_same_rows_do_in_a_data_folder(borrowed, small_shards, tmp_path):
    flags = ("--data_dir", borrowed, "--tokenizer_name", small_shards / "tokenizer", "--block_size", 32)
    succeed(train(tmp_path / "borrowed-run", *flags))
    succeed(train(tmp_path / "own-run", "--data_dir", small_shards))
    own, other = metrics(tmp_path / "own-run"), metrics(tmp_path / "borrowed-run")
    assert [line["loss"] for line in own if "loss" in line] == [line["loss"] for line in other if "loss" in line]
    # Rows of validation begin with the last token of the one before, so that a token more of each is predicted.
    assert other[-1]["eval_loss"] == pytest.approx(own[-1]["eval_loss"], rel=0.01)
    assert other[-1]["eval_loss"] != own[-1]["eval_loss"]
    # Bytes are counted from the tokens; a data folder's are those of the whole text, with the dropped tail.
    assert other[-1]["eval_bits_per_byte"] == pytest.approx(own[-1]["eval_bits_per_byte"], rel=0.02)
    assert "files, " in (tmp_path / "borrowed-run/README.md").read_text()


def damage_borrowed(folder, kind):
    path = sorted(path for path in folder.iterdir() if "train" in path.name)[-1]
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        content = path.read_bytes()
        path.write_bytes(content[:-200] + struct.pack("<H", 60_000) + content[-198:])
    elif kind == "without validation":
        for path in folder.glob("*val*"):
            path.unlink()
    return path.name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "{name} "),
        ("empty", "{name} "),
        ("foreign", "{name} has the token id 60000, where the tokenizer"),
        ("without validation", "has no .npy or .bin file with 'val' in its name"),
    ],
)
def test_damaged_token_files_are_refused_by_name(kind, message, borrowed, small_shards):
    name = damage_borrowed(borrowed, kind)
    with pytest.raises(UserError, match=message.replace("{name}", name)) as error:
        open_borrowed(borrowed, small_shards)
    assert len(error.value.problems) == 1


def open_borrowed(folder, small_shards):
    source = Source(data_dir=str(folder))
    return open_packed([source], str(small_shards / "tokenizer"), 32, PartialState(cpu=True))


def test_a_token_file_of_another_version_and_one_without_a_tokenizer_are_refused(small_shards, tmp_path):
    for name in ("train", "val"):
        write_llmc(tmp_path / name, np.arange(100), version=2)
    with pytest.raises(UserError, match=r"train.bin is of llm.c's version 2, this program reads version 1"):
        open_borrowed(tmp_path, small_shards)
    result = train(tmp_path / "run", "--data_dir", tmp_path)
    assert result.returncode == 2
    assert "holds token files without a tokenizer" in result.stderr
    assert not (tmp_path / "run").exists()


# Mixtures


def test_a_schedule_is_a_pure_function_of_the_place_and_keeps_the_weights():
    schedule = SourceOrder([3, 1, 6], seed=[5])
    places = np.arange(5 * ROWS_PER_ROUND)
    sources, numbers = schedule.locate(places)
    for source, share in enumerate((0.3, 0.1, 0.6)):
        assert abs((sources == source).mean() - share) < 1 / ROWS_PER_ROUND
        assert numbers[sources == source].tolist() == list(range((sources == source).sum()))
    shuffled = np.random.default_rng(0).permutation(places)
    again = SourceOrder([3, 1, 6], seed=[5]).locate(shuffled)
    assert np.array_equal(again[0], sources[shuffled]) and np.array_equal(again[1], numbers[shuffled])
    assert not np.array_equal(SourceOrder([3, 1, 6], seed=[6]).locate(places)[0], sources)
    assert not np.array_equal(sources[:ROWS_PER_ROUND], sources[ROWS_PER_ROUND : 2 * ROWS_PER_ROUND])
    with pytest.raises(UserError, match=r"a weight of 0.0001 of 1.0001 is too small: 1 in 1024 at least"):
        SourceOrder([0.0001, 1], seed=[0])


def test_a_mixture_takes_each_source_by_its_weight_and_each_of_its_rows_once_an_epoch():
    order = RowOrder([100, 300], batch_size=16, seed=1, weights=[1, 1])
    rows = np.array([row for step in range(64) for row in order.rows(step, 0)])
    assert ((rows < 100).sum(), (rows >= 100).sum()) == (512, 512)
    first = rows[rows < 100]
    for epoch in range(5):
        assert sorted(first[epoch * 100 :][:100]) == list(range(100))
    assert sorted(rows[rows >= 100][:300]) == list(range(100, 400))
    halves = [RowOrder([100, 300], 4, 2, 2, rank, seed=1, weights=[1, 1]) for rank in range(2)]
    for step in (40, 0, 63):
        together = [row for micro_step in range(2) for half in halves for row in half.rows(step, micro_step)]
        assert together == order.rows(step, 0)


def test_a_recipe_mixes_several_folders(small_shards, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(60, seed=8)))
    flags = ("--train_file", other, "--tokenizer_name", small_shards / "tokenizer", "--block_size", 32)
    succeed(script("prepare_data.py", "--output_dir", tmp_path / "other", *flags))
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "mixture": [{"data_dir": str(small_shards), "weight": 3}, {"data_dir": str(tmp_path / "other")}],
        "config_overrides": TINY,
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeed(script("train_accelerate.py", "--config", tmp_path / "recipe.yaml"))
    card = (tmp_path / "run/README.md").read_text()
    assert "| data | 75.0% of the rows: documents.jsonl" in card and "| data | 25.0% of the rows: other.jsonl" in card
    # What a run writes down repeats it, and goes on from a checkpoint of it; other weights do not.
    (tmp_path / "run/model.safetensors").unlink()
    log = losses(tmp_path / "run")
    again = ("train_accelerate.py", "--config", tmp_path / "run/training_args.yaml")
    assert "continuing from" in succeed(script(*again)).stdout
    assert losses(tmp_path / "run") == log
    (tmp_path / "run/model.safetensors").unlink()
    weights = (f"{{data_dir: {small_shards}, weight: 2}}", f"{{data_dir: {tmp_path / 'other'}}}")
    assert "is of other data" in script(*again, "--mixture", *weights).stderr


def test_folders_that_do_not_fit_together_are_no_mixture(small_shards, tmp_path):
    shutil.copytree(small_shards, tmp_path / "misfit")
    description = tmp_path / "misfit/dataset.json"
    description.write_text(description.read_text().replace('"fingerprint": "', '"fingerprint": "other'))
    sources = [Source(data_dir=str(small_shards)), Source(data_dir=str(tmp_path / "misfit"))]
    with pytest.raises(UserError, match=r"misfit was made with a tokenizer of the fingerprint other") as error:
        open_packed(sources, None, 16, PartialState(cpu=True))
    assert any("the rows of" in problem and "have 32 tokens" in problem for problem in error.value.problems)


# Documents in a row


def test_document_positions_start_again_at_each_end_of_text():
    ids = torch.tensor([[5, 6, 0, 7, 8, 0, 0, 9], [0, 5, 5, 5, 5, 5, 5, 0]])
    assert document_positions(ids, 0).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]


def loss_of_documents_alone(stock, rows) -> float:
    """Each document by itself, from position 0, with the first token of the next one as its last target."""
    losses = []
    for row in rows:
        starts = [0, *(index for index in range(1, len(row)) if row[index] == 0), len(row)]
        for start, end in itertools.pairwise(starts):
            targets = row[start + 1 : end + 1]
            if not len(targets):
                continue  # the row ends with the first token of a document
            logits = stock(row[start : start + len(targets)][None]).logits[0]
            losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    assert len(losses) == len(rows) * 31
    return np.mean(losses)


@torch.no_grad()
def test_document_attention_trains_and_evaluates_each_document_as_if_it_were_alone(small_shards, tmp_path):
    functions = [{"text": text} for document in make_documents(20, seed=7) for text in document.split("\n\n")]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(function) + "\n" for function in functions))
    flags = ("--train_file", tmp_path / "short.jsonl", "--tokenizer_name", small_shards / "tokenizer")
    succeed(script("prepare_data.py", "--output_dir", tmp_path / "data", "--block_size", 32, *flags))
    model = tiny_model(vocab_size=320, n_positions=32)
    randomise(model)
    stock = stock_model_with_the_weights_of(model, vocab_size=320, n_positions=32)
    model.save_pretrained(tmp_path / "model")
    flags = ("--data_dir", tmp_path / "data", "--model_name_or_path", tmp_path / "model", "--max_steps", 1)
    flags += ("--learning_rate", 0, "--per_device_train_batch_size", 16)
    succeed(script("train_accelerate.py", "--output_dir", tmp_path / "apart", *flags, "--document_attention"))
    succeed(script("train_accelerate.py", "--output_dir", tmp_path / "together", *flags))
    data = open_data_folder(tmp_path / "data")
    rows = data.train.__getitems__(RowOrder([len(data.train)], 16, seed=42).rows(0, 0)).long()
    assert (rows[:, 1:] == 0).sum() > len(rows)  # documents end within rows
    validation = data.validation.__getitems__(list(range(len(data.validation)))).long()
    expected = [loss_of_documents_alone(stock, rows), loss_of_documents_alone(stock, validation)]
    assert losses(tmp_path / "apart") == pytest.approx(expected, rel=1e-5)
    assert losses(tmp_path / "together") != pytest.approx(expected, rel=1e-3)
