"""Only the text counts: columns nobody uses, byte-order marks and ways to write a missing value change nothing."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretraining.errors import UserError
from pretraining.text.documents import hub_corpus, local_corpus

TEXTS = [f"text number {number}" for number in range(6)]


def column(texts: list[str], **others: object) -> dict:
    return {"text": pa.array(texts), **others}


# Two files each, whose columns differ.
PAIRS = {
    "one more column": (column(TEXTS[:3]), column(TEXTS[3:], more=[1, 2, 3])),
    "one column less": (column(TEXTS[:3], more=[1, 2, 3]), column(TEXTS[3:])),
    "another order": ({"more": [1, 2, 3], **column(TEXTS[:3])}, column(TEXTS[3:], more=[1, 2, 3])),
    "an unused column of nulls": (column(TEXTS[:3], more=pa.nulls(3)), column(TEXTS[3:], more=[1, 2, 3])),
    "an unused column of another type": (column(TEXTS[:3], more=["a", "b", "c"]), column(TEXTS[3:], more=[1, 2, 3])),
    "a struct with one more field": (
        column(TEXTS[:3], more=[{"a": 1}] * 3),
        column(TEXTS[3:], more=[{"a": 1, "b": 2}] * 3),
    ),
    "text of nulls": ({"text": pa.nulls(3)}, column(TEXTS)),
    "text of nulls at the end": (column(TEXTS), {"text": pa.nulls(3)}),
    "long text": ({"text": pa.array(TEXTS[:3], pa.large_string())}, column(TEXTS[3:])),
    "text as bytes": ({"text": pa.array([text.encode() for text in TEXTS[:3]])}, column(TEXTS[3:])),
    "text in a dictionary": ({"text": pa.array(TEXTS[:3]).dictionary_encode()}, column(TEXTS[3:])),
}


def write_parquet(table: pa.Table, path) -> None:
    pq.write_table(table, path)


def write_arrow(table: pa.Table, path) -> None:
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


def write_json(table: pa.Table, path) -> None:
    path.write_text("".join(json.dumps(row, default=bytes.decode) + "\n" for row in table.to_pylist()))


WRITERS = {"parquet": write_parquet, "arrow": write_arrow, "jsonl": write_json}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    return [pa.table(columns) for columns in request.param]


def write(folder, form: str, tables: list[pa.Table]) -> None:
    for number, table in enumerate(tables):
        WRITERS[form](table, folder / f"{number}.{form}")


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_files_whose_other_columns_differ_are_read(form, pair, tmp_path):
    write(tmp_path, form, pair)
    corpus = local_corpus(f"{tmp_path}/*.{form}")
    assert list(corpus) == TEXTS
    shares = [corpus.share(index, 2, epoch=0, seed=1) for index in (0, 1)]
    assert sorted(text for share in shares for text in share) == TEXTS


@pytest.mark.parametrize("form", WRITERS)
def test_datasets_whose_other_columns_differ_are_read(form, pair, tmp_path):
    write(tmp_path, form, pair)
    corpus = hub_corpus(str(tmp_path), None, None, "text")
    assert list(corpus) == TEXTS
    shares = [corpus.share(index, 2, epoch=0, seed=1) for index in (0, 1)]
    assert sorted(text for share in shares for text in share) == TEXTS


def test_of_parquet_only_the_column_of_the_text_is_read(tmp_path):
    """Of the other one, every byte is damaged."""
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table(column(TEXTS, zzz=[f"zzz{n}" * 1000 for n in range(6)])), path, compression="none")
    content = path.read_bytes()
    metadata = pq.read_metadata(path).row_group(0).column(1)
    start = metadata.dictionary_page_offset or metadata.data_page_offset
    damaged = (
        content[:start] + b"\xff" * metadata.total_compressed_size + content[start + metadata.total_compressed_size :]
    )
    path.write_bytes(damaged)
    with pytest.raises((pa.ArrowException, OSError)):
        pq.read_table(path)
    assert list(local_corpus(str(path))) == TEXTS


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "parquet", [pa.table(column(TEXTS)), pa.table({"text": [{"a": 1}]})])
    with pytest.raises(UserError, match=r"1\.parquet: .*[Cc]ast"):
        list(local_corpus(f"{tmp_path}/*.parquet"))
    (tmp_path / "json").mkdir()
    write(tmp_path / "json", "jsonl", [pa.table(column(TEXTS))])
    (tmp_path / "json/1.jsonl").write_text('{"text": oops}\n')
    with pytest.raises(UserError, match=r"1\.jsonl: "):
        list(hub_corpus(str(tmp_path / "json"), None, None, "text"))


def test_the_configuration_of_a_dataset_is_kept(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": text} for text in TEXTS], "other": 1}))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.json\n  field: data\n---\n"
    )
    assert list(hub_corpus(str(tmp_path), None, None, "text")) == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["text", 1]', "is a list, not an object"),
        ("[oops", "is not JSON"),
        ('{"n": %s}' % ("1" * 5000), "is not JSON"),
    ],
)
def test_a_bad_line_is_named_as_what_it_is(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"line 2 of a.jsonl {message}"):
        list(local_corpus(f"{tmp_path}/a.jsonl"))


BOM = b"\xef\xbb\xbf"


def test_byte_order_marks_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + "a text \ufeff with one inside".encode())
    (tmp_path / "b.txt").write_bytes(BOM)
    corpus = local_corpus(f"{tmp_path}/*.txt")
    assert list(corpus) == ["a text \ufeff with one inside"] and corpus.counts()["without_text"] == 1
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(BOM + b'{"text": "%s"}\n{"text": "more"}\n' % name.encode())
    assert list(local_corpus(f"{tmp_path}/*.jsonl")) == ["a", "more", "b", "more"]
    assert list(hub_corpus(str(tmp_path), None, None, "text"))  # whatever datasets makes of the folder


def test_a_missing_value_of_pandas_is_skipped_and_counted_like_null(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one"}\n{"text": NaN}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n'
    )
    corpus = local_corpus(f"{tmp_path}/a.jsonl")
    assert list(corpus) == ["one", "two"] and corpus.counts()["without_text"] == 3
    (tmp_path / "b.jsonl").write_text('{"text": Infinity}\n')
    with pytest.raises(UserError, match="a row holds a float and no text: inf"):
        list(local_corpus(f"{tmp_path}/b.jsonl"))


@pytest.mark.parametrize(
    "content", ['[{"text": "one"}, {"text": "two"}]', '[\n  {"text": "one"}\n]\n', '{\n  "text": "one"\n}\n']
)
def test_json_that_is_not_in_lines_is_refused_with_the_way_to_make_it_so(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"line 1 of a\.json begins a value of several lines or objects.* `jq -c "):
        list(local_corpus(f"{tmp_path}/a.json"))


@pytest.mark.parametrize(
    ("name", "command"), [("a.jsonl.gz", "gunzip -k"), ("a.txt.ZST", "unzstd"), ("a.parquet.zip", "unzip")]
)
def test_compressed_files_are_refused_as_what_they_are(name, command, tmp_path):
    (tmp_path / name).write_bytes(b"whatever")
    with pytest.raises(UserError, match=rf"{name} is compressed: unpack it first \(`{command} .*{name}` does\)"):
        local_corpus(f"{tmp_path}/{name}")


def test_suffixes_in_capitals_are_the_same_kinds(tmp_path):
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert list(local_corpus(f"{tmp_path}/*")) == ["one", "two"]
