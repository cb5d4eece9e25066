"""The tree is as `make check` wants it: formatted and without lint. (Its types take mypy a minute, too long here.)"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

CHECKS = re.search(r"^check:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("command", re.findall(r"\$\(PYTHON\) (-m ruff .*)", CHECKS))
def test_the_tree_passes_its_checks(command):
    result = subprocess.run([sys.executable, *command.split()], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_run_one_way():
    """By the contracts in pyproject.toml; and no script is imported by another, or by a folder."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    scripts = {path.stem for path in REPOSITORY.glob("*.py")}
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("pretraining/**/*.py")]:
        imports = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        assert not imports & scripts, path
