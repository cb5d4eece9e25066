"""Data to and from a Hub over real HTTP: published, trained on by name, streamed, with connections that break."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, make_documents, metrics, script, succeed
from support.hub_server import Hub
from support.processes import start, wait_until

from pretraining.tokenization.tokenizer import train_tokenizer

DOCUMENTS = make_documents(300, seed=4)
FLAGS = ("--config_overrides", TINY, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--max_steps", 6)


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=20)
    return buffer.getvalue()


def text_files() -> dict[str, bytes]:
    return {f"data/train-0000{index}.parquet": parquet(DOCUMENTS[index * 100 :][:100]) for index in range(3)}


@pytest.fixture(scope="module")
def local_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, content in text_files().items():
        (folder / name.split("/")[1]).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DOCUMENTS, 320).save_pretrained(folder)
    return folder


def downloads(hub: Hub) -> list[tuple]:
    return [request for request in hub.requests if request[0] == "GET" and "/resolve/" in request[1]]


def test_a_published_data_folder_trains_by_name_as_it_does_from_its_folder(data_dir, corpus_file, tmp_path):
    prepared = ("--output_dir", data_dir, "--train_file", corpus_file, "--tokenizer_vocab_size", 320)
    prepared += ("--block_size", 32, "--push_to_hub", "us/packed")
    with Hub(token="secret") as hub:
        refused = script("prepare_data.py", *prepared, **{**hub.environment(tmp_path / "me"), "HF_TOKEN": "wrong"})
        assert refused.returncode == 2
        assert "error: --push_to_hub us/packed failed" in refused.stderr and "Traceback" not in refused.stderr
        assert "a token that may write" in refused.stderr

        for _ in range(2):  # the second time there is nothing to do
            assert (
                "published as us/packed"
                in succeed(script("prepare_data.py", *prepared, **hub.environment(tmp_path / "me"))).stdout
            )
        published = hub.files("us/packed")
        assert "# us/packed\n" in published["README.md"].decode()
        local = {path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*") if path.is_file()}
        assert set(published) == local
        assert all(published[name] == (data_dir / name).read_bytes() for name in local)
        public = script("prepare_data.py", *prepared, "--hub_private_repo", **hub.environment(tmp_path / "me"))
        assert public.returncode == 2 and "us/packed failed: it is there, and public" in public.stderr
        texts = b"".join(content for name, content in published.items() if not name.endswith(".arrow")).decode()
        assert "secret" not in texts and str(corpus_file.parent) not in texts and "/tmp" not in texts
        assert "documents.jsonl" in published["README.md"].decode()

        environment = hub.environment(tmp_path / "another")
        flags = ("--dataset_name", "us/packed", "--output_dir", tmp_path / "by-name", *FLAGS)
        succeed(script("train_accelerate.py", *flags, **environment))
        program = tmp_path / "program.py"
        program.write_text("from datasets import load_dataset; print(len(load_dataset('us/packed', split='train')))")
        info = json.loads(published["dataset.json"])
        assert succeed(script(program, **environment)).stdout == f"{info['splits']['train']['rows']}\n"
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "by-folder", *FLAGS)
    succeed(script("train_accelerate.py", *flags))
    losses = [
        [line.get("loss", line.get("eval_loss")) for line in metrics(tmp_path / name)]
        for name in ("by-name", "by-folder")
    ]
    assert losses[0] == losses[1]


def test_text_is_not_downloaded_as_if_it_were_packed(tmp_path):
    with Hub() as hub:
        hub.add("us/text", text_files())
        flags = ("--dataset_name", "us/text", "--output_dir", tmp_path / "run")
        result = script("train_accelerate.py", *flags, **hub.environment(tmp_path / "home"))
        assert result.returncode == 2
        assert "us/text cannot be downloaded as packed data" in result.stderr and "needs --streaming" in result.stderr
        assert not any(path.endswith(".parquet") for _, path, *_ in downloads(hub))


def test_data_prepared_from_a_hub_is_that_of_the_files_though_connections_break(local_texts, tokenizer_dir, tmp_path):
    flags = ("--tokenizer_name", tokenizer_dir, "--block_size", 32)
    local = ("--train_file", f"{local_texts}/*.parquet", "--output_dir", tmp_path / "local")
    succeed(script("prepare_data.py", *local, *flags))
    with Hub() as hub:
        revision = hub.add("us/text", text_files())
        hub.add("us/text", {"data/train-00000.parquet": parquet(["another text"])})
        hub.drop_downloads(2, after_bytes=1000)
        remote = ("--dataset_name", "us/text", "--dataset_revision", revision, "--output_dir", tmp_path / "remote")
        succeed(script("prepare_data.py", *remote, *flags, **hub.environment(tmp_path / "home")))
    infos = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("local", "remote")]
    assert infos[1]["source"]["train"] == {"name": "us/text", "config": None, "revision": revision}
    assert infos[0]["splits"] == infos[1]["splits"]  # with every shard's sha256


def test_a_stream_from_a_hub_trains_as_one_from_files_though_connections_break(local_texts, tokenizer_dir, tmp_path):
    flags = ("--streaming", "--tokenizer_name", tokenizer_dir, "--block_size", 32, *FLAGS)
    local = ("--train_file", f"{local_texts}/*.parquet", "--output_dir", tmp_path / "local")
    succeed(script("train_accelerate.py", *local, *flags))
    with Hub() as hub:
        hub.add("us/text", text_files())
        hub.drop_downloads(2, after_bytes=1000)
        remote = ("--dataset_name", "us/text", "--output_dir", tmp_path / "remote", "--dataloader_num_workers", 1)
        succeed(script("train_accelerate.py", *remote, *flags, **hub.environment(tmp_path / "home")))
        ranges = [headers["range"] for _, _, headers, status in downloads(hub) if status == 206]
        assert len(ranges) > 6
    losses = [
        [line.get("loss", line.get("eval_loss")) for line in metrics(tmp_path / name)] for name in ("local", "remote")
    ]
    assert losses[0] == losses[1]


READ = """
import json, sys, time
waits = []
time.sleep = waits.append  # those of huggingface_hub and datasets are minutes
from pretraining.text import documents
documents.ROWS_PER_READ = 8
texts = []
read = documents.hub_corpus("us/text", None, None, "text")
again = 0
try:
    for text in read:
        texts.append(text)
        if len(texts) == 10:
            print("has begun", flush=True)
            open(sys.argv[1]).read()  # until somebody has written there
    again = len(list(read))  # from its beginning, whatever has happened
