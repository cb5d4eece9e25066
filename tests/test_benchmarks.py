"""The page of figures is written where its places are, and nowhere else; the demo's steps follow from its speed."""

import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import TINY, script, succeed

from benchmarks import demo_steps, gpu, report, side_by_side, training_step
from benchmarks.report import replace_section

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
