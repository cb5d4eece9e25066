"""Streams: every document once an epoch, an order of its own in each, and a position to go on from to the bit."""

import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from conftest import TINY, make_documents, metrics, succeed
from safetensors.torch import load_file
from support.processes import run_ranks

from pretraining.cli import parse_arguments
from pretraining.data.row_order import StepSplit
from pretraining.data.streaming import RowStream, open_streams
from pretraining.errors import UserError
from pretraining.text import documents
from pretraining.text.documents import local_corpus
from pretraining.text.sources import Source
from pretraining.text.validation_split import is_for_validation
from pretraining.tokenization.tokenizer import load_tokenizer, train_tokenizer
from pretraining.training.flags import TrainArguments
from pretraining.training.setup import open_data

BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(make_documents(50), 320).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents as one file of JSON lines, and others as three Parquet files of several row groups each."""
    folder = tmp_path_factory.mktemp("texts")
    documents = make_documents(60, seed=1)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for index in range(3):
        table = pa.table({"id": range(25), "text": make_documents(25, seed=10 + index)})
        pq.write_table(table, folder / f"part-{index}.parquet", row_group_size=6)
    return folder


@pytest.fixture(autouse=True)
def short_reads(monkeypatch):
    """A file is then several reads long, though it is short."""
    monkeypatch.setattr(documents, "ROWS_PER_READ", 8)


def parquet_documents() -> list[str]:
    return [text for index in range(3) for text in make_documents(25, seed=10 + index)]


def open_texts(texts, tokenizer_dir):
    sources = [Source(train_file=f"{texts}/lines.jsonl"), Source(train_file=f"{texts}/*.parquet", weight=2)]
    return open_streams(sources, tokenizer_dir, BLOCK_SIZE, validation_split_percentage=5)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_continued_from_any_position_gives_the_rows_of_an_uninterrupted_one(
    num_processes, num_workers, texts, tokenizer_dir
):
    data = open_texts(texts, tokenizer_dir)
    length = 500 // num_processes  # more than an epoch of either source
    for process in range(num_processes):
        split = StepSplit(8, 1, num_processes, process, num_workers)
        stream = data.batches(split, seed=7, first_step=0, position=None)
        batches, positions = [], []
        for _ in range(length):
            positions.append(json.dumps(stream.position()))
            batches.append(next(stream))
        assert json.loads(positions[-1])["consumers"][0]["sources"][0]["epoch"] >= 1, positions[-1]
        for start in random.Random(0).sample(range(length - 10), 50 // num_processes):
            continued = data.batches(split, seed=7, first_step=0, position=json.loads(positions[start]))
            for offset in range(10):
                assert torch.equal(next(continued), batches[start + offset]), (start, offset)


def epoch_of_documents(corpus, tokenizer, shares, epoch, seed=0, held_out=5) -> list[list[str]]:
    """What each share's stream reads in one epoch, decoded from its rows."""
    read = []
    for index in range(shares):
        rows = RowStream(corpus, tokenizer, 1, held_out, (index, shares), seed, None)
        ids, wanted = [], epoch + 1
        while rows.position()["epoch"] < wanted:
            token = next(rows)[0]
            if rows.position()["epoch"] == epoch:
                ids.append(token)
        read.append(tokenizer.decode(ids).split(tokenizer.eos_token)[:-1])
    return read


