"""Packed shards: nothing lost, nothing doubled, the same bytes every time; and the order in which rows are read."""

import gzip
import hashlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, make_documents, run, script, succeed
from datasets import Dataset
from support.processes import Running, start, wait_until
from transformers import AutoTokenizer

import prepare_data
from pretraining.data.data_folder import open_data_folder
from pretraining.data.packing import ShardWriter
from pretraining.data.row_order import RowOrder
from pretraining.errors import UserError
from pretraining.text.validation_split import split_documents
from pretraining.tokenization.tokenizer import load_tokenizer, train_tokenizer


def read_rows(data_dir, split) -> np.ndarray:
    """All rows of a split in order, read with `datasets` rather than with our own reader."""
    info = json.loads((data_dir / "dataset.json").read_text())
    shards = [Dataset.from_file(str(data_dir / shard["file"])) for shard in info["splits"][split]["shards"]]
    return np.concatenate([np.array(shard["input_ids"]) for shard in shards])


def decoded_documents(data_dir, split) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    ids = read_rows(data_dir, split).reshape(-1)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    starts = [0, *(ends + 1)]
    return [tokenizer.decode(ids[start:end]) for start, end in zip(starts, [*ends, len(ids)], strict=True)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = make_documents(60, seed=1)
    documents[7] = "a text about <|endoftext|>, which is only a word here"
    documents[11] = "line ends\r\nare kept\r, and so are 日本語 and 🤗"
    documents[20] = "".join(make_documents(40, seed=2))  # longer than several shards
    return documents


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_bytes(text.encode())
    return folder


def prepare(text_folder, output_dir, *arguments):
    flags = ("--tokenizer_vocab_size", 400, "--block_size", 64, "--shard_tokens", 4000, *arguments)
    return script("prepare_data.py", "--train_file", f"{text_folder}/*.txt", "--output_dir", output_dir, *flags)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, text_folder):
    folder = tmp_path_factory.mktemp("packed") / "data"
    succeed(prepare(text_folder, folder))
    return folder


def test_the_rows_decode_to_the_documents_in_order_less_the_counted_tail(packed, texts):
    info = json.loads((packed / "dataset.json").read_text())
    expected = {"train": [], "validation": []}
    for split, text in split_documents(texts, percentage=5, seed=42):
        expected[split].append(text)
    assert sorted(expected["train"] + expected["validation"]) == sorted(texts)
    assert len(info["splits"]["train"]["shards"]) > 3
    for split, documents in expected.items():
        statistics = info["splits"][split]
        assert statistics["documents"] == len(documents)
        assert statistics["bytes"] == sum(len(document.encode()) for document in documents)
        assert statistics["tokens"] == statistics["rows"] * 64 + statistics["dropped_tokens"]
        found = decoded_documents(packed, split)
        assert found[:-1] == documents[: len(found) - 1]
        assert documents[len(found) - 1].startswith(found[-1])
        assert len(documents) - len(found) <= statistics["dropped_tokens"]


