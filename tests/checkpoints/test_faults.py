"""What goes wrong in a run of days, made to happen: signals, losses, processes, memory. See docs/reliability.md."""

import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY, TINY, metrics, script, succeed
from safetensors.torch import load_file
from support.faults import (
    ACCUMULATION,
    BATCH,
    assert_equal,
    assert_equal_checkpoints,
    events,
    flags,
    kill_oneself,
    on_call,
    signal_in,
    timeless,
)
from support.processes import run_ranks, start, start_ranks, wait_until

from pretraining.checkpoints.folders import complete_checkpoints, verify
from pretraining.data.data_folder import open_data_folder
from pretraining.data.packed_rows import as_it_is
from pretraining.data.row_order import RowOrder, StepSplit
from pretraining.distributed import signals
from pretraining.distributed.signals import STOPPED
from pretraining.training.batch_size import fitting_batch_size, flags_for
from pretraining.training.flags import TrainArguments

# Rows 1, 3: signals, and going on to the same end


@pytest.fixture(scope="module")
def references(data_dir, tmp_path_factory) -> dict[int, Path]:
    """Whole runs of 16 steps, by number of processes, with dropout, across the end of an epoch."""
    folders = {}
    for num_processes in (1, 2):
        folders[num_processes] = tmp_path_factory.mktemp("whole") / "run"
        for result in run_ranks(num_processes, "train_accelerate.py", *long_flags(data_dir, folders[num_processes])):
            succeed(result)
    return folders


def long_flags(data_dir: Path, output_dir: Path) -> tuple:
    batch = len(open_data_folder(data_dir).train) // 20  # with one process, the epoch ends in step 11
    arguments = ("--per_device_train_batch_size", batch, "--max_steps", 16, "--save_steps", 7, "--eval_steps", 7)
    return flags(data_dir, output_dir, *arguments)


@pytest.mark.parametrize(
    ("num_processes", "rank", "number"), [(1, 0, signal.SIGTERM), (1, 0, signal.SIGINT), (2, 1, signal.SIGUSR1)]
)
def test_a_signal_to_any_process_saves_one_checkpoint_and_the_run_goes_on_to_the_same_bits(
    num_processes, rank, number, references, data_dir, tmp_path
):
    arguments = long_flags(data_dir, tmp_path / "run")
    # In the middle of the accumulation of step 7, after which an evaluation and a checkpoint are due.
    faults = {rank: signal_in(7, 1, number)}
    results = run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults)
    # It does not wait for the evaluation: that of step 7 is not among the lines.
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == []
    status = 130 if number == signal.SIGINT else STOPPED
    assert [result.returncode for result in results] == [status] * num_processes
    assert f"stopped by {signal.Signals(number).name}" in results[0].stdout
    last = complete_checkpoints(tmp_path / "run")[-1]
    assert last.name == "checkpoint-000007" and verify(last) == []

    # Killed once more, when the evaluation that was due is done but no later checkpoint is there.
    faults = {rank: signal_in(2, 0, signal.SIGKILL) for rank in range(num_processes)}  # the second after 7
    killed, *_ = run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults)
    assert "checkpoint-000007" in killed.stdout and killed.returncode == -signal.SIGKILL
    result, *_ = run_ranks(num_processes, "train_accelerate.py", *arguments)
    assert "checkpoint-000007" in succeed(result).stdout
    assert_equal(tmp_path / "run", references[num_processes])
    names = {path.name for path in references[num_processes].glob("*checkpoint*")}
    assert names == {"checkpoint-000007", "checkpoint-000014", "best-checkpoint"}
    assert {path.name for path in (tmp_path / "run").glob("*checkpoint*")} == names
    assert os.readlink(tmp_path / "run/best-checkpoint") == os.readlink(references[num_processes] / "best-checkpoint")


def test_a_second_ctrl_c_ends_at_once_but_for_a_launchers_echo_of_the_first(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with signals.StopSignals() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGINT)
        clock[0] += 0.5
        signal.raise_signal(signal.SIGINT)  # passed on by torchrun, say
        signal.raise_signal(signal.SIGTERM)  # as the launcher ends
        assert stop.received() == signal.SIGINT and stop.exit_status() == 130
        assert capsys.readouterr().err.count("once more ends it at once") == 1
        clock[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, 130)])
def test_a_signal_to_a_process_and_its_data_loader_workers_saves_a_checkpoint(number, status, data_dir, tmp_path):
    """As a service manager sends it to all that a service has started, or a terminal to all in the foreground."""
    running = start("train_accelerate.py", *flags(data_dir, tmp_path / "run", "--max_steps", 100_000, *WORKERS))
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists())
    process = psutil.Process(running.pid)
    workers = process.children()
    assert len(workers) == 2
    for each in (*workers, process):
        each.send_signal(number)
    assert running.wait().returncode == status
    assert len(complete_checkpoints(tmp_path / "run")) == 1
    assert not psutil.wait_procs(workers, timeout=60)[1]


