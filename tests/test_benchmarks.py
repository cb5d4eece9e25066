"""
The page of figures is written where its places are, and nowhere else; the demo's steps follow from its speed; the one
command for a GPU, as a dry run on the CPU.
"""

import re
import sys

import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY, TINY, run, script, succeed
from support.processes import wait_until

from benchmarks import demo_steps, gpu, report, side_by_side, training_step
from benchmarks.report import replace_section
from pretraining.cli import run_script

PAGE = "# Speed\n\n<!-- one -->\nold\n<!-- /one -->\n\nby hand\n\n<!-- two -->\n<!-- /two -->\n"


def test_a_section_takes_the_place_of_the_one_before():
    page = replace_section(replace_section(PAGE, "one", "| \\1 | new |\n\n"), "two", "2")
    assert page == PAGE.replace("old", "| \\1 | new |").replace("<!-- two -->\n", "<!-- two -->\n2\n")


@pytest.mark.parametrize("page", [PAGE.replace("one", "other"), PAGE + PAGE])
def test_a_page_without_its_place_is_refused(page):
    with pytest.raises(ValueError, match="places <!-- one -->, instead of one"):
        replace_section(page, "one", "new")


def test_the_page_of_this_repository_has_a_place_for_every_benchmark():
    for name in [*report.USUAL, *report.BY_NAME, gpu.NAME]:
        assert (report.FOLDER / f"{name}.py").exists()
        replace_section(report.PAGE.read_text(), name, "figures")


def test_a_benchmark_that_fails_leaves_the_page_as_it_was(tmp_path, monkeypatch, capfd):
    (tmp_path / "good.py").write_text("print('figures')")
    (tmp_path / "bad.py").write_text("print('half of them')\nraise SystemExit(1)")
    page = tmp_path / "page.md"
    page.write_text("<!-- bad -->\nold\n<!-- /bad -->\n<!-- good -->\nold\n<!-- /good -->\n")
    for name, value in (("FOLDER", tmp_path), ("PAGE", page), ("USUAL", ["bad", "good"])):
        monkeypatch.setattr(report, name, value)
    assert report.main([]) == 1
    assert page.read_text() == "<!-- bad -->\nold\n<!-- /bad -->\n<!-- good -->\nfigures\n<!-- /good -->\n"
    assert "bad failed: their figures are the old ones" in capfd.readouterr().err


