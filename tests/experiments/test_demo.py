"""The figures that the demo prints beside its own."""

import re
from pathlib import Path

from relvit_d2.experiments.demo import MEASURED, of_seeds


def test_the_figures_of_several_seeds_are_those_of_the_documentation() -> None:
    section = Path("docs/evidence.md").read_text(encoding="utf-8").partition("\n## Demo\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith(("| pre-trained", "| from scratch"))]
    assert [tuple(map(float, row[2].split(","))) for row in rows] == [*MEASURED.values()]
    printed = re.findall(r"[\d.]+", of_seeds())
    mean, gain = re.findall(r"[\d.]+", "".join(rows[0][3:4])), re.findall(r"[\d.]+", rows[0][5])
    assert printed[0] == str(len(MEASURED["finetune"])) and printed[1] == mean[0] and printed[5:7] == gain
