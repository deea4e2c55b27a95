"""Progress in a log file and on a terminal."""

import os
import pty
import subprocess
import sys

SCRIPT = """
from relvit_d2.utils.progress import Progress
with Progress(desc="images", total={total}, unit="image") as bar:
    for _ in range({total}):
        bar.update()
"""


def test_a_log_has_a_line_for_each_tenth() -> None:
    for total, expected in ((1000, [*range(0, 101, 10)]), (3, [0, 33, 67, 100])):
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(total=total)], capture_output=True, text=True)
        lines = done.stderr.splitlines()
        assert "\r" not in done.stderr and all(lines)
        assert [line.split(" %")[0] for line in lines] == [f"images: {percent}" for percent in expected]


def test_a_terminal_has_one_line_that_is_drawn_again() -> None:
    terminal, end = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SCRIPT.format(total=5)], stderr=end) as process:
        assert process.wait() == 0
    os.close(end)
    text = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert text.count("\n") == 1 and "\r" in text and "5/5" in text