WORKERS = ("--dataloader_num_workers", 2)


def test_a_signal_before_the_first_step_ends_the_process_at_once(data_dir, tmp_path):
    fault = functools.partial(on_call, fitting_batch_size, 1, functools.partial(kill_oneself, signal.SIGUSR1))
    result = start("train_accelerate.py", *flags(data_dir, tmp_path / "run"), fault=fault).wait()
    assert result.returncode == STOPPED
    assert "stopped by SIGUSR1 before the first step" in result.stderr
    succeed(script("train_accelerate.py", *flags(data_dir, tmp_path / "run", "--max_steps", 1)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_passes_nothing_on_takes_its_process_with_it(number, data_dir, tmp_path):
    """What `make train` uses: it starts one process, and would leave it behind."""
    words = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", REPOSITORY / "configs/cpu.yaml"]
    words += ["--cpu", "--quiet", "--mixed_precision", "no", REPOSITORY / "train_accelerate.py"]
    words += flags(data_dir, tmp_path / "run", "--max_steps", 100_000, "--eval_steps", 100_000)
    with open(tmp_path / "output", "w") as output:
        launcher = subprocess.Popen(list(map(str, words)), stdout=output, stderr=output)
    try:
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists())
        (process,) = psutil.Process(launcher.pid).children()
    finally:
        launcher.send_signal(number)
    launcher.wait()
    _, alive = psutil.wait_procs([process], timeout=60)
    for each in alive:
        each.kill()
    assert not alive
    (folder,) = complete_checkpoints(tmp_path / "run")
    assert verify(folder) == []


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
    elapsed = [line["elapsed_seconds"] for line in metrics(tmp_path / "run")]
    assert elapsed == sorted(elapsed)
    assert_equal_checkpoints(
        tmp_path / "run/checkpoint-000014", references[num_processes] / "checkpoint-000014"
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
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(300) != 0
    finally:
        launcher.kill()
    (folder,) = complete_checkpoints(tmp_path / "run")
    assert verify(folder) == []
    # Both have ended by themselves: the launcher kills after half a minute what has not, and says so.
    assert "stopped by SIGTERM" in (tmp_path / "output").read_text()
    assert "SIGKILL" not in (tmp_path / "output").read_text()


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
    rows, numbers = zip(*(row_of(data_dir, step, num_processes, guilty)[1:] for step in (2, 4)), strict=True)
    more = ("--max_steps", 4, "--save_steps", 1, "--eval_steps", 100)
    faults = {rank: functools.partial(poison, rows, kind) for rank in range(num_processes)}
    results = run_ranks(num_processes, "train_accelerate.py", *flags(data_dir, tmp_path / "run", *more), faults=faults)
    for result in results:
        succeed(result)
    first, third, last = (
        load_file(tmp_path / "run" / folder / "model.safetensors")
        for folder in ("checkpoint-000001", "checkpoint-000003", ".")
    )
    assert all(torch.equal(third[name], last[name]) for name in third)
    assert not all(torch.equal(first[name], third[name]) for name in third)
    state = torch.load(tmp_path / "run/checkpoint-000003/optimizer.pt")["optimizers"]["state"]
    assert {int(moments["step"]) for moments in state.values()} == {2}  # updates, of three steps
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-000001", "checkpoint-000003"]
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 3]
    event = events(tmp_path / "run")[1]
    assert [each["step"] for each in events(tmp_path / "run")] == [2, 4]
    assert (event["event"], event["update"]) == ("not_finite", "left out")
    assert (event["loss"] is None) == (kind == "loss") and (event["grad_norm"] is None)
    (micro_batch,) = event["micro_batches"]
    assert (micro_batch["process"], micro_batch["micro_batch"]) == (guilty, ACCUMULATION - 1)
    assert micro_batch["rows"] == numbers[1] and len(micro_batch["texts"]) == BATCH
    rows = ", ".join(map(str, numbers[1]))
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
    assert "3 steps in a row were left out, the last one: step 7: loss not finite (process 0, rows " in error
    assert "checkpoint-000004 is from before" in error
    assert verify(tmp_path / "run/checkpoint-000004") == []

    # The same command goes on from there. Once the cause is gone, it is the run that it would have been.
    result = run_ranks(num_processes, "train_accelerate.py", *arguments)[0]
    assert "checkpoint-000004" in succeed(result).stdout
    succeed(run_ranks(num_processes, "train_accelerate.py", *flags(data_dir, tmp_path / "whole", *more))[0])
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_goes_wrong_from_the_first_step_keeps_its_records(data_dir, tmp_path):
    rows = [row_of(data_dir, step, 1, 0)[1] for step in (1, 2, 3)]
    arguments = flags(data_dir, tmp_path / "run", "--max_steps", 9, "--max_nonfinite_steps", 3)
    result = start("train_accelerate.py", *arguments, fault=functools.partial(poison, rows, "loss")).wait()
    assert result.returncode == 2 and "there is no checkpoint from before" in result.stderr
    assert len((tmp_path / "run/events.jsonl").read_text().splitlines()) == 3


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
    arguments += ("--resume_from_checkpoint", tmp_path / "run/checkpoint-000072")
    succeed(run_ranks(num_processes, "train_accelerate.py", *arguments, faults=faults)[0])
    assert events(tmp_path / "run") == [event] and timeless(tmp_path / "run") == log


# Row 11: a process is missing


def fail() -> None:
    raise RuntimeError("the device is broken")


@pytest.mark.parametrize(
    ("num_processes", "victim", "action"),
    [
        (3, 2, functools.partial(kill_oneself, signal.SIGKILL)),
        (3, 1, fail),
        (2, 0, functools.partial(kill_oneself, signal.SIGSTOP)),
        (2, 1, functools.partial(kill_oneself, signal.SIGSTOP)),
    ],
    ids=["dies", "fails", "first-stalls", "second-stalls"],
)
def test_a_process_that_dies_or_stalls_is_named_by_the_others(num_processes, victim, action, data_dir, tmp_path):
    arguments = flags(data_dir, tmp_path / "run", "--max_steps", 100_000, "--ddp_timeout", 8)
    fault = functools.partial(on_call, Accelerator.accumulate, 10, action)
    processes = start_ranks(num_processes, "train_accelerate.py", *arguments, faults={victim: fault})
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        results = [process.wait() for process in others]  # not after the half hour that --ddp_timeout is by default
    finally:
        for process in processes:
            process.process.kill()
    assert [result.returncode for result in results] == [1] * len(others)
    said = "".join(result.stderr for result in results)
    assert f"error: process {victim} does not answer: it has died or stalls (said by process " in said
    assert not [rank for rank in range(num_processes) if rank != victim and f"process {rank} does not answer" in said]


def test_a_process_that_others_wait_for_says_what_it_is_doing(data_dir, tmp_path):
    fault = functools.partial(on_call, as_it_is, 5 * ACCUMULATION, functools.partial(time.sleep, 60))
    arguments = flags(data_dir, tmp_path / "run", "--max_steps", 100_000, "--ddp_timeout", 5)
    processes = start_ranks(2, "train_accelerate.py", *arguments, faults={1: fault})
    try:
        result = processes[0].wait()
    finally:
        processes[1].process.kill()
    assert result.returncode == 1
    assert "error: process 1 is reading the rows of step 5, this one is in step 5 (said by process 0)" in result.stderr


# Row 12: memory


def limit_memory(megabytes: int) -> None:
    """
    What the process may take from when the model is there until the size that fits is found: what is limited is not
    a device's memory but all that the process has, and Python hangs where there is none for a thread that has begun.
    """
    _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)

    def limit() -> None:
        taken = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (taken + megabytes * 1_000_000, hard_limit))

    on_call(fitting_batch_size, 1, limit)
    on_call(flags_for, 1, lambda: resource.setrlimit(resource.RLIMIT_DATA, (hard_limit, hard_limit)))


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
    fault = {num_processes - 1: functools.partial(limit_memory, 240)}
    results = run_ranks(num_processes, "train_accelerate.py", *arguments, faults=fault)
    assert [result.returncode for result in results] == [2] * num_processes
    (error,) = [line for line in results[0].stderr.splitlines() if "error:" in line]
    assert "out of memory with --per_device_train_batch_size 1024: --per_device_train_batch_size " in error
    assert " fits and trains the same (--auto_batch_size goes on with it)" in error

    # How much is free differs from start to start, and so can the size that fits.
    result, *_ = run_ranks(num_processes, "train_accelerate.py", *arguments, "--auto_batch_size", faults=fault)
    fits = r"with --per_device_train_batch_size (\d+) with --gradient_accumulation_steps (\d+)"
    sizes = [re.search(fits, text) for text in ("with " + error.split("1024: ")[1], succeed(result).stdout)]
    for size, accumulation in (map(int, found.groups()) for found in sizes):
        assert size * accumulation == 1024 * ACCUMULATION and 1 < size < 1024
    more += ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
    succeed(run_ranks(num_processes, "train_accelerate.py", *flags(data_dir, tmp_path / "small", *more))[0])
    assert_equal(tmp_path / "run", tmp_path / "small")


def test_of_tokens_per_step_the_advice_names_no_accumulation_which_it_works_out():
    split = StepSplit(8, gradient_accumulation_steps=3, num_processes=2, process_index=0, num_workers=0)
    flags = {tokens: flags_for(TrainArguments(tokens_per_step=tokens), split, 4) for tokens in (None, 48 * 32)}
    assert flags[None] == "--per_device_train_batch_size 4 with --gradient_accumulation_steps 6"
    assert flags[48 * 32] == "--per_device_train_batch_size 4"
    assert split.with_batch_size(4).rows_per_step == split.rows_per_step


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
