"""What goes wrong in a run of days, made to happen. The rows are those of the table in docs/reliability.md."""

import functools
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, metrics, script, succeed
from processes import run_ranks, start, start_ranks, wait_until
from safetensors.torch import load_file

import train_accelerate
from pretraining.checkpoint_folders import checkpoint_to_resume, complete_checkpoints, verify
from pretraining.data import RowOrder, open_data_folder
from pretraining.signals import STOPPED

DROPOUT = TINY + ",resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1"
BATCH, ACCUMULATION = 4, 2  # of 8 rows a step and process


def flags(data_dir: Path, output_dir: Path, *more: object) -> tuple:
    return (
        *("--data_dir", data_dir, "--output_dir", output_dir, "--config_overrides", DROPOUT, "--report_to", "none"),
        *("--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", ACCUMULATION),
        *("--logging_steps", 1, "--eval_iters", 1, "--save_total_limit", 100, *more),
    )


def timeless(output_dir: Path) -> list[dict]:
    return [{key: line[key] for key in line if "second" not in key} for line in metrics(output_dir)]


def events(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "events.jsonl").read_text().splitlines()]


def assert_equal(output_dir: Path, reference: Path) -> None:
    """The last weights and all that was logged, to the last bit."""
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output_dir, reference))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert timeless(output_dir) == timeless(reference)


def assert_equal_checkpoints(folder: Path, reference: Path) -> None:
    """Weights, optimizers and random generators, to the last bit."""
    for name in ("optimizer.pt", "rng.pt"):
        assert_equal_states(torch.load(folder / name), torch.load(reference / name))
    assert_equal_states(load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors"))


def assert_equal_states(state: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert state.keys() == expected.keys()
        for key in expected:
            assert_equal_states(state[key], expected[key])
    elif isinstance(expected, list | tuple):  # torch gives the betas back as a list
        assert len(state) == len(expected)
        for each, other in zip(state, expected, strict=True):
            assert_equal_states(each, other)
    else:
        assert torch.equal(state, expected) if isinstance(expected, torch.Tensor) else state == expected


def on_call(function: str, number: int, action) -> None:
    """Have `action` happen at a call of `pretraining.<module>.<name>`, counted from 1, in this process."""
    module_name, name = function.split(".")
    module = __import__(f"pretraining.{module_name}", fromlist=[name])
    original, calls = getattr(module, name), 0

    @functools.wraps(original)
    def counting(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*arguments, **keywords)

    setattr(module, name, counting)


def kill_oneself(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_in(step: int, micro_step: int, number: int) -> functools.partial:
    """A signal that a process sends itself before a micro-batch of a step."""
    call = (step - 1) * ACCUMULATION + micro_step + 1
    return functools.partial(on_call, "steps._backward", call, functools.partial(kill_oneself, number))


# Rows 1, 3: signals, and going on to the same end


@pytest.fixture(scope="module")
def references(data_dir, tmp_path_factory) -> dict[int, Path]:
    """Whole runs of 14 steps, by number of processes, with dropout, across the end of an epoch."""
    folders = {}
    for num_processes in (1, 2):
        folders[num_processes] = tmp_path_factory.mktemp("whole") / "run"
        for result in run_ranks(num_processes, "train_accelerate.py", *long_flags(data_dir, folders[num_processes])):
            succeed(result)
    return folders


def long_flags(data_dir: Path, output_dir: Path) -> tuple:
    batch = len(open_data_folder(data_dir).train) // 20  # with one process, the epoch ends in step 11
    arguments = ("--per_device_train_batch_size", batch, "--max_steps", 14, "--save_steps", 6, "--eval_steps", 7)
    return flags(data_dir, output_dir, *arguments)


@pytest.mark.parametrize(("num_processes", "rank", "number"), [(1, 0, signal.SIGTERM), (2, 1, signal.SIGUSR1)])
def test_a_signal_to_any_process_saves_one_checkpoint_and_the_run_goes_on_to_the_same_bits(
    num_processes, rank, number, references, data_dir, tmp_path
):
    arguments = long_flags(data_dir, tmp_path / "run")
    started = time.monotonic()
    # In the middle of the accumulation of step 7, after which an evaluation is due.
    faults = {rank: signal_in(7, 1, number)}
    results = run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults)
    assert time.monotonic() - started < 30
    assert [result.returncode for result in results] == [STOPPED] * num_processes
    assert f"stopped by {signal.Signals(number).name}" in results[0].stdout
    last = complete_checkpoints(tmp_path / "run")[-1]
    assert last.name == "checkpoint-000007" and verify(last) == []

    for result in run_ranks(num_processes, "train_accelerate.py", *arguments):
        assert "checkpoint-000007" in succeed(result).stdout or result.stdout == ""
    assert_equal(tmp_path / "run", references[num_processes])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_killed_within_an_accumulation_goes_on_to_the_same_bits(num_processes, references, data_dir, tmp_path):
    arguments = long_flags(data_dir, tmp_path / "run")
    faults = {rank: signal_in(9, 1, signal.SIGKILL) for rank in range(num_processes)}
    for result in run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults):
        assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "run/model.safetensors").exists()
    result, *_ = run_ranks(num_processes, "train_accelerate.py", *arguments)
    assert "continuing from" in succeed(result).stdout
    assert_equal(tmp_path / "run", references[num_processes])
    assert_equal_checkpoints(
        tmp_path / "run/checkpoint-000012", references[num_processes] / "checkpoint-000012"
    )  # the optimizer and the generators too