def test_programs_run_in_turns_each_in_a_process_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\nwith open(sys.argv[3], 'a') as log: log.write(sys.argv[2])\n"
        "print('chatter')\nprint(json.dumps({'seconds': {'a': 1, 'b': 3}[sys.argv[2]], 'pid': os.getpid()}))"
    )
    measured = side_by_side.in_turns(str(script), ["a", "b"], 3, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "ababab"
    assert len({each["pid"] for results in measured.values() for each in results}) == 6
    assert side_by_side.ratio(measured, "b", "a", "seconds") == 3
    assert side_by_side.median(measured, "a", "seconds") == 1
    assert side_by_side.medians(measured, {"seconds": ".2f"}) == [["a", "1.00"], ["b", "3.00"]]
    with pytest.raises(RuntimeError, match="KeyError: 'c'"):
        side_by_side.in_turns(str(script), ["c"], 1, tmp_path / "log")


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc: benchmarks of memory run on Linux alone")
def test_peak_memory_counts_from_where_it_was_forgotten(monkeypatch):
    monkeypatch.setattr(side_by_side, "device", lambda: torch.device("cpu"))
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    del block
    side_by_side.forget_peak_memory()
    before = side_by_side.memory()
    assert side_by_side.memory(peak=True) - before < 50
    block = bytearray(100_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert 90 < side_by_side.memory(peak=True) - before < 150


@pytest.fixture
def fresh_state(monkeypatch):
    """Accelerate's view of this process, which other tests may have told another precision."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        side_by_side.device.cache_clear()

    reset()
    yield
    reset()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_training_step_and_its_peers_run_in_the_precision_that_is_asked_for(mixed_precision, fresh_state):
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 64}
    assert side_by_side.precision(mixed_precision) == mixed_precision
    assert side_by_side.loss_scaler(mixed_precision).is_enabled() == (mixed_precision == "fp16")
    *_, accelerator = training_step.build_ours(shape, torch.zeros(2, 8, dtype=torch.long), mixed_precision, False)
    assert (accelerator.scaler is not None) == (mixed_precision == "fp16")
    linear = torch.nn.Linear(2, 2)
    for autocast in (accelerator.autocast(), side_by_side.autocast(mixed_precision)):
        with autocast:
            assert linear(torch.zeros(1, 2)).dtype == side_by_side.DTYPES[mixed_precision]
    for program in (training_step.OURS, training_step.STOCK, training_step.NANOGPT):
        step = training_step.build_step(program, shape, 2, mixed_precision, is_compiled=False)
        assert training_step.speed(step, shape, 2, timed_steps=2)["tokens/s"] > 0
    assert training_step.seconds_of_products(shape, 2, mixed_precision) > 0


@pytest.mark.parametrize(("seconds", "steps"), [(0.02, 600), (1.41, 290), (20.0, 250)])
def test_the_demo_takes_the_steps_that_fit_into_its_minutes(seconds, steps):
    assert demo_steps.steps_for(seconds, most=600) == steps
    assert steps == 250 or steps * seconds * demo_steps.EVALUATIONS <= demo_steps.MINUTES * 60


def test_the_demo_is_timed_and_keeps_its_steps_once_it_has_begun(data_dir, tmp_path):
    recipe = {"data_dir": str(data_dir), "output_dir": str(tmp_path / "run"), "max_steps": 400, "optim": "muon"}
    recipe |= {"config_overrides": TINY, "tokens_per_step": 256, "per_device_train_batch_size": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = succeed(script("benchmarks/demo_steps.py", "--recipe", tmp_path / "recipe.yaml"))
    assert result.stdout == "400\n" and "400 steps, about 0 minutes" in result.stderr
    flags = ("--config", tmp_path / "recipe.yaml", "--max_steps", 3, "--eval_iters", 1, "--report_to", "none")
    succeed(script("train_accelerate.py", *flags))
    assert succeed(script("benchmarks/demo_steps.py", "--recipe", tmp_path / "recipe.yaml")).stdout == "3\n"


# The one command for a GPU, here as a dry run on the CPU, and what becomes of it when something goes wrong.

# What preparing data, plots and trackers need beyond torch, transformers, accelerate and their dependencies.
OTHERS = """datasets evaluate pyarrow pandas tiktoken matplotlib tensorboard lm_eval pytest multiprocess dill aiohttp
    xxhash""".split()
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {OTHERS} else super().find_spec(name, path, target)

    @staticmethod
    def find_distributions(context):
        return iter(()) if context.name in {OTHERS} else PathFinder.find_distributions(context)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
ROWS = {
    "Training step": ["ours", "stock", "nanoGPT's", "AdamW", "Muon"],
    "The whole loop": ["train_accelerate.py", "a bare loop"],
    "Head and loss": ["linear_cross_entropy", "logits and cross_entropy"],
    "HellaSwag": ["one at a time", "completion, fp32"],
    "Generation": ["fp32"],
}


def test_a_dry_run_without_any_other_package_measures_every_part(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    command = (sys.executable, REPOSITORY / "benchmarks/gpu.py", "--dry_run", "--output_file", page)
    result = succeed(run(*command, PYTHONPATH=str(tmp_path)))
    assert page.read_text() == f"before\n<!-- gpu -->\n{result.stdout.strip()}\n<!-- /gpu -->\nafter\n"
    sections = dict(section.split("\n", 1) for section in re.split("^### ", result.stdout, flags=re.MULTILINE)[1:])
    assert "pytest is not installed" in sections.pop(gpu.TESTS)
    assert sections.keys() == ROWS.keys() == gpu.SECONDS.keys() - {gpu.TESTS}
    for title, names in ROWS.items():
        for name in names:
            assert re.search(rf"^\| {re.escape(name)} \|.*\d.*\|$", sections[title], re.MULTILINE), (title, name)


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(tmp_path, capfd):
    slow = """import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        print("child", child.pid, flush=True)
        time.sleep(100)"""
    programs = {
        "slow": slow.replace("\n        ", "\n"),
        "bad": "print('half of them', flush=True); raise ValueError('no such number')",
        "good": "print('figures')",
    }
    weights = {"slow": 1, "bad": 20, "good": 20}
    parts = [gpu.Part(name, weights[name], [sys.executable, "-c", code]) for name, code in programs.items()]
    page = tmp_path / "page.md"
    assert gpu.run_parts(parts, 60, gpu.Report(page)) == ["slow", "bad"]
    text = page.read_text()
    assert text.startswith("<!-- gpu -->\nchild ") and text.endswith("<!-- /gpu -->\n")
    assert re.search(r"child \d+\n\nslow ran out of time after [12] seconds.\n\nhalf of them", text)
    assert "half of them\n\nbad failed with status 1: ValueError: no such number\n\nfigures" in text
    assert text.split("\n", 1)[1].removesuffix("\n<!-- /gpu -->\n") == capfd.readouterr().out.strip()
    pid = int(re.search(r"child (\d+)", text)[1])
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_the_exit_status_tells_that_a_part_failed(monkeypatch, capfd):
    monkeypatch.setattr(gpu, "SECONDS", {"nonsense": 60})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry_run"])
    monkeypatch.setattr(gpu.os, "environ", gpu.os.environ.copy())
    with pytest.raises(SystemExit) as end:
        run_script(gpu.main)
    assert end.value.code == 1
    output = capfd.readouterr()
    assert "Dry run failed with status 2: gpu.py: error: --parts must be among GPU tests" in output.out
    assert output.err.endswith("gpu.py: Dry run failed\n")


def test_a_page_without_its_place_is_an_error_before_anything_runs(tmp_path):
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="0 places <!-- gpu -->"):
        gpu.Report(tmp_path / "page.md")
