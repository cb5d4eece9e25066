"""Checkpoints: killed while saving, full disks, damage, payloads, and what may differ. See docs/reliability.md."""

import functools
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY, TINY, metrics, script, succeed
from safetensors.torch import load_file, save_file
from support.faults import (
    DROPOUT,
    assert_equal,
    assert_equal_checkpoints,
    assert_equal_states,
    flags,
    kill_oneself,
    on_call,
    signal_in,
)
from support.processes import run_ranks, start, wait_until
from support.tiny_models import tiny_model

import train_accelerate
from pretraining.checkpoints import state
from pretraining.checkpoints.checkpoint import CheckpointWriter, full_weights, load_checkpoint
from pretraining.checkpoints.folders import checkpoint_to_resume, commit, complete_checkpoints, verify
from pretraining.checkpoints.identity import differences
from pretraining.checkpoints.state import Position
from pretraining.distributed.signals import STOPPED
from pretraining.errors import UserError
from pretraining.hardware import generator_states
from pretraining.optimization.optimizer import build_optimizer, parameter_groups

# Rows 2, 7: killed while saving


def kill_at_file_event(number: int, folder: str) -> None:
    """SIGKILL before a call, counted from 1, that makes, renames, links or deletes something of a checkpoint."""
    calls = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal calls
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")
        writes = writes or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1])
        if writes and "checkpoint-" in str(arguments[0]) and str(arguments[0]).startswith(folder):
            calls += 1
            if calls == number:
                kill_oneself(signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize(("num_processes", "stride", "max_steps"), [(1, 2, 60), (2, 11, 24)])
def test_killed_at_any_moment_of_saving_the_next_start_takes_the_last_whole_checkpoint(
    num_processes, stride, max_steps, data_dir, tmp_path
):
    """One run, killed in its first save after each start, each time some calls later, until that save is through."""
    output_dir, number, litter, skipped = tmp_path / "run", 1, [], 0
    last = None  # the last whole checkpoint
    more = ("--max_steps", max_steps, "--save_steps", 3, "--save_total_limit", 1, "--eval_steps", 15)
    arguments = flags(data_dir, output_dir, *more, "--per_device_train_batch_size", 1)
    for number in range(1, 100, stride):
        fault = functools.partial(kill_at_file_event, number, str(output_dir))
        result, *others = run_ranks(num_processes, "train_accelerate.py", *arguments, faults={0: fault})
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert all(other.returncode == 1 and "process 0 does not answer" in other.stderr for other in others)
        if last:
            assert f"continuing from {last}\n" in result.stdout
        for path in litter:
            assert f"{path} was never finished, and is deleted" in result.stdout
        skipped += len(litter)
        whole = [folder for folder in complete_checkpoints(output_dir) if not verify(folder)]
        assert len(whole) >= (last is not None)  # the one before is not deleted before the new one is there
        before, last = last, whole[-1] if whole else None
        litter = list(output_dir.glob("checkpoint-*.incomplete"))
        if before and int(last.name[-6:]) >= int(before.name[-6:]) + 6:
            break  # it came to its second save
    assert number > 15 and skipped >= 10 / stride

    result, *_ = run_ranks(num_processes, "train_accelerate.py", *arguments)
    assert f"continuing from {last}\n" in succeed(result).stdout
    assert not [path for path in output_dir.rglob("*") if "incomplete" in path.name or "abandoned" in path.name]
    arguments = flags(data_dir, tmp_path / "whole", *more, "--per_device_train_batch_size", 1)
    succeed(run_ranks(num_processes, "train_accelerate.py", *arguments)[0])
    assert_equal(output_dir, tmp_path / "whole")


# Rows 4, 5: what may change in the middle of a run, and what may not


@pytest.fixture(scope="module")
def stopped_run(data_dir, tmp_path_factory) -> Path:
    """A run of 6 steps, stopped after the fifth, with checkpoints of steps 2, 4 and 5."""
    output_dir = tmp_path_factory.mktemp("stopped") / "run"
    arguments = flags(data_dir, output_dir, "--max_steps", 6, "--save_steps", 2)
    assert start("train_accelerate.py", *arguments, fault=signal_in(5, 0, signal.SIGTERM)).wait().returncode == STOPPED
    return output_dir


@pytest.fixture
def stopped(stopped_run, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(stopped_run, tmp_path / "run", symlinks=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--learning_rate", 1e-5), "--learning_rate 0.0006, not 1e-05: choose another --output_dir, or go on all"),
        (("--seed", 7), "--seed 42, not 7: choose another --output_dir"),
        (("--optim", "muon"), "--optim adamw, not muon: choose another --output_dir"),
        (("--max_grad_norm", 0), "--max_grad_norm 1.0, not 0.0: choose another --output_dir, or go on all"),
        (("--config_overrides", DROPOUT.replace("n_layer=2", "n_layer=3")), "a model of n_layer 2, not 3: choose"),
        (
            ("--config_overrides", TINY + ",attn_pdrop=0.1,resid_pdrop=0.1"),
            "a model of embd_pdrop 0.1, not 0.0: choose",
        ),
        (("--config_overrides", DROPOUT + ",initializer_range=0.06"), "a model of initializer_range 0.02, not 0.06"),
        (("--optim_args", "vector_lr=2"), "--optim_args (not given), not vector_lr=2.0: choose another --output_dir"),
        (("--gradient_accumulation_steps", 3), "256 tokens per step, not 384: --tokens_per_step 256 keeps it"),
        (("--data_dir", "other"), "other data: on documents.jsonl (revision "),
        (("--data_dir", "other"), "another tokenizer: of the fingerprint "),
        (("--max_steps", 4), "has --max_steps 4 behind it: nothing is left to train"),
        (("--resume_from_checkpoint", "none"), "holds a run already: delete it, or choose another"),
    ],
)
def test_what_differs_from_the_checkpoint_is_named_with_both_values(
    changes, message, stopped, data_dir, other_data, refuse
):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    changes = [other_data if change == "other" else change for change in changes]
    errors = refuse(train_accelerate, *flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2, *changes))
    assert sum(message in error for error in errors) == 1, errors
    assert len(errors) == (2 if "--data_dir" in changes else 1)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def trunk(data_dir, tmp_path_factory) -> tuple[tuple, Path]:
    """A run of 12 steps at one learning rate up to the last two, with a checkpoint every other step."""
    output_dir = tmp_path_factory.mktemp("trunk") / "run"
    more = ("--save_steps", 2, "--warmup_steps", 2, "--lr_scheduler_type", "warmup_stable_decay")
    arguments = flags(data_dir, output_dir, *more)
    succeed(script("train_accelerate.py", *arguments, "--max_steps", 12))
    return arguments, output_dir


