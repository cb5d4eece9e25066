"""Token files of other projects in a dataset on a Hub: downloaded as they are needed, checked, and trained on."""

import shutil
import signal
import struct
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, make_documents, metrics, succeed
from safetensors.torch import load_file
from support.faults import ACCUMULATION, signal_in
from support.hub_server import Hub
from support.processes import run_ranks, start

from modeling_gpt2scratch import GPT2ScratchForCausalLM
from pretraining.data.row_order import RowOrder
from pretraining.distributed.signals import STOPPED
from pretraining.tokenization.tokenizer import train_tokenizer

BLOCK, ROWS, STEP = 32, 40, 8  # tokens in a row, rows in a file, rows in a step: a file is five steps
NAMES = [f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3)]
VALIDATION = "fineweb_val_000000.bin"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DOCUMENTS, 320).save_pretrained(folder)
    return folder


DOCUMENTS = make_documents(150, seed=4)


def llmc(ids: np.ndarray) -> bytes:
    return struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + ids.astype("<u2").tobytes()


@pytest.fixture(scope="module")
def token_files() -> dict[str, bytes]:
    """As llm.c writes them: three files for training and a shorter one for validation, each with an incomplete row."""
    generator = np.random.default_rng(0)
    sizes = dict.fromkeys(NAMES, ROWS) | {VALIDATION: 12}
    return {name: llmc(generator.integers(1, 320, rows * BLOCK + 5)) for name, rows in sizes.items()} | {
        "README.md": b"# Tokens\n"
    }


@pytest.fixture
def hub(token_files):
    with Hub() as hub:
        hub.add("us/tokens", token_files)
        yield hub