def test_a_signal_to_the_launcher_saves_a_checkpoint(data_dir, tmp_path):
    accelerate = Path(sys.executable).with_name("accelerate")
    config = ("--config_file", REPOSITORY / "configs/cpu.yaml", "--num_processes", 2, "--mixed_precision", "no")
    more = ("--max_steps", 100_000, "--eval_steps", 100_000)
    words = [accelerate, "launch", *config, REPOSITORY / "train_accelerate.py"]
    words += flags(data_dir, tmp_path / "run", *more)
    with open(tmp_path / "output", "w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen([str(word) for word in words], env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists())
        started = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) != 0
        assert time.monotonic() - started < 30
    finally:
        launcher.kill()
    (folder,) = complete_checkpoints(tmp_path / "run")
    assert verify(folder) == []


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


@pytest.mark.parametrize(("num_processes", "stride"), [(1, 1), (2, 11)])
def test_killed_at_any_moment_of_saving_the_next_start_takes_the_last_whole_checkpoint(
    num_processes, stride, data_dir, tmp_path
):
    """One run, killed in its first save after each start, each time some calls later, until that save is through."""
    output_dir, number, litter, skipped = tmp_path / "run", 1, [], 0
    last = None  # the last whole checkpoint
    more = ("--max_steps", 120, "--save_steps", 3, "--save_total_limit", 1, "--eval_steps", 5)
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
def other_data(tmp_path_factory) -> Path:
    """Another text, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 40}) + "\n" for n in range(300)))
    prepare = ("--train_file", folder / "other.jsonl", "--tokenizer_vocab_size", 320, "--block_size", 32)
    succeed(script("prepare_data.py", "--output_dir", folder / "data", *prepare))
    return folder / "data"


def test_what_is_named_may_differ(stopped, data_dir):
    changes = ("--learning_rate", 1e-5, "--max_steps", 8, "--allow_changes", "learning_rate", "max_steps")
    result = succeed(script("train_accelerate.py", *flags(data_dir, stopped, "--save_steps", 2, *changes)))
    assert "continuing from" in result.stdout
    rates = {line["step"]: line["learning_rate"] for line in metrics(stopped) if "loss" in line}
    assert len(rates) == 8 and rates[5] > 1e-5 > rates[6] > rates[8]


def test_the_number_of_processes_may_change_where_the_global_batch_stays(references, data_dir, tmp_path):
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
    (error,) = refuse(train_accelerate, *arguments)
    assert "is in use by another program" in error
    running.process.kill()
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
        pytest.skip("this system lets nobody mount a small disk")
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


def test_rotation_keeps_the_best_and_the_latest_and_leaves_foreign_folders_alone(data_dir, tmp_path):
    output_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "checkpoint-000001").mkdir(parents=True)
    (elsewhere / "checkpoint-000001/manifest.json").write_text("{}")
    for name in (
        "checkpoint-000002",
        "checkpoint-best",
        "checkpoint-1 (copy)",
        "checkpoint-000000x",
        "mine.incomplete",
    ):
        (output_dir / name).mkdir(parents=True)
        (output_dir / name / "notes.txt").write_text(name)
    (output_dir / "checkpoint-000001").symlink_to(elsewhere / "checkpoint-000001")
    (output_dir / "training_args.yaml").write_text("{}\n")
    foreign = {path for path in output_dir.rglob("*") if path.name != "training_args.yaml"}
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
    assert (elsewhere / "checkpoint-000001/manifest.json").read_text() == "{}"


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


# Rows 9, 10: loss and gradients


def poison(rows: list[list[int]], kind: str) -> None:
    """Have micro-batches with these rows go wrong in training: their loss, or only their gradients."""
    from modeling_gpt2scratch import GPT2ScratchForCausalLM

    forward = GPT2ScratchForCausalLM.forward
    poisonous = {tuple(row) for row in rows}

    @functools.wraps(forward)
    def poisoned(self, input_ids=None, **keywords):
        output = forward(self, input_ids, **keywords)
        if self.training and poisonous & {tuple(row) for row in input_ids.tolist()}:
            if kind == "loss":
                output.loss = output.loss * math.inf
            elif kind == "gradient":
                output.loss.register_hook(lambda gradient: gradient * math.nan)
            else:
                output.loss = output.loss * 30
        return output

    GPT2ScratchForCausalLM.forward = poisoned


def row_of(data_dir: Path, step: int, num_processes: int, process: int) -> tuple[int, list[int], list[int]]:
    """A row of the last micro-batch of a step of a process: its number, its tokens, and its neighbours' numbers."""
    train = open_data_folder(data_dir).train
    order = RowOrder([len(train)], BATCH, ACCUMULATION, num_processes, process, seed=42)
    numbers = order.rows(step - 1, ACCUMULATION - 1)
    return numbers[1], train[numbers[1]].tolist(), numbers