def test_a_cool_down_from_any_checkpoint_is_a_run_that_was_planned_so(trunk, tmp_path):
    """In a folder of its own, with nothing to allow: the steps behind it would have been the same."""
    arguments, trunk_dir = trunk
    before = {path: path.read_bytes() for path in trunk_dir.rglob("*") if path.is_file()}
    decay = ("--max_steps", 10, "--lr_scheduler_kwargs", "num_decay_steps=4,decay_type=1-sqrt")
    branch = (*arguments, *decay, "--resume_from_checkpoint", trunk_dir / "checkpoint-000006")
    succeed(script("train_accelerate.py", *branch, "--output_dir", tmp_path / "branch"))
    succeed(script("train_accelerate.py", *arguments, *decay, "--output_dir", tmp_path / "planned"))
    assert_equal(tmp_path / "branch", tmp_path / "planned")  # with the lines of the steps before it
    assert {path: path.read_bytes() for path in trunk_dir.rglob("*") if path.is_file()} == before


def test_a_branch_whose_past_would_have_been_another_has_to_be_allowed(trunk, tmp_path, refuse):
    arguments, trunk_dir = trunk
    checkpoint = trunk_dir / "checkpoint-000008"
    decay = ("--lr_scheduler_kwargs", "num_decay_steps=6")  # from the eighth step on
    for changes in (decay, ("--warmup_steps", 1), ("--lr_scheduler_type", "cosine")):
        branch = ("--max_steps", 12, *changes, "--resume_from_checkpoint", checkpoint)
        errors = refuse(train_accelerate, *arguments, *branch, "--output_dir", tmp_path / "branch")
        assert any(f"{changes[0]} " in error and "--allow_changes" in error for error in errors), errors
        assert not (tmp_path / "branch").exists()


