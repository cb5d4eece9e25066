"""The one command for a GPU, here as a dry run on the CPU, and what becomes of it when something goes wrong."""

import re
import sys

import psutil
import pytest
from conftest import REPOSITORY, run, succeed
from processes import wait_until

from benchmarks import gpu
from pretraining.arguments import run_script

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
    assert text.startswith("<!-- gpu -->\n### slow\n\nchild ") and text.endswith("<!-- /gpu -->\n")
    assert re.search(r"child \d+\n\nThis part ran out of time after [12] seconds.\n\n### bad", text)
    assert "half of them\n\nThis part failed with status 1: ValueError: no such number\n\n### good\n\nfigures" in text
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
    assert "This part failed with status 2: gpu.py: error: --part must be one of GPU tests" in output.out
    assert output.err.endswith("gpu.py: nonsense failed\n")


def test_a_page_without_its_place_is_an_error_before_anything_runs(tmp_path):
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="0 places <!-- gpu -->"):
        gpu.Report(tmp_path / "page.md")
