"""Device and precision follow from what torch reports, and from what was asked for."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, run, script, succeed

from pretraining.hardware import physical_cores
from pretraining.precision import choose_precision, muon_dtype

CUDA, XPU, MPS, CPU = map(torch.device, ("cuda", "xpu", "mps", "cpu"))
# The scripts' own way to a device and a precision, on a machine where torch says that it has others.
OPEN = """
import sys, torch
kind = sys.argv[1]
if kind == "cuda":
    torch.cuda.is_available = lambda: True
if kind == "mps":
    torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
if kind == "xpu":
    torch.xpu.is_available = lambda: True
from pretraining.distributed.processes import open_state
print("device:", open_state().device.type)
"""


def has_bf16(monkeypatch, device: torch.device, answer: bool) -> None:
    """As torch.cuda answers on a T4: bf16 is supported, but only by emulation."""
    module = torch.get_device_module(device)
    monkeypatch.setattr(module, "is_bf16_supported", lambda including_emulation=True: including_emulation or answer)


@pytest.mark.parametrize("device", [CUDA, XPU])
def test_a_gpu_trains_in_bf16_where_it_has_the_hardware_and_else_in_fp16(device, monkeypatch):
    has_bf16(monkeypatch, device, True)
    assert str(choose_precision(device, None)) == "bf16 (this GPU multiplies it in hardware)"
    assert muon_dtype(device, "bf16") == torch.bfloat16
    has_bf16(monkeypatch, device, False)
    assert str(choose_precision(device, None)) == "fp16 (with loss scaling, this GPU has no bf16 hardware)"
    assert muon_dtype(device, "bf16") == muon_dtype(device, "fp16") == torch.float32


def test_an_apple_gpu_trains_in_fp32():
    assert choose_precision(MPS, None).mixed_precision == "no"


def test_other_accelerators_answer_without_emulation(monkeypatch):
    module = type("npu", (), {"is_bf16_supported": staticmethod(lambda: True)})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert choose_precision(torch.device("privateuseone"), None).mixed_precision == "bf16"


def on_this_cpu(**environment: str) -> list[str]:
    code = (
        "import torch; from pretraining.precision import choose_precision as choose; cpu = torch.device('cpu');"
        "print(choose(cpu, None).mixed_precision, choose(cpu, 'bf16').warning, choose(cpu, 'no').warning, sep='\\n')"
    )
    return succeed(run(sys.executable, "-c", code, **environment)).stdout.splitlines()


def test_a_cpu_without_bf16_instructions_trains_in_fp32():
    """oneDNN, which multiplies for torch, can be told to do without them, so this is real on every x86-64 CPU."""
    precision, warning_of_bf16, warning_of_fp32 = on_this_cpu(ONEDNN_MAX_CPU_ISA="AVX2")
    assert (precision, warning_of_fp32) == ("no", "None")
    assert warning_of_bf16.startswith("this CPU has no bf16 hardware, so bf16 is much slower than fp32")


def test_a_cpu_with_bf16_instructions_trains_in_bf16():
    capabilities = torch.cpu.get_capabilities()
    precision, warning_of_bf16, warning_of_fp32 = on_this_cpu()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        assert (precision, warning_of_bf16) == ("bf16", "None")
        assert warning_of_fp32.startswith("bf16 is several times as fast as fp32 on this CPU")
    elif capabilities["architecture"] == "x86_64":
        assert precision == "no"


@pytest.mark.parametrize("told", ["no", "fp16", "bf16"])
def test_what_was_asked_for_is_obeyed(told, monkeypatch):
    has_bf16(monkeypatch, CUDA, told != "bf16")
    chosen = choose_precision(CUDA, told)
    assert chosen.mixed_precision == told and chosen.reason == "as asked for"
    warnings = {
        "no": "bf16 is several times as fast as fp32 on this GPU: leave --mixed_precision out to have it chosen",
        "fp16": None,
        "bf16": "this GPU has no bf16 hardware, so bf16 is much slower than fp16: leave --mixed_precision out to have "
        "it chosen",
    }
    assert chosen.warning == warnings[told]


def test_a_precision_that_there_is_not_is_refused_in_one_line(data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY)
    result = script("train_accelerate.py", *flags, ACCELERATE_MIXED_PRECISION="fp64")
    assert result.returncode == 2
    assert "error: mixed precision fp64 is unknown: ask for no (which is fp32), fp16 or bf16\n" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "environment", "device"),
    [
        ("cuda", {}, "cuda"),
        ("mps", {}, "mps"),
        ("xpu", {}, "xpu"),
        ("none", {}, "cpu"),
        ("cuda", {"ACCELERATE_USE_CPU": "1"}, "cpu"),
    ],
)
def test_the_scripts_take_the_accelerator_that_is_there_unless_the_launch_says_cpu(
    kind, environment, device, tmp_path
):
    program = tmp_path / "open.py"
    program.write_text(OPEN)
    assert f"device: {device}\n" in succeed(script(program, kind, **environment)).stdout


# What `accelerate launch` tells a script, and how many threads it then has. One run for all of a config's processes.
TOLD = """
import sys
sys.path.insert(0, {repository!r})
import torch
from pretraining.distributed.processes import open_state
from pretraining.distributed.launcher import told_precision
state = open_state()
print(f"told {{told_precision()}}, {{torch.get_num_threads()}} threads, process {{state.process_index}}\\n", end="")
"""


@pytest.mark.parametrize(
    ("flags", "told", "num_processes"),
    [
        (["--config_file", "configs/one_device.yaml"], None, 1),
        (["--config_file", "asked.yaml", "--num_cpu_threads_per_process", "1"], "no", 1),
        (["--config_file", "configs/cpu.yaml", "--num_processes", "2", "--mixed_precision", "bf16"], "bf16", 2),
    ],
)
def test_the_launcher_hands_on_what_it_was_told(flags, told, num_processes, tmp_path):
    program = tmp_path / "told.py"
    program.write_text(TOLD.format(repository=str(REPOSITORY)))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "asked.yaml").write_text("distributed_type: 'NO'\nnum_processes: 1\nmixed_precision: 'no'\n")
    environment = {"HF_HOME": str(tmp_path)}  # where accelerate's own default config would be
    # Without a word on threads, for which the tests have a variable.
    command = ["env", "-u", "OMP_NUM_THREADS", Path(sys.executable).with_name("accelerate"), "launch", *flags, program]
    result = succeed(run(*command, cwd=tmp_path, **environment))
    one_thread = "--num_cpu_threads_per_process" in flags
    threads = 1 if one_thread else max(1, physical_cores() // num_processes)
    for rank in range(num_processes):
        assert f"told {told}, {threads} threads, process {rank}\n" in result.stdout
