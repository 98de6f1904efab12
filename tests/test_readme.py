"""What the README shows runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]


def heading(block):
    """Where a block stands, to name its test."""
    before = README.read_text(encoding="utf-8").split(block)[0]
    return re.findall(r"^## (.*)$", before, re.MULTILINE)[-1]


@pytest.mark.parametrize("block", PYTHON, ids=heading)
def test_python_block_runs_alone(block, tmp_path):
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_python_blocks():
    assert len(PYTHON) >= 5  # Otherwise the pattern above no longer fits the file, and nothing is tested.


def test_set_up_is_two_lines_that_each_do_everything():
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert lines == ["pip install -e . && dqn-jax train CartPole-v1", 'pip install -e ".[test]" && pytest -n 2']
    assert all(line.startswith("pip install -e") for line in lines)