except ValueError as error:
    print(error, file=sys.stderr)
print(json.dumps({"texts": texts, "again": again, "waits": waits}))
"""


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_hub_that_is_away_for_longer_than_its_clients_wait_costs_no_document(form, tmp_path):
    files = text_files()
    if form == "jsonl":
        for index in range(3):
            lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS[index * 100 :][:100]]
            files[f"data/train-{index}.jsonl"] = "".join(lines).encode()
            del files[f"data/train-0000{index}.parquet"]
    found = {}
    program, go_on = tmp_path / "program.py", tmp_path / "go-on"
    program.write_text(READ)
    os.mkfifo(go_on)
    with Hub() as hub:
        hub.add("us/text", files)
        for failures in (0, 15, 1000):
            running = start(program, go_on, **hub.environment(tmp_path / str(failures)))
            try:
                wait_until(
                    lambda running=running: "\n" in running.output("stdout") or running.process.exitcode is not None
                )
                assert running.output("stdout") == "has begun\n"
                hub.fail(failures, 503, matching=f".{form}")
                go_on.write_text("")
                result = running.wait()
            finally:
                running.process.kill()
            found[failures] = json.loads(result.stdout.splitlines()[1]), result.stderr
    assert found[0] == ({"texts": DOCUMENTS, "again": 300, "waits": []}, "")
    assert found[15][0]["texts"] == DOCUMENTS and found[15][0]["again"] == 300
    assert len(found[15][0]["waits"]) > 12 and "trying again in 2 s" in found[15][1]
    # Away for good: the whole reads of 8 documents before are right, and the end of the patience is an error.
    assert found[1000][0]["texts"] == DOCUMENTS[:96]
    assert "us/text cannot be read: " in found[1000][1] and "503" in found[1000][1]