@pytest.mark.parametrize("shares", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("pattern", ["lines.jsonl", "*.parquet"])
def test_shares_read_every_document_once_an_epoch_but_those_for_validation(pattern, shares, texts, tokenizer_dir):
    documents = make_documents(60, seed=1) if pattern == "lines.jsonl" else parquet_documents()
    corpus, tokenizer = local_corpus(f"{texts}/{pattern}"), load_tokenizer(tokenizer_dir)
    expected = sorted(text for text in documents if not is_for_validation(text, 5))
    assert len(documents) * 0.85 < len(expected) < len(documents)
    for epoch in (0, 1):
        read = epoch_of_documents(corpus, tokenizer, shares, epoch)
        assert sorted(text for share in read for text in share) == expected
        assert all(len(share) > 0 for share in read)


def test_the_order_of_files_is_another_in_every_epoch_and_for_every_seed(texts, tokenizer_dir):
    corpus, tokenizer = local_corpus(f"{texts}/*.parquet"), load_tokenizer(tokenizer_dir)
    orders = {
        (epoch, seed): tuple(epoch_of_documents(corpus, tokenizer, 1, epoch, seed)[0])
        for epoch in range(3)
        for seed in range(2)
    }
    assert len({orders[epoch, 0] for epoch in range(3)}) > 1
    assert len({orders[0, seed] for seed in range(2)}) > 1
    assert orders[0, 0] == tuple(epoch_of_documents(corpus, tokenizer, 1, 0, 0)[0])


def test_rows_are_the_documents_end_to_end_with_nothing_lost_between_reads(texts, tokenizer_dir):
    corpus, tokenizer = local_corpus(f"{texts}/lines.jsonl"), load_tokenizer(tokenizer_dir)
    rows = RowStream(corpus, tokenizer, BLOCK_SIZE, 0, (0, 1), 0, None)
    text = tokenizer.decode([token for _ in range(2000) for token in next(rows)])
    once = "".join(document + tokenizer.eos_token for document in make_documents(60, seed=1))
    assert len(text) > 2 * len(once)
    assert text == (once * 4)[: len(text)]


def test_the_mixture_has_the_weights_that_were_given(texts, tokenizer_dir):
    data = open_texts(texts, tokenizer_dir)
    stream = data.batches(StepSplit(8, 1, 1, 0, 0), seed=7, first_step=0, position=None)
    for _ in range(128):
        next(stream)
    first, second = stream.position()["consumers"][0]["sources"]
    assert data.sources[1]["share"] == pytest.approx(2 / 3)
    rows = [0, 0]
    for index, source in enumerate((first, second)):
        corpus = data.stream["corpora"][index]
        again = RowStream(corpus, data.tokenizer, BLOCK_SIZE, 5, (0, 1), 7, None)
        while again.position() != source:
            next(again)
            rows[index] += 1
    assert sum(rows) == 1024
    assert abs(rows[1] - 1024 * 2 / 3) <= 1


def test_validation_documents_are_kept_back_wherever_they_are(texts, tokenizer_dir):
    data = open_texts(texts, tokenizer_dir)
    documents = [*make_documents(60, seed=1), *parquet_documents()]
    expected = [text for text in documents if is_for_validation(text, 5)]
    ids = torch.cat([data.validation[row].long() for row in range(len(data.validation))])
    assert (
        data.tokenizer.decode(ids)
        == "".join(text + data.tokenizer.eos_token for text in expected)[: len(data.tokenizer.decode(ids))]
    )
    assert data.validation.statistics["documents"] == len(expected)
    assert data.validation.statistics["bytes"] == sum(len(text.encode()) for text in expected)


def test_a_share_without_text_is_an_error_and_not_an_endless_wait(tmp_path, tokenizer_dir):
    (tmp_path / "one.jsonl").write_text('{"text": "one document"}\n')
    corpus = local_corpus(f"{tmp_path}/one.jsonl")
    rows = RowStream(corpus, load_tokenizer(tokenizer_dir), BLOCK_SIZE, 0, (1, 2), 0, None)
    with pytest.raises(UserError, match=r"one.jsonl has no text for one of 2 processes and workers: use fewer"):
        next(rows)


def test_a_reading_that_goes_on_at_rows_without_the_column_passes_over_them_as_it_would_have(tmp_path):
    lines = [{"title": f"{n}"} if 192 <= n < 384 else {"text": f"document {n}"} for n in range(576)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = local_corpus(f"{tmp_path}/lines.jsonl")
    reading = corpus.batches()
    while "document 191" not in next(reading):
        pass
    state = corpus.state_dict()
    going_on = local_corpus(f"{tmp_path}/lines.jsonl")
    going_on.load_state_dict(state)
    rest = list(going_on.batches())
    assert rest[0] == [] and rest == list(reading)
    assert [text for texts in rest for text in texts] == [f"document {n}" for n in range(384, 576)]


def stream_flags(texts, tokenizer_dir, output_dir, *arguments):
    flags = ("--streaming", "--tokenizer_name", tokenizer_dir, "--block_size", BLOCK_SIZE, "--output_dir", output_dir)
    flags += ("--train_file", f"{texts}/*.parquet", "--config_overrides", TINY + ",resid_pdrop=0.1")
    flags += ("--per_device_train_batch_size", 4, "--max_steps", 12, "--save_steps", 6, "--logging_steps", 1)
    return (*flags, *arguments)


def timeless(run_dir) -> list[dict]:
    return [{key: line[key] for key in line if "second" not in key} for line in metrics(run_dir)]


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 2), (2, 0)])
def test_training_on_a_stream_resumes_bitwise(num_processes, num_workers, texts, tokenizer_dir, tmp_path):
    arguments = ("--gradient_accumulation_steps", 2, "--dataloader_num_workers", num_workers)
    if num_processes > 1:  # far enough for each to be at another document
        arguments += ("--per_device_train_batch_size", 128)
    flags = stream_flags(texts, tokenizer_dir, tmp_path / "run", *arguments)
    succeed(run_ranks(num_processes, "train_accelerate.py", *flags)[0])
    whole, log = load_file(tmp_path / "run/model.safetensors"), timeless(tmp_path / "run")
    streams = json.loads((tmp_path / "run/checkpoint-000006/position.json").read_text())["streams"]
    assert len(streams) == num_processes and (num_processes == 1 or streams[0] != streams[1])
    assert log[-2]["loss"] < log[0]["loss"] and "eval_bits_per_byte" in log[-1]
    assert "3 files, part-0.parquet to part-2.parquet" in (tmp_path / "run/README.md").read_text()
    (tmp_path / "run/model.safetensors").unlink()  # as if it had been killed before the end

    assert "continuing from" in succeed(run_ranks(num_processes, "train_accelerate.py", *flags)[0]).stdout
    continued = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert timeless(tmp_path / "run") == log

    if num_workers:
        (tmp_path / "run/model.safetensors").unlink()
        refused = run_ranks(num_processes, "train_accelerate.py", *flags, "--dataloader_num_workers", 1)[0]
        assert refused.returncode == 2
        assert "a stream with dataloader_num_workers 2, not 1: it has to stay" in refused.stderr