@pytest.mark.parametrize(("num_processes", "kind"), [(1, "loss"), (2, "loss"), (1, "gradient"), (2, "gradient")])
def test_what_is_not_finite_changes_no_weight_and_is_told_with_step_process_and_rows(
    num_processes, kind, data_dir, tmp_path
):
    guilty = num_processes - 1
    _, row, numbers = row_of(data_dir, 4, num_processes, guilty)
    more = ("--max_steps", 6, "--save_steps", 1, "--eval_steps", 100)
    faults = {rank: functools.partial(poison, [row], kind) for rank in range(num_processes)}
    results = run_ranks(num_processes, "train_accelerate.py", *flags(data_dir, tmp_path / "run", *more), faults=faults)
    for result in results:
        succeed(result)
    third, fourth, fifth = (
        load_file(tmp_path / f"run/checkpoint-00000{step}/model.safetensors") for step in (3, 4, 5)
    )
    assert all(torch.equal(third[name], fourth[name]) for name in third)
    assert not all(torch.equal(fourth[name], fifth[name]) for name in third)
    optimizers = [torch.load(tmp_path / f"run/checkpoint-00000{step}/optimizer.pt")["optimizers"] for step in (3, 4)]
    assert_equal_states(optimizers[1]["state"], optimizers[0]["state"])
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 5, 6]
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"], event["update"]) == (4, "not_finite", "left out")
    assert (event["loss"] is None) == (kind == "loss") and (event["grad_norm"] is None)
    (micro_batch,) = event["micro_batches"]
    assert (micro_batch["process"], micro_batch["micro_batch"]) == (guilty, ACCUMULATION - 1)
    assert micro_batch["rows"] == numbers and len(micro_batch["texts"]) == BATCH
    rows = ", ".join(map(str, numbers))
    assert f"warning: step 4: {kind} not finite (process {guilty}, rows {rows}), its update left" in results[0].stdout