@pytest.fixture
def flags(tokenizer_dir, tmp_path):
    return (
        *("--dataset_name", "us/tokens", "--tokenizer_name", tokenizer_dir, "--output_dir", tmp_path / "run"),
        *("--block_size", BLOCK, "--config_overrides", TINY + ",resid_pdrop=0.1", "--report_to", "none"),
        *("--per_device_train_batch_size", STEP // ACCUMULATION, "--gradient_accumulation_steps", ACCUMULATION),
        *("--logging_steps", 1, "--eval_iters", 1, "--eval_steps", 100, "--save_steps", 100),
    )


def train(flags: tuple, hub: Hub, home, *more: object, **options):
    return start("train_accelerate.py", *flags, *more, **hub.environment(home), **options).wait()


def downloads(hub: Hub) -> set[str]:
    paths = [path for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path]
    return {path.rsplit("/", 1)[1] for path in paths}


def losses(run_dir) -> list[float]:
    return [line["loss"] for line in metrics(run_dir) if "loss" in line]


def test_a_run_downloads_the_files_of_its_steps_and_the_next_one_though_connections_break(hub, flags, tmp_path):
    hub.drop_downloads(3, after_bytes=1000)
    result = succeed(train(flags, hub, tmp_path / "home", "--max_steps", 4))
    assert downloads(hub) <= {VALIDATION, *NAMES[:2]} and NAMES[0] in downloads(hub)
    card = (tmp_path / "run/README.md").read_text()
    assert "us/tokens" in card and "None" not in card
    assert "0.27 epochs of us/tokens" in result.stdout  # 4 steps of 8 rows, of 120 rows

    # Twice as many steps need a second file, in which the rows of the first are not met again.
    shutil.rmtree(tmp_path / "run")
    succeed(train(flags, hub, tmp_path / "home", "--max_steps", 8, "--dataloader_num_workers", 1))
    assert downloads(hub) == {VALIDATION, *NAMES}
    assert len(losses(tmp_path / "run")) == 8


def test_one_file_is_repeated_where_no_more_are_allowed(hub, flags, tmp_path):
    succeed(train(flags, hub, tmp_path / "home", "--max_steps", 7, "--max_train_files", 1))
    assert downloads(hub) == {VALIDATION, NAMES[0]}


def test_rows_come_file_by_file_each_once_an_epoch_however_a_step_is_split():
    order = RowOrder([[40, 24, 16]], batch_size=8, seed=3)
    rows = [order.rows(step, 0) for step in range(20)]
    for epoch in (rows[:10], rows[10:]):
        files = [list(chain(*part)) for part in (epoch[:5], epoch[5:8], epoch[8:])]
        assert [sorted(file) for file in files] == [list(range(40)), list(range(40, 64)), list(range(64, 80))]
        assert files[0] != sorted(files[0])
    assert rows[:10] != rows[10:]
    ranks = [RowOrder([[40, 24, 16]], 2, 2, num_processes=2, process_index=rank, seed=3) for rank in (0, 1)]
    for step in range(20):
        parts = [ranks[rank].rows(step, micro_step) for micro_step in (0, 1) for rank in (0, 1)]
        assert list(chain(*parts)) == rows[step]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_is_resumed_in_the_middle_of_a_file_that_is_not_there_any_more(
    num_processes, hub, flags, token_files, tmp_path
):
    batch = STEP // ACCUMULATION // num_processes
    arguments = (*flags, "--per_device_train_batch_size", batch, "--max_steps", 12)
    environment = hub.environment(tmp_path / "home")
    whole = (*arguments, "--output_dir", tmp_path / "whole")
    for result in run_ranks(num_processes, "train_accelerate.py", *whole, **environment):
        succeed(result)
    faults = {0: signal_in(7, 0, signal.SIGTERM)}  # in the second file
    for result in run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults, **environment):
        assert result.returncode == STOPPED

    environment = hub.environment(tmp_path / "another")
    hub.requests.clear()
    for result in run_ranks(num_processes, "train_accelerate.py", *arguments, **environment):
        succeed(result)
    assert NAMES[0] not in downloads(hub) and NAMES[1] in downloads(hub)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_validation_predicts_every_token_as_published_losses_do(hub, flags, token_files, tmp_path):
    """Of rows of 33 tokens that overlap by one, 32 are predicted in each."""
    succeed(train(flags, hub, tmp_path / "home", "--max_steps", 1))
    model = GPT2ScratchForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.from_numpy(np.frombuffer(token_files[VALIDATION], "<u2", offset=1024).astype(np.int64))
    sums = []
    for first in range(0, STEP * BLOCK, BLOCK):
        with torch.no_grad():
            logits = model(ids[first : first + BLOCK].unsqueeze(0)).logits[0]
        targets = ids[first + 1 : first + BLOCK + 1]
        sums.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    (line,) = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert line["eval_loss"] == pytest.approx(float(sum(sums)) / (STEP * BLOCK), rel=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no validation", "--dataset_name us/tokens has no .npy or .bin file with 'val' in its name"),
        ("truncated", f"{NAMES[0]} has 3000 bytes, but its header says 1285 tokens: 3594 bytes"),
        ("another tokenizer", f"us/tokens: {NAMES[0]} has the token id 50000, where the tokenizer has ids up to 319"),
        ("text", "us/tokens cannot be downloaded as packed data"),
    ],
)
def test_files_that_cannot_be_trained_on_are_named(damage, message, num_workers, token_files, flags, tmp_path):
    files = dict(token_files)
    if damage == "no validation":
        del files[VALIDATION]
    elif damage == "truncated":
        files[NAMES[0]] = files[NAMES[0]][:3000]
    elif damage == "another tokenizer":
        files[NAMES[0]] = files[NAMES[0]][:1100] + struct.pack("<H", 50_000) + files[NAMES[0]][1102:]
    else:
        files = {"data.parquet": b"PAR1"}
    with Hub() as hub:
        hub.add("us/tokens", files)
        more = ("--max_steps", 2, "--dataloader_num_workers", num_workers)
        result = train(flags, hub, tmp_path / "home", *more)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        (error,) = [line for line in result.stderr.splitlines() if "error:" in line]
        assert message in error

        # Nothing was lost, so the same command goes on when the files are right.
        hub.add("us/tokens", token_files)
        succeed(train(flags, hub, tmp_path / "home", *more))


LIST = """
from pretraining.data.hub_token_files import list_token_files
for name in ("us/both", "us/packed"):
    print({split: [file.name for file in files] for split, files in list_token_files(name, None).items()})
"""


def test_only_the_main_folder_is_read_and_a_packed_dataset_is_none_of_token_files(token_files, tmp_path):
    inside = {f"other/{name}": content for name, content in token_files.items()}
    (tmp_path / "program.py").write_text(LIST)
    with Hub() as hub:
        hub.add("us/both", token_files | inside)
        hub.add("us/packed", {"dataset.json": b"{}", "evaluation_scores.npy": b"0"})
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
        both, packed = succeed(start(tmp_path / "program.py", **environment).wait()).stdout.splitlines()
    assert both == str({"train": NAMES, "validation": [VALIDATION]})
    assert packed == str({"train": [], "validation": []})


def test_a_file_that_is_damaged_in_the_cache_is_downloaded_once_more(hub, flags, tmp_path):
    for number in (1, 2):
        arguments = ("--max_steps", 2, "--output_dir", tmp_path / f"run-{number}")
        succeed(train(flags, hub, tmp_path / "home", *arguments))
        (cached,) = (tmp_path / "home").rglob(NAMES[0])
        content = bytearray(cached.read_bytes())
        assert bytes(content) == hub.files("us/tokens")[NAMES[0]]
        content[1024:] = bytes(len(content) - 1024)
        cached.resolve().write_bytes(content)
    assert losses(tmp_path / "run-1") == losses(tmp_path / "run-2")
