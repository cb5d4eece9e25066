"""The tree is as `make check` wants it: formatted and without lint. (Its types take mypy a minute, too long here.)"""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

CHECKS = re.search(r"^check:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("command", re.findall(r"\$\(PYTHON\) (-m ruff .*)", CHECKS))
def test_the_tree_passes_its_checks(command):
    result = subprocess.run([sys.executable, *command.split()], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