@pytest.mark.parametrize("num_processes", [1, 2])
def test_several_in_a_row_end_the_run_with_a_checkpoint_from_before(num_processes, data_dir, tmp_path):
    rows = [row_of(data_dir, step, num_processes, 0)[1] for step in (5, 6, 7)]
    more = ("--max_steps", 9, "--save_steps", 6, "--eval_steps", 100, "--max_nonfinite_steps", 3)
    arguments = flags(data_dir, tmp_path / "run", *more)
    faults = {rank: functools.partial(poison, rows, "loss") for rank in range(num_processes)}
    results = run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults)
    assert [result.returncode for result in results] == [2] * num_processes
    (error,) = [line for line in results[0].stderr.splitlines() if "error:" in line]
    assert "3 steps in a row were left out, the last as step 7: loss not finite (process 0, rows " in error
    assert "checkpoint-000004 is from before" in error
    assert verify(tmp_path / "run/checkpoint-000004") == []

    # From there, once the cause is gone, it is the run that it would have been.
    result = run_ranks(
        num_processes,
        "train_accelerate.py",
        *arguments,
        "--resume_from_checkpoint",
        tmp_path / "run/checkpoint-000004",
    )[0]
    assert "checkpoint-000004" in succeed(result).stdout
    succeed(run_ranks(num_processes, "train_accelerate.py", *flags(data_dir, tmp_path / "whole", *more))[0])
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_weights_that_are_not_finite_are_not_saved(data_dir, tmp_path):
    more = (
        "--learning_rate",
        3e38,
        "--max_grad_norm",
        0,
        "--weight_decay",
        1e30,
        "--max_steps",
        20,
        "--save_steps",
        1,
    )
    result = script("train_accelerate.py", *flags(data_dir, tmp_path / "run", *more))
    assert result.returncode == 2
    assert "the weights after step 1 are not finite, they are not saved" in result.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    # Nothing was lost, so the folder takes a better try.
    succeed(script("train_accelerate.py", *flags(data_dir, tmp_path / "run", "--max_steps", 2)))


@pytest.mark.parametrize(("num_processes", "is_skipped"), [(1, False), (2, True)])
def test_a_spike_is_told_with_its_rows_and_left_out_if_asked_for(num_processes, is_skipped, data_dir, tmp_path):
    _, row, numbers = row_of(data_dir, 75, num_processes, num_processes - 1)
    more = ("--max_steps", 78, "--save_steps", 1, "--eval_steps", 100, *(["--skip_loss_spikes"] if is_skipped else []))
    arguments = flags(data_dir, tmp_path / "run", *more)
    faults = {rank: functools.partial(poison, [row], "spike") for rank in range(num_processes)}
    results = run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults)
    assert "warning: step 75: loss " in succeed(results[0]).stdout
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (75, "loss_spike") and event["deviations"] > 6
    assert event["update"] == ("left out" if is_skipped else "applied")
    assert [each["rows"] for each in event["micro_batches"]][-1] == numbers
    before, after = (load_file(tmp_path / f"run/checkpoint-0000{step}/model.safetensors") for step in (74, 75))
    assert all(torch.equal(before[name], after[name]) for name in before) == is_skipped

    # What went before is part of the saved state: gone on from a checkpoint, it is a spike again.
    log = timeless(tmp_path / "run")
    (tmp_path / "run/model.safetensors").unlink()
    (tmp_path / "run/events.jsonl").write_text("")
    arguments += ("--resume_from_checkpoint", tmp_path / "run/checkpoint-000072")
    succeed(run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults)[0])
    assert events(tmp_path / "run") == [event] and timeless(tmp_path / "run") == log