def test_a_stream_that_cannot_be_read_stops_the_run_in_one_line_of_the_process_that_found_it(
    texts, tokenizer_dir, tmp_path
):
    shutil.copytree(texts, tmp_path / "texts")
    with open(tmp_path / "texts/lines.jsonl", "a") as file:
        file.write('{"text": \n')
    flags = stream_flags(tmp_path / "texts", tokenizer_dir, tmp_path / "run", "--max_steps", 1000)
    flags += ("--train_file", tmp_path / "texts/lines.jsonl", "--validation_file", texts / "lines.jsonl")
    results = run_ranks(2, "train_accelerate.py", *flags, "--dataloader_num_workers", 1)
    assert all(result.returncode in (1, 2) for result in results)
    said = "".join(result.stderr for result in results)
    assert "error: lines.jsonl cannot be read: line 61 of lines.jsonl is not JSON" in said
    assert "DataLoader worker" not in said


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--streaming", "--train_file", "{texts}/lines.jsonl"], ["--streaming needs a --tokenizer_name"]),
        (["--train_file", "{texts}/lines.jsonl"], ["--train_file is text: add --streaming, or pack it first"]),
        (["--streaming", "--data_dir", "data"], ["--data_dir data is packed already", "needs a --tokenizer_name"]),
        (["--data_dir", "a", "--dataset_name", "b"], ["give one of --data_dir, --dataset_name and --train_file"]),
        ([], ["give one of --data_dir, --dataset_name and --train_file"]),
        (
            ["--mixture", "{data_dir: a, weigth: 1}", "{data_dir: ", "a", "--data_dir", "b"],
            [
                "leave --data_dir, --dataset_name and --train_file out",
                "a source has no 'weigth', did you mean weight?",
                "not valid YAML",
                "each source is a mapping",
            ],
        ),
        (
            ["--mixture", "{data_dir: a, weight: 0}", "{data_dir: b, dataset_revision: c}"],
            ["the weight of a must be a number above 0, got 0", "--dataset_config_name and --dataset_revision need"],
        ),
        (
            "--streaming --tokenizer_name {tokenizer} --train_file {texts}/lines.jsonl --block_size 9000".split(),
            ["less than one row of --block_size 9000"],
        ),
        (
            ["--streaming", "--tokenizer_name", "{tokenizer}", "--dataset_name", "nobody/nothing"],
            ["--dataset_name nobody/nothing cannot be loaded"],
        ),
    ],
)
def test_bad_input_is_named(arguments, messages, texts, tokenizer_dir, tmp_path):
    places = {"{texts}": str(texts), "{tokenizer}": tokenizer_dir}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    with pytest.raises(UserError) as error:
        arguments = parse_arguments(TrainArguments, "", ["--output_dir", str(tmp_path / "run"), *arguments])
        open_data(arguments, PartialState(cpu=True))
    problems = error.value.problems
    assert len(problems) == len(messages), problems
    for message in messages:
        assert any(message in problem for problem in problems), problems