@pytest.fixture(scope="module")
def other_data(tmp_path_factory) -> Path:
    """Another text, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 40}) + "\n" for n in range(300)))
    prepare = ("--train_file", folder / "other.jsonl", "--tokenizer_vocab_size", 320, "--block_size", 32)
    succeed(script("prepare_data.py", "--output_dir", folder / "data", *prepare))
    return folder / "data"


def test_what_is_named_may_differ(stopped, data_dir):
    changes = ("--learning_rate", 1e-5, "--max_steps", 8, "--weight_decay", 0.3)
    changes += ("--allow_changes", "learning_rate", "max_steps", "weight_decay")
    result = succeed(script("train_accelerate.py", *flags(data_dir, stopped, "--save_steps", 2, *changes)))
    assert "continuing from" in result.stdout
    optimizers = torch.load(complete_checkpoints(stopped)[-1] / "optimizer.pt")["optimizers"]
    decays = {value for name, value in optimizers["param_groups"][0].items() if name == "weight_decay"}
    assert decays == {0.3}
    rates = {line["step"]: line["learning_rate"] for line in metrics(stopped) if "loss" in line}
    assert len(rates) == 8 and rates[5] > 1e-5 > rates[6] > rates[8]


def test_the_number_of_processes_may_change_where_the_global_batch_stays(data_dir, tmp_path):
    """Without dropout, each process having its own, one goes on as two and logs the same losses."""
    more = ("--config_overrides", TINY + ",qkv_bias=false", "--max_steps", 8, "--save_steps", 4)
    one, two = tmp_path / "one", tmp_path / "two"
    succeed(script("train_accelerate.py", *flags(data_dir, one, *more)))
    shutil.copytree(one, two, symlinks=True)
    (two / "model.safetensors").unlink()
    arguments = flags(data_dir, two, *more)
    at = arguments.index("--gradient_accumulation_steps")
    arguments = (*arguments[:at], *arguments[at + 2 :], "--tokens_per_step", 256)
    refused = run_ranks(3, "train_accelerate.py", *arguments)
    assert [each.returncode for each in refused] == [2, 2, 2]
    assert (
        "--tokens_per_step 256 is not a multiple of 384 (block 32 x batch 4 x 3 processes); nearest: 384; its 8 rows "
        "can be split over 1, 2, 4 processes" in refused[0].stderr
    )
    result, _ = run_ranks(2, "train_accelerate.py", *arguments)
    assert "continuing from" in succeed(result).stdout
    losses, expected = ([line["loss"] for line in metrics(run) if "loss" in line] for run in (two, one))
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_folder_is_for_one_program_at_a_time(data_dir, tmp_path, refuse):
    arguments = flags(data_dir, tmp_path / "run", "--max_steps", 100_000)
    running = start("train_accelerate.py", *arguments)
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists())
    try:
        (error,) = refuse(train_accelerate, *arguments, "--max_steps", 2)
    finally:
        running.process.kill()
    assert "is in use by another program" in error
    assert running.wait().returncode == -signal.SIGKILL


# Rows 6, 7, 8, 13: the files


def test_a_full_disk_ends_the_run_in_one_line_and_the_checkpoint_before_is_whole(data_dir, tmp_path):
    """On a file system of 1.5 MB, which holds two checkpoints and not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = flags(data_dir, disk / "run", "--max_steps", 12, "--save_steps", 3, "--save_total_limit", 4)
    program = f"""
mount -t tmpfs -o size=1500k none {disk} || exit 99
{sys.executable} {REPOSITORY}/train_accelerate.py "$@"
echo "status $?"
ls {disk}/run
rm {disk}/run/tensorboard -rf; mount -o remount,size=50m {disk}
{sys.executable} {REPOSITORY}/train_accelerate.py "$@"
echo "status $?"
ls {disk}/run
"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", program, "sh", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip(
            "needs the right to mount a file system, as root or in a user namespace; the next test does without"
        )
    _, second, _ = result.stdout.split("status")
    assert second.startswith(" 2\n")
    (error,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert (
        "checkpoint-000009 cannot be written, with 0 MB free on the disk: " in error
        and "Traceback" not in result.stderr
    )
    assert "checkpoint-000003" in second and "checkpoint-000006" in second and "checkpoint-000009\n" not in second
    assert f"continuing from {disk}/run/checkpoint-000006" in second
    assert (
        result.stdout.rstrip().endswith("training_args.yaml")
        and "incomplete" not in result.stdout.split("status 0")[1]
    )


def let_no_file_grow(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_checkpoint_that_there_is_no_room_for_ends_all_in_one_line(num_processes, data_dir, tmp_path):
    """From the third one on no file may have more than 100 kB, which the log has not and the weights have."""
    more = ("--max_steps", 12, "--save_steps", 3, "--save_total_limit", 4)
    arguments = flags(data_dir, tmp_path / "run", *more)
    fault = functools.partial(on_call, full_weights, 3, functools.partial(let_no_file_grow, 100_000))
    results = run_ranks(num_processes, "train_accelerate.py", *arguments, faults={0: fault})
    assert [result.returncode for result in results] == [2] * num_processes
    (error,) = [line for line in results[0].stderr.splitlines() if "error:" in line]
    assert "checkpoint-000009 cannot be written" in error
    assert [verify(folder) for folder in complete_checkpoints(tmp_path / "run")] == [[], []]
    result, *_ = run_ranks(num_processes, "train_accelerate.py", *arguments)
    assert "checkpoint-000006" in succeed(result).stdout
    assert not list((tmp_path / "run").glob("*incomplete"))


def test_rotation_keeps_the_best_and_the_latest_and_leaves_foreign_folders_alone(data_dir, tmp_path):
    output_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "checkpoint-000001").mkdir(parents=True)
    (elsewhere / "checkpoint-000001/notes.txt").write_text("elsewhere")
    for name in (
        "checkpoint-000002",
        "checkpoint-best",
        "checkpoint-1 (copy)",
        "checkpoint-000000x",
        "mine.incomplete",
        "deleted-scenes.incomplete",
    ):
        (output_dir / name).mkdir(parents=True)
        (output_dir / name / "notes.txt").write_text(name)
    (output_dir / "checkpoint-000001").symlink_to(elsewhere / "checkpoint-000001")
    (output_dir / "training_args.yaml").write_text("{}\n")
    foreign = {path for path in output_dir.rglob("*") if path.name != "training_args.yaml"}
    litter = [output_dir / f"{name}.incomplete" for name in ("identity.json", "metrics.jsonl")]
    for path in litter:  # as a kill leaves them
        path.write_text("{")
    # The rate grows until it does harm, so that the best is neither the first nor the last.
    more = ("--max_steps", 90, "--save_steps", 10, "--eval_steps", 10, "--save_total_limit", 2)
    more += ("--learning_rate", 1.0, "--warmup_steps", 90, "--config_overrides", TINY)
    result = succeed(script("train_accelerate.py", *flags(data_dir, output_dir, *more)))
    evaluated = {line["step"]: line["eval_loss"] for line in metrics(output_dir) if "eval_loss" in line}
    best = min(evaluated, key=evaluated.get)
    assert 10 <= best <= 60
    kept = {path.name for path in complete_checkpoints(output_dir)}
    assert kept == {f"checkpoint-{best:06d}", "checkpoint-000070", "checkpoint-000080"}
    assert os.readlink(output_dir / "best-checkpoint") == f"checkpoint-{best:06d}"
    assert all(path.exists() for path in foreign), result.stdout
    assert not any(path.exists() for path in litter)
    assert (elsewhere / "checkpoint-000001/notes.txt").read_text() == "elsewhere"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[0 if path.name == "manifest.json" else len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng.pt", "position.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_name(name, how, stopped, data_dir, refuse):
    folder = stopped / "checkpoint-000005"
    damage(folder / name, how)
    found, (message,) = checkpoint_to_resume(stopped, "auto")
    assert found == stopped / "checkpoint-000004"
    assert str(folder) in message and name in message
    (error,) = refuse(
        train_accelerate, *flags(data_dir, stopped, "--max_steps", 6, "--resume_from_checkpoint", folder)
    )
    assert error == f"train_accelerate.py: error: {message}"


def test_the_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(stopped, data_dir, refuse):
    damage(stopped / "checkpoint-000005/optimizer.pt", "flipped")
    arguments = flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2)
    result = succeed(script("train_accelerate.py", *arguments))
    assert f"passed over: {stopped}/checkpoint-000005/optimizer.pt is damaged: its sha256" in result.stdout
    assert f"continuing from {stopped}/checkpoint-000004" in result.stdout
    assert (stopped / "abandoned-checkpoint-000005").is_dir()

    (stopped / "model.safetensors").unlink()
    for folder in complete_checkpoints(stopped):
        (folder / "rng.pt").unlink()
    errors = refuse(train_accelerate, *arguments)
    assert sum("rng.pt is missing" in error for error in errors) == 2
    assert f"no checkpoint of {stopped} is whole: delete it" in errors[-1]


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng.pt"])
def test_a_pickle_is_not_executed(name, stopped, data_dir, tmp_path, refuse):
    folder = stopped / "checkpoint-000005"
    torch.save({"optimizers": Payload(tmp_path / "executed")}, folder / name)
    write_manifest(folder)
    (error,) = refuse(train_accelerate, *flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2))
    assert f"{folder} holds something else than a checkpoint: Weights only load failed" in error
    assert not (tmp_path / "executed").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / name, weights_only=True)
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have been


def write_manifest(folder: Path, **more: Path) -> None:
    """As whoever made the files would."""
    paths = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"} | more
    files = {
        name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in paths.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("name", ["../outside", "{tmp}/outside", "down/../../outside", "link", "manifest.json"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(name, stopped, data_dir, tmp_path):
    name = name.replace("{tmp}", str(tmp_path))
    outside, folder = tmp_path / "outside", stopped / "checkpoint-000005"
    outside.write_text("somebody else's")
    if name == "manifest.json":
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
        expected = "it has no manifest.json"
    else:
        if name == "link":
            (folder / name).symlink_to(outside)
        write_manifest(folder, **{name: outside})
        expected = f"names {name!r}, which is not a plain file in the folder"
    (problem,) = verify(folder)
    assert expected in problem
    before = outside.read_bytes()
    result = succeed(script("train_accelerate.py", *flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2)))
    assert expected in result.stdout and "continuing from" in result.stdout
    assert outside.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"files": [[5, {"bytes": 1, "sha256": "x"}]]}'),
        ("manifest.json", '{"files": {"model.safetensors": {"bytes": 1e999, "sha256": "x"}}}'),
        ("manifest.json", "[" * 200_000),
        ("manifest.json", "[]"),
    ],
)
def test_a_manifest_of_any_kind_is_damaged_at_most(name, content, stopped):
    (stopped / "checkpoint-000005" / name).write_text(content)
    found, (message,) = checkpoint_to_resume(stopped, "auto")
    assert found == stopped / "checkpoint-000004" and message.endswith("manifest.json is damaged")


def test_a_name_in_a_manifest_that_no_file_can_have_is_a_missing_file(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"1" * 400: {"bytes": 1, "sha256": "x"}}}))
    assert verify(tmp_path)[-1] == f"{tmp_path / ('1' * 400)} is missing"


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "5"},
        {"step": -3},
        {"is_due": 1},
        {"identity": None},
        {"anomalies": {}},
        {"anomalies": {"recent": ["x"]}},
        {"streams": []},
    ],
)
def test_a_position_of_another_kind_is_refused(changes, stopped, data_dir, refuse):
    path = stopped / "checkpoint-000005/position.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    write_manifest(path.parent)
    (error,) = refuse(train_accelerate, *flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2))
    assert "checkpoint-000005/position.json is damaged, or of another program" in error


def test_a_checkpoint_of_another_version_is_refused_and_one_without_is_of_the_first(
    stopped, data_dir, refuse, monkeypatch
):
    folder = stopped / "checkpoint-000005"
    path, expected = folder / "position.json", Position.read(folder)
    content = json.loads(path.read_text())
    assert content.pop("format_version") == 1
    path.write_text(json.dumps(content))
    assert Position.read(folder) == expected
    path.write_text(json.dumps(content | {"format_version": 3, "anomalies": None}))
    write_manifest(folder)
    (error,) = refuse(train_accelerate, *flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2))
    assert "checkpoint-000005 has format version 3, this program reads 1" in error
    path.write_text(json.dumps(content))
    monkeypatch.setattr(state, "FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="has format version 1, this program reads 2"):
        Position.read(folder)


def test_weights_that_lack_one_are_refused(stopped, data_dir, refuse):
    folder = stopped / "checkpoint-000005"
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    write_manifest(folder)
    (error,) = refuse(train_accelerate, *flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2))
    assert "holds something else than a checkpoint: the weights are those of another model" in error


def test_a_finished_run_of_something_else_is_not_taken_for_this_one(stopped, data_dir, other_data, refuse):
    arguments = flags(data_dir, stopped, "--max_steps", 6, "--save_steps", 2)
    succeed(script("train_accelerate.py", *arguments))
    assert "holds a finished run; to train again" in succeed(script("train_accelerate.py", *arguments)).stdout
    errors = refuse(train_accelerate, *arguments, "--data_dir", other_data)
    assert any("holds a finished run, of other data: on documents.jsonl" in error for error in errors)
    (error,) = refuse(train_accelerate, *arguments, "--max_steps", 8)
    assert "of --max_steps 6, not 8: choose another --output_dir (to train its model further: --model_name" in error
    (error,) = refuse(train_accelerate, *arguments, "--gradient_accumulation_steps", 3)
    assert "holds a finished run, of 256 tokens per step, not 384" in error


def test_data_of_the_same_name_is_other_data_and_a_stream_keeps_its_processes():
    def run(fingerprint: str, num_processes: int) -> dict:
        same = {"settings": {}, "config": {}, "tokenizer": "t", "tokens_per_step": 64}
        return {**same, "data": {"name": "x", "fingerprint": fingerprint}, "binding": {"num_processes": num_processes}}

    assert differences(run("a", 1), run("a", 1), []) == []
    (difference,) = differences(run("a", 1), run("b", 2), [])
    assert difference.startswith("other data: on x, not on x, prepared in another way")
    assert differences(run("a", 1), run("b", 2), ["data"]) == []
    (difference,) = differences(run("a", 1), run("a", 2), ["data"])
    assert difference == "a stream with num_processes 1, not 2: it has to stay"


def test_a_flag_that_an_older_version_did_not_have_was_at_its_default():
    def run(**settings) -> dict:
        data = {"name": "x", "fingerprint": "a"}
        same = {"config": {}, "tokenizer": "t", "tokens_per_step": 64, "data": data, "binding": {}}
        return {**same, "settings": settings}

    defaults = {"seed": 42, "z_loss": 0.0}
    assert differences(run(seed=1), run(seed=1, z_loss=0.0), [], defaults) == []
    (difference,) = differences(run(seed=1), run(seed=1, z_loss=0.1), [], defaults)
    assert difference.startswith("--z_loss 0.0, not 0.1")


def wait_before_writing() -> None:
    """Have the thread that writes a checkpoint begin late, when training has gone on."""
    write = CheckpointWriter._write

    def late(*arguments):
        time.sleep(0.5)
        write(*arguments)

    CheckpointWriter._write = late


def test_a_checkpoint_that_is_written_late_holds_what_was_so_when_it_was_due(stopped, data_dir, tmp_path):
    arguments = flags(data_dir, tmp_path / "late", "--max_steps", 6, "--save_steps", 4)
    succeed(start("train_accelerate.py", *arguments, fault=wait_before_writing).wait())
    assert_equal_checkpoints(tmp_path / "late/checkpoint-000004", stopped / "checkpoint-000004")


def test_a_checkpoint_that_cannot_be_written_is_told_after_the_step_in_which_that_shows(data_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/training_args.yaml").write_text("{}\n")
    (tmp_path / "run/checkpoint-000030.incomplete").write_text("in the way, and not a folder of ours")
    result = script("train_accelerate.py", *flags(data_dir, tmp_path / "run", "--max_steps", 400, "--save_steps", 30))
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert "checkpoint-000030 cannot be written" in error
    assert metrics(tmp_path / "run")[-1]["step"] < 60


def test_the_state_of_torchs_muon_beside_adamw_is_taken_over(tmp_path):
    """As checkpoints of version 0.1.0 have it, from two optimizers."""
    old, new = tiny_model(), tiny_model()
    hidden, matrices, _, vectors = parameter_groups(old)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    both = [torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW(groups, lr=1e-2, fused=True)]
    for parameter in old.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    for optimizer in both:
        optimizer.step()
    accelerator, optimizer = Accelerator(cpu=True), build_optimizer(new, "muon", 1e-3, 0.2, torch.device("cpu"))
    settings = [{**group, "params": None, "betas": [*group["betas"]]} for group in optimizer.param_groups]
    with CheckpointWriter(accelerator, tmp_path, old, optimizer, save_total_limit=1) as writer:
        writer.optimizer = both  # torch's functions take several
        writer.save(Position(1, 0.5, False, {}, {"recent": []}, [None], generator_states(accelerator.device)))
        writer.wait()
    load_checkpoint(accelerator, tmp_path / "checkpoint-000001", new, optimizer)
    names = dict(new.named_parameters())
    for name, parameter in old.named_parameters():
        assert torch.equal(names[name], parameter)
        before = next(each.state[parameter] for each in both if parameter in each.state)
        assert_equal_states(dict(optimizer.state[names[name]]), dict(before))
    assert [{**group, "params": None} for group in optimizer.param_groups] == settings  # not those that were saved


@pytest.fixture
def num_threads():
    """More than one, whatever the machine has, until the test is over."""
    before = torch.get_num_threads()
    yield 3
    torch.set_num_threads(before)


def test_the_thread_that_writes_has_one_core_and_leaves_training_its_own(tmp_path, num_threads):
    torch.set_num_threads(num_threads)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    while_writing = []
    saved = functools.partial(CheckpointWriter, on_saved=lambda *_: while_writing.append(torch.get_num_threads()))
    with saved(Accelerator(cpu=True), tmp_path, model, optimizer, save_total_limit=1) as writer:
        writer.save(Position(1, 0.5, False, {}, {"recent": []}, [None]))
        writer.wait()
    assert while_writing == [1]
    assert torch.get_num_threads() == num_threads


def test_all_is_on_the_disk_before_it_gets_its_name(stopped, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append((str(old), str(new))), replace(old, new)))
    folder, final = tmp_path / "checkpoint-000009.incomplete", tmp_path / "checkpoint-000009"
    shutil.copytree(stopped / "checkpoint-000005", folder)
    (folder / "manifest.json").unlink()
    files = [str(path) for path in folder.iterdir()]
    commit(folder, final)
    renamed = calls.index((str(folder), str(final)))
    assert {*files, str(folder), str(folder / "manifest.json")} <= set(calls[:renamed])
    assert calls[renamed + 1 :] == [str(tmp_path)]
    assert verify(final) == []