# Row 11: a process is missing


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_stalls_is_named_by_the_others(number, data_dir, tmp_path):
    more = ("--max_steps", 100_000, "--ddp_timeout", 8)
    arguments = flags(data_dir, tmp_path / "run", *more)
    started = time.monotonic()
    processes = start_ranks(2, "train_accelerate.py", *arguments, faults={1: signal_in(5, 1, number)})
    try:
        result = processes[0].wait(60)
    finally:
        processes[1].process.kill()
    assert result.returncode == 1
    assert time.monotonic() - started < 30
    assert "error: process 1 does not answer: it has died or stalls (said by process 0)" in result.stderr


def test_a_process_that_others_wait_for_says_what_it_is_doing(data_dir, tmp_path):
    fault = functools.partial(on_call, "data.as_it_is", 5 * ACCUMULATION, functools.partial(time.sleep, 60))
    arguments = flags(data_dir, tmp_path / "run", "--max_steps", 100_000, "--ddp_timeout", 5)
    processes = start_ranks(2, "train_accelerate.py", *arguments, faults={1: fault})
    result = processes[0].wait(60)
    assert result.returncode == 1
    assert "error: process 1 is reading the rows of step 5, this one is in step 5 (said by process 0)" in result.stderr
    processes[1].process.kill()


# Row 12: memory


def limit_memory(megabytes: int) -> None:
    """What the process may take from when the model is there."""

    def limit() -> None:
        taken = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        size = taken + megabytes * 1_000_000
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    on_call("memory.fitting_batch_size", 1, limit)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_does_not_fit_into_memory_is_told_with_what_does_and_halved_if_asked_for(
    num_processes, data_dir, tmp_path
):
    """One process has less memory than it needs, the other has enough."""
    more = (
        "--max_steps",
        3,
        "--eval_steps",
        100,
        "--save_steps",
        100,
        "--config_overrides",
        TINY,
        "--attn_implementation",
        "eager",
    )
    arguments = flags(data_dir, tmp_path / "run", *more, "--per_device_train_batch_size", 1024)
    fault = {num_processes - 1: functools.partial(limit_memory, 200)}
    results = run_ranks(num_processes, "train_accelerate.py", *arguments, faults=fault)
    assert [result.returncode for result in results] == [2] * num_processes
    (error,) = [line for line in results[0].stderr.splitlines() if "error:" in line]
    size, accumulation = map(
        int,
        re.search(
            r"out of memory with --per_device_train_batch_size 1024: --per_device_train_batch_size (\d+) with "
            r"--gradient_accumulation_steps (\d+) fits and trains the same",
            error,
        ).groups(),
    )
    assert size * accumulation == 1024 * ACCUMULATION and 1 < size < 1024

    result, *_ = run_ranks(num_processes, "train_accelerate.py", *arguments, "--auto_batch_size", faults=fault)
    assert f"going on with --per_device_train_batch_size {size}" in succeed(result).stdout
    more += ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
    succeed(run_ranks(num_processes, "train_accelerate.py", *flags(data_dir, tmp_path / "small", *more))[0])
    assert_equal(tmp_path / "run", tmp_path / "small")


# Row 15: data


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_token_that_the_model_does_not_know_is_an_error_before_the_device_sees_it(num_processes, data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    (shard,) = folder.glob("train/*.arrow")
    _, row, _ = row_of(data_dir, 3, num_processes, num_processes - 1)
    content = bytearray(shard.read_bytes())
    packed = b"".join(token.to_bytes(2, "little") for token in row)
    at = content.index(packed)
    content[at : at + 2] = (777).to_bytes(2, "little")
    shard.write_bytes(content)
    text = (folder / "dataset.json").read_text()
    digest = json.loads(text)["splits"]["train"]["shards"][0]["sha256"]
    (folder / "dataset.json").write_text(text.replace(digest, hashlib.sha256(content).hexdigest()))
    results = run_ranks(num_processes, "train_accelerate.py", *flags(folder, tmp_path / "run", "--max_steps", 5))
    assert all(result.returncode in (1, 2) for result in results)
    assert results[-1].returncode == 2
    assert "error: the data has the token id 777, but the model's vocabulary ends with 319" in results[-1].stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
