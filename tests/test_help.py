"""Every script and tool says what it is for, and gives an example whose files and options are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    path for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")) if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_help_gives_an_example(path: Path) -> None:
    name = path.relative_to(ROOT)
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    examples = re.findall(rf"^ +python3? {name}(.*)$", done.stdout, re.M)
    assert examples, f"no example of {name}"
    usage = done.stdout.partition("example")[0]
    for words in map(shlex.split, examples):
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"(?<!\S)\[?{word}\b", usage), f"{name} has no {word}"
            elif word.startswith("configs/"):
                assert (ROOT / word).is_file()
