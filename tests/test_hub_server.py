"""The Hub on loopback is one to the true clients."""

import hashlib
import http.client
import io
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import script, succeed
from support.hub_server import Hub

UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("us/data", repo_type="dataset", exist_ok=True)
for _ in range(2):  # the second time there is nothing to do
    api.upload_folder(repo_id="us/data", folder_path=sys.argv[1], repo_type="dataset")
"""
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("us/data", repo_type="dataset"))
"""
STREAM = """
import json, sys, time
waits = []
time.sleep = waits.append  # huggingface_hub's waits are no setting
from datasets import load_dataset
rows = [row["text"] for row in load_dataset("us/rows", split="train", streaming=True, revision=sys.argv[1])]
print(json.dumps({"rows": rows, "waits": waits}))
"""


def client(hub: Hub, home, code: str, *arguments: object, **environment: str):
    program = home.with_name(f"{home.name}.py")
    program.write_text(code)
    return script(program, *arguments, **{**hub.environment(home), **environment})


def stream(hub: Hub, home, revision: str = "main") -> dict:
    return json.loads(succeed(client(hub, home, STREAM, revision)).stdout)


def ask(hub: Hub, method: str, path: str, **headers: str):
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def make_rows(number: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [f"{index} {generator.randbytes(100).hex()}" for index in range(number)]


def parquet(rows: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), file, row_group_size=100)
    return file.getvalue()


def test_a_folder_goes_up_and_comes_down_the_same(tmp_path):
    files = {"README.md": b"---\nlicense: mit\n---\n", "empty.txt": b"", "rows/a.arrow": os.urandom(3_000_000)}
    for path, content in files.items():
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path).write_bytes(content)
    with Hub(token="secret") as hub:
        succeed(client(hub, tmp_path / "one", UPLOAD, tmp_path / "data"))
        assert hub.files("us/data") == files
        first, second = hub.commits("us/data")
        assert hub.files("us/data", revision=first) == {}
        folder = succeed(client(hub, tmp_path / "another", DOWNLOAD)).stdout.strip()
        uploads = [path for method, path, _, _ in hub.requests if method == "PUT"]
    assert folder.endswith(f"/snapshots/{second}")
    assert {path: Path(folder, path).read_bytes() for path in files} == files
    assert uploads == [f"/storage/{hashlib.sha256(files['rows/a.arrow']).hexdigest()}"]


def test_two_parquet_files_stream_in_order_as_they_were_at_each_revision(tmp_path):
    rows = make_rows(500)
    with Hub() as hub:
        old = hub.add("us/rows", {"a.parquet": parquet(rows[:200])})
        hub.add("us/rows", {"a.parquet": parquet(rows[:300]), "b.parquet": parquet(rows[300:])})
        assert stream(hub, tmp_path)["rows"] == rows
        assert stream(hub, tmp_path, old)["rows"] == rows[:200]


@pytest.mark.parametrize("token", ["wrong", None])
def test_without_the_token_nothing_is_written(tmp_path, token):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("new")
    with Hub(token="secret") as hub:
        hub.add("us/data", {"a.txt": b"old"})
        environment = {"HF_TOKEN": token} if token else {"HF_TOKEN": ""}
        result = client(hub, tmp_path, UPLOAD, tmp_path / "data", **environment)
        assert result.returncode and "401" in result.stderr
        assert hub.files("us/data") == {"a.txt": b"old"} and len(hub.commits("us/data")) == 1
        read = client(hub, tmp_path, DOWNLOAD, **environment)
        assert (read.returncode == 0) == (token is None)


def test_a_range_gives_just_those_bytes():
    content, path = os.urandom(2000), "/datasets/us/data/resolve/main/a%20b.bin"
    with Hub() as hub:
        commit = hub.add("us/data", {"a b.bin": content})
        for asked, wanted in (("10-19", content[10:20]), ("1990-", content[1990:]), ("-5", content[-5:])):
            status, headers, body = ask(hub, "GET", path, Range=f"bytes={asked}")
            assert (status, body) == (206, wanted)
        assert headers["Content-Range"] == "bytes 1995-1999/2000" and headers["X-Repo-Commit"] == commit
        assert ask(hub, "GET", path, Range="bytes=1990-9999")[2] == content[1990:]
        assert ask(hub, "GET", path, Range="bytes=2000-")[0] == 416
        status, headers, body = ask(hub, "HEAD", path)
        assert (status, headers["Content-Length"], body) == (200, "2000", b"")
        assert hub.requests[0][:2] == ("GET", path) and hub.requests[0][2]["range"] == "bytes=10-19"


def test_what_is_missing_is_named():
    with Hub() as hub:
        hub.add("us/data", {"a.txt": b"here"})
        for path, code in (
            ("/api/datasets/us/other", "RepoNotFound"),
            ("/api/models/us/data", "RepoNotFound"),
            ("/api/datasets/us/data/revision/v2", "RevisionNotFound"),
            ("/datasets/us/data/resolve/main/b.txt", "EntryNotFound"),
            ("/api/datasets/us/data/tree/main/folder", "EntryNotFound"),
            ("/anything/else", None),
        ):
            status, headers, _ = ask(hub, "GET", path)
            assert (status, headers["X-Error-Code"]) == (404, code)


@pytest.mark.parametrize("reset", [False, True])
def test_what_streams_over_a_broken_connection_comes_once(tmp_path, reset):
    """huggingface_hub tries a read 6 times, and `datasets` tries that 20 times."""
    rows = make_rows(2000)
    with Hub() as hub:
        hub.add("us/rows", {"a.parquet": parquet(rows)})
        hub.drop_downloads(7, after_bytes=50_000, reset=reset)
        streamed = stream(hub, tmp_path)
        downloads = [status for method, path, _, status in hub.requests if method == "GET" and "/resolve/" in path]
    assert streamed == {"rows": rows, "waits": [1, 2, 4, 8, 8, 5, 1]}
    assert len(downloads) > 7 and set(downloads) == {206}


def test_requests_fail_as_often_as_asked_for():
    with Hub() as hub:
        hub.add("us/data", {"a.txt": b"here"})
        hub.fail(2, status=500, matching="/tree/")
        paths = ["/api/datasets/us/data/tree/main", "/api/datasets/us/data"] * 3
        assert [ask(hub, "GET", path)[0] for path in paths] == [500, 200, 500, 200, 200, 200]
        assert [request[3] for request in hub.requests] == [500, 200, 500, 200, 200, 200]