def write_documents(folder, form: str, documents: list[bytes | None]) -> str:
    """As one of the kinds of file that can be read, bytes that are not UTF-8 and all. Returns the glob for them."""
    folder.mkdir()
    if form == "txt":
        for index, document in enumerate(documents):
            (folder / f"{index:04d}.txt").write_bytes(document or b"")
    elif form == "jsonl":
        with open(folder / "documents.jsonl", "wb") as file:
            for index, document in enumerate(documents):
                text = b"null" if document is None else b'"' + document.replace(b"\n", b"\\n") + b'"'
                file.write(b'{"id": %d, "text": %s}\n' % (index, text))
    else:
        # pa.array(type=pa.string()) would refuse what is not UTF-8; files in the wild hold it all the same.
        column = pa.array(documents, pa.binary())
        column = pa.Array.from_buffers(pa.string(), len(column), column.buffers())
        table = pa.table({"id": range(len(documents)), "text": column})
        pq.write_table(table, folder / "documents.parquet", row_group_size=30)
    return f"{folder}/*.{form}"


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
def test_null_empty_and_invalid_documents_are_counted_and_the_rest_is_kept_byte_for_byte(form, tmp_path):
    documents = [text.encode() for text in make_documents(150, seed=1)]
    documents[3] = documents[77] = b""
    documents[4] = documents[78] = documents[79] = None
    documents[10] = b"not \xff UTF-8 \xe6\x97\n" * 4
    documents[100] = "\ufffd was there before".encode()
    documents[101] = "<|endoftext|> is a word, 日本語 and 🤗 are others".encode()
    documents[102] = b"".join(documents[20:70])  # longer than several shards
    pattern = write_documents(tmp_path / "texts", form, documents)
    flags = ("--tokenizer_vocab_size", 400, "--block_size", 64, "--shard_tokens", 4000)
    succeed(script("prepare_data.py", "--train_file", pattern, "--output_dir", tmp_path / "data", *flags))
    info = json.loads((tmp_path / "data/dataset.json").read_text())
    assert info["documents"] == {"without_text": 5, "with_invalid_utf8": 1}
    expected = {"train": [], "validation": []}
    for split, text in split_documents([text.decode(errors="replace") for text in documents if text], 5, 42):
        expected[split].append(text)
    for split, texts in expected.items():
        found = decoded_documents(tmp_path / "data", split)
        assert found[:-1] == texts[: len(found) - 1]
        assert texts[len(found) - 1].startswith(found[-1])
        assert sum(map(len, texts[len(found) :])) <= 64 * 8  # in the counted tail
        assert info["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)


MEASURE_MEMORY = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("megabytes:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_text(packed, tmp_path):
    megabytes = []
    for size in (5, 50):
        with open(tmp_path / f"{size}.jsonl", "w") as file:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in make_documents(1000, seed=size))
            for _ in range(size):
                file.write(lines)
        flags = ("--train_file", tmp_path / f"{size}.jsonl", "--tokenizer_name", packed / "tokenizer")
        command = (sys.executable, "-c", MEASURE_MEMORY, REPOSITORY / "prepare_data.py", *flags)
        result = succeed(run(*command, "--output_dir", tmp_path / str(size), cwd=tmp_path, PYTHONPATH=str(REPOSITORY)))
        megabytes.append(int(result.stdout.rsplit("megabytes: ", 1)[1]))
    assert (tmp_path / "50.jsonl").stat().st_size > 44e6
    assert megabytes[1] - megabytes[0] < 20, megabytes


def test_a_damaged_tokenizer_is_told_in_one_line(packed, tmp_path):
    shutil.copytree(packed / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer/tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(UserError, match=r"^the tokenizer .*tokenizer cannot be loaded: .*$"):
        load_tokenizer(tmp_path / "tokenizer")


def test_what_dataset_json_says_of_the_files_is_so(packed):
    info = json.loads((packed / "dataset.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(packed / "tokenizer")
    assert (info["format_version"], info["block_size"]) == (1, 64)
    assert info["tokenizer"]["vocab_size"] == len(tokenizer) == 400
    listed = {shard["file"]: shard for split in info["splits"].values() for shard in split["shards"]}
    assert set(listed) == {str(path.relative_to(packed)) for path in packed.glob("*/*.arrow")}
    for name, shard in listed.items():
        content = (packed / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    features = Dataset.from_file(str(packed / "train/shard-00000.arrow")).features["input_ids"]
    assert (features.feature.dtype, features.length) == ("uint16", 64)


def test_compressed_sizes_are_those_of_gzip_and_xz(packed, texts):
    text = "".join(text for split, text in split_documents(texts, percentage=5, seed=42) if split == "validation")
    sizes = json.loads((packed / "dataset.json").read_text())["splits"]["validation"]["compressed_bytes"]
    assert sizes["gzip -9"] == len(gzip.compress(text.encode(), compresslevel=9))
    assert sizes["xz -9"] == len(lzma.compress(text.encode(), preset=9))


def test_the_shards_are_byte_identical_for_any_num_proc(packed, text_folder, tmp_path):
    succeed(prepare(text_folder, tmp_path / "again", "--num_proc", 1))
    assert_same_files(packed, tmp_path / "again")


def assert_same_files(folder, other):
    names, others = (
        sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) for root in (folder, other)
    )
    assert names == others and len(names) >= 5
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_preparing_again_does_nothing_and_other_settings_are_refused(packed, text_folder):
    before = {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
    assert "already prepared" in succeed(prepare(text_folder, packed)).stdout
    refused = prepare(text_folder, packed, "--seed", 7)
    assert refused.returncode == 2
    assert "seed was 42, now 7" in refused.stderr
    assert before == {path: path.stat().st_mtime_ns for path in packed.rglob("*")}


def test_what_only_looks_the_same_is_prepared_anew(packed, text_folder, tmp_path, refuse):
    shutil.copytree(text_folder, tmp_path / "texts")
    for seed, name in enumerate(("one", "two")):
        train_tokenizer(make_documents(30, seed=seed), 300 + seed).save_pretrained(tmp_path / name / "same")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one/same")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["merges"].reverse()
    shutil.copytree(tmp_path / "one", tmp_path / "reversed")
    (tmp_path / "reversed/same/tokenizer.json").write_text(json.dumps(description))

    flags = ["--train_file", f"{tmp_path}/texts/*.txt", "--block_size", 64, "--output_dir", tmp_path / "data"]
    succeed(script("prepare_data.py", *flags, "--tokenizer_name", tmp_path / "one/same"))
    for other in ("two", "reversed"):
        lines = refuse(prepare_data, *flags, "--tokenizer_name", tmp_path / other / "same")
        assert "holds other data: tokenizer was" in lines[-1]
    edited = next((tmp_path / "texts").iterdir())
    edited.write_bytes(edited.read_bytes().replace(b"def", b"fed"))
    lines = refuse(prepare_data, *flags, "--tokenizer_name", tmp_path / "one/same")
    assert "holds other data: source was" in lines[-1]


def test_a_single_book_can_be_cut_short(packed, tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(make_documents(60, seed=5)))
    flags = ("--train_file", tmp_path / "book.txt", "--block_size", 64, "--max_train_tokens", 3000)
    flags += ("--tokenizer_name", packed / "tokenizer", "--output_dir", tmp_path / "data")
    succeed(script("prepare_data.py", *flags))
    assert json.loads((tmp_path / "data/dataset.json").read_text())["splits"]["validation"]["rows"] > 0


def start_preparing(tmp_path) -> Running:
    """A process that has begun to write and has a second of work before it."""
    book = tmp_path / "book.jsonl"
    if not book.exists():
        lines = [json.dumps({"text": text}) + "\n" for text in make_documents(400, seed=3)]
        book.write_text("".join(lines) * 15)
    flags = ("--tokenizer_vocab_size", 300, "--block_size", 64, "--shard_tokens", 100_000)
    running = start("prepare_data.py", "--output_dir", tmp_path / "data", "--train_file", book, *flags)
    wait_until((tmp_path / "data.incomplete/train/shard-00000.arrow").exists)
    assert running.process.is_alive()
    return running


def test_a_run_that_is_killed_half_way_leaves_nothing_that_looks_whole_and_its_repetition_is_no_other(tmp_path):
    killed = start_preparing(tmp_path)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait().returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    assert (tmp_path / "data.incomplete/train/shard-00000.arrow").exists()
    assert not (tmp_path / "data.incomplete/dataset.json").exists()
    (tmp_path / "data.incomplete/train/shard-00099.arrow").write_bytes(b"of the killed run")
    succeed(start_preparing(tmp_path).wait())
    assert not (tmp_path / "data.incomplete").exists()

    (tmp_path / "data").rename(tmp_path / "repeated")
    succeed(start_preparing(tmp_path).wait())
    assert_same_files(tmp_path / "data", tmp_path / "repeated")


def test_two_programs_do_not_write_one_folder_at_once_and_foreign_files_are_left_alone(tmp_path):
    first = start_preparing(tmp_path)
    os.kill(first.pid, signal.SIGSTOP)
    second = script("prepare_data.py", "--output_dir", tmp_path / "data", "--train_file", tmp_path / "book.jsonl")
    os.kill(first.pid, signal.SIGCONT)
    succeed(first.wait())
    assert second.returncode == 2
    assert "data is being written by another program" in second.stderr

    (tmp_path / "mine.incomplete").mkdir()
    (tmp_path / "mine.incomplete/thesis.txt").write_text("years of work")
    refused = script("prepare_data.py", "--output_dir", tmp_path / "mine", "--train_file", tmp_path / "book.jsonl")
    assert refused.returncode == 2
    assert "mine.incomplete holds thesis.txt, which is not of this program" in refused.stderr
    assert (tmp_path / "mine.incomplete/thesis.txt").read_text() == "years of work"


def test_one_document_is_cut_at_a_line_so_that_its_end_is_for_validation():
    text = "".join(f"line {number}\n" for number in range(1000))
    (name, validation), (_, train) = split_documents([text], percentage=10, seed=0)
    assert name == "validation"
    assert train + validation == text
    assert train.endswith("\n")
    assert len(validation) / len(text) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("percentage", [1, 3, 5, 50])
def test_a_fixed_share_of_the_documents_is_for_validation_whatever_comes_after_them(percentage):
    splits = [split for split, _ in split_documents(map(str, range(1000)), percentage, seed=42)]
    assert splits.count("validation") == 10 * percentage
    shorter = [split for split, _ in split_documents(map(str, range(500)), percentage, seed=42)]
    assert shorter == splits[:500]
    other_seed = [split for split, _ in split_documents(map(str, range(1000)), percentage, seed=43)]
    assert other_seed != splits


def test_a_given_validation_file_is_the_validation_text(text_folder, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    documents = make_documents(5, seed=9)
    held_out.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    succeed(prepare(text_folder, tmp_path / "data", "--validation_file", held_out))
    found = decoded_documents(tmp_path / "data", "validation")
    assert found[:4] == documents[:4]
    assert json.loads((tmp_path / "data/dataset.json").read_text())["splits"]["train"]["documents"] == 60


def test_max_train_tokens_stops_the_reading_at_the_same_document_on_any_number_of_cores(tmp_path):
    documents = [text for document in make_documents(3000, seed=6) for text in (document, None, "")]
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "documents.jsonl").write_text("".join(lines))
    flags = ("--train_file", tmp_path / "documents.jsonl", "--max_train_tokens", 30_000, "--block_size", 64)
    flags += ("--tokenizer_vocab_size", 400)
    for cores in (1, 4):
        output_dir = tmp_path / f"on-{cores}"
        succeed(script("prepare_data.py", "--output_dir", output_dir, "--num_proc", cores, *flags))
    assert_same_files(tmp_path / "on-1", tmp_path / "on-4")
    info = json.loads((tmp_path / "on-1/dataset.json").read_text())
    train, validation = info["splits"]["train"], info["splits"]["validation"]
    assert 30_000 <= train["tokens"] < 31_000
    read = train["documents"] + validation["documents"]
    assert 2 * (read - 1) <= info["documents"]["without_text"] <= 2 * read


def test_rows_are_read_as_they_were_written_across_shards(packed):
    dataset = open_data_folder(packed).train
    rows = read_rows(packed, "train")
    assert len(dataset) == len(rows)
    indices = list(np.random.default_rng(0).permutation(len(rows)))
    assert np.array_equal(dataset.__getitems__(indices).numpy(), rows[indices])
    assert np.array_equal(dataset[0].numpy(), rows[0])


def test_ids_beyond_65535_get_a_wider_type(tmp_path):
    writer = ShardWriter(tmp_path / "train", block_size=2, vocab_size=70_000, shard_tokens=100)
    writer.add(np.array([1, 69_999, 2, 3, 4], dtype="uint32"))
    assert writer.close() == 1
    assert Dataset.from_file(str(tmp_path / "train/shard-00000.arrow"))["input_ids"][:] == [[1, 69_999], [2, 3]]


def test_ids_are_never_cut_to_a_narrower_type(tmp_path):
    writer = ShardWriter(tmp_path / "train", block_size=2, vocab_size=60_000, shard_tokens=100)
    writer.add(np.array([1, 69_999], dtype="uint32"))
    with pytest.raises(TypeError, match="uint32"):
        writer.close()


def test_a_truncated_or_missing_shard_is_refused_by_name(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "data")
    shard = tmp_path / "data/train/shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard-00001.arrow is damaged: it has \d+ bytes, dataset.json has \d+"):
        open_data_folder(tmp_path / "data")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001.arrow is missing"):
        open_data_folder(tmp_path / "data")


@pytest.mark.parametrize(
    ("processes", "accumulation", "batch"), [(1, 1, 8), (2, 1, 4), (1, 4, 2), (4, 2, 1), (2, 2, 2)]
)
def test_a_step_reads_the_same_rows_however_the_global_batch_is_split(processes, accumulation, batch):
    orders = [RowOrder([50], batch, accumulation, processes, rank, seed=3) for rank in range(processes)]
    reference = RowOrder([50], 8, seed=3)
    for step in (0, 1, 6, 40, 3, 100):  # in any order: no step needs the ones before it
        rows = [row for micro in range(accumulation) for order in orders for row in order.rows(step, micro)]
        assert rows == reference.rows(step, 0)


def test_every_epoch_is_a_new_permutation_and_any_step_can_be_the_first():
    order = RowOrder(num_rows=[48], batch_size=4, seed=1)
    steps = iter(order)
    epochs = [[row for _ in range(12) for row in next(steps)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert next(iter(RowOrder(num_rows=[48], batch_size=4, seed=1, first_step=25))) == epochs[2][4:8]
    assert [row for _, row in zip(range(48), epochs[0], strict=True)] != list(range(48))
    other_seed = iter(RowOrder(num_rows=[48], batch_size=4, seed=2))
    assert [row for _ in range(12) for row in next(other_seed)] != epochs[0]


def test_the_embedded_corpus_is_the_standard_library_without_its_tests():
    from pretraining.text.documents import embedded_corpus

    corpus = embedded_corpus()
    documents = list(corpus)
    assert corpus.description["revision"] == ".".join(map(str, sys.version_info[:3]))
    for module in (json, lzma, subprocess):
        assert Path(module.__file__).read_text(encoding="utf-8") in documents
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in documents
    assert 5e6 < sum(map(len, documents)) <= corpus.size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "no/such/*.txt"], "no such file: no/such/*.txt"),
        (["--train_file", "{tmp}"], "{tmp} is a folder: give a pattern of files, in quotes, as '{tmp}/*.txt'"),
        (["--train_file", "{tmp}/binary.txt"], "binary.txt is no text in UTF-8"),
        (["--train_file", "{tmp}/utf-16.txt"], "utf-16.txt is no text in UTF-8"),
        (["--train_file", "{tmp}/empty.txt"], "no text found: {tmp}/empty.txt is empty"),
        (["--train_file", "{tmp}/empty.txt", "--tokenizer_name", "{tmp}"], "the tokenizer {tmp} cannot be loaded"),
        (
            ["--train_file", "{tmp}/short.txt", "--tokenizer_vocab_size", "300"],
            "less than one row of --block_size 1024: more text or a smaller",
        ),
        (["--block_sise", "64"], "unknown flag --block_sise, did you mean --block_size?"),
        (["--block_size", "many"], "--block_size: invalid int value: 'many'"),
        (["--train_file", "{tmp}/table.jsonl"], "--text_column text: no such column, the data has: body"),
        (["--train_file", "{tmp}/*"], "give files of one kind"),
        (["--train_file", "{tmp}/broken.jsonl"], "broken.jsonl cannot be read"),
        (["--train_file", "{tmp}/numbers.jsonl"], "--text_column text: a row holds a int and no text: 5"),
        (["--train_file", "{tmp}/empty.parquet"], "empty.parquet cannot be read"),
        (["--output_dir", "{tmp}/empty.txt/data"], "cannot be written: Not a directory"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(arguments, message, tmp_path, refuse):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short for a row\n" * 3)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "utf-16.txt").write_text("a text\n" * 100, encoding="utf-16")
    (tmp_path / "broken.jsonl").write_text('{"text": "a text"}\n{"text": \n')
    (tmp_path / "numbers.jsonl").write_text('{"text": null}\n{"text": 5}\n')
    (tmp_path / "empty.parquet").write_text("")
    (tmp_path / "table.jsonl").write_text('{"body": "a text"}\n')
    before = sorted(tmp_path.iterdir())
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    lines = refuse(prepare_data, "--output_dir", tmp_path / "data", *arguments)
    errors = [line for line in lines if "error" in line]
    assert len(errors) == 1, lines
    assert message.replace("{tmp}", str(tmp_path)) in errors[0]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["../outside.arrow", "train/../../outside.arrow", "{tmp}/outside.arrow"])
def test_a_data_folder_that_leads_out_of_itself_is_refused(name, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "data")
    info = json.loads((folder / "dataset.json").read_text())
    shard = info["splits"]["train"]["shards"][0]
    shutil.copy(folder / shard["file"], tmp_path / "outside.arrow")
    shard["file"] = name.replace("{tmp}", str(tmp_path))
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"dataset.json is damaged .*is not in the folder"):
        open_data_folder(folder)
