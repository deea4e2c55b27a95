"""relvit-d2 compare-runs: equal runs, different ones, files without losses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from relvit_d2.analysis.run_comparison import Losses, compare, read_losses
from relvit_d2.cli import main
from relvit_d2.utils.errors import UserError

Tool = Callable[..., tuple[int, str, str]]

RUN: Losses = {step: {"total_loss": 3.0 - step, "loss_a": 1.0, "loss_b": 2.0 - step} for step in range(3)}


def changed(step: int, **values: float) -> Losses:
    return {**RUN, step: RUN[step] | values}


def write(path: Path, losses: Losses, **more: float) -> Path:
    path.write_text("".join(json.dumps({"iteration": step, **more, **row}) + "\n" for step, row in losses.items()))
    return path


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    """Run the tool on arguments; return its exit status and what it printed and complained."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return main(["compare-runs", *map(str, arguments)]), *capsys.readouterr()

    return run


def test_equal_runs_differ_in_nothing() -> None:
    found = compare(RUN, RUN)
    assert (found.steps, found.names, found.largest) == (3, ["loss_a", "loss_b", "total_loss"], 0.0)
    assert not found.differences


def test_the_last_bit_is_a_difference_unless_tolerated() -> None:
    other = changed(1, loss_a=1.0 + 2**-52)
    assert compare(RUN, other).differences[0] == f"first difference at step 1: loss_a 1.0 in A, {1 + 2**-52!r} in B"
    assert not compare(RUN, other, 1e-12).differences


def test_the_first_and_the_largest_difference_are_named() -> None:
    lines = compare(RUN, changed(1, loss_a=1.5) | {2: RUN[2] | {"loss_a": 4.0}}, 0.1).differences
    assert lines == [
        "first difference at step 1: loss_a 1.0 in A, 1.5 in B",
        "largest relative difference: 0.75 (loss_a at step 2)",
    ]


def test_steps_and_names_that_one_run_lacks_are_named() -> None:
    longer = changed(1, loss_mask=1.0) | {3: RUN[2], 4: RUN[2]}
    assert compare(RUN, longer, 1.0).differences == ["only B has steps 3, 4", "only B has loss_mask, first at step 1"]
    assert compare(longer, RUN, 1.0).differences[0] == "only A has steps 3, 4"


def test_only_losses_are_compared(tmp_path: Path, tool: Tool) -> None:
    """Neither times and rates nor the last line of held-out figures."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, time in ((first, 0.1), (second, 0.2)):
        folder.mkdir()
        path = write(folder / "metrics.json", RUN, time=time)
        with path.open("a") as file:
            file.write(json.dumps({"iteration": 3, "held_out/loss_a": time}) + "\n")
    assert read_losses(first) == RUN
    done = tool(first, second / "metrics.json")
    assert done == (0, "equal: 3 steps, names loss_a, loss_b, total_loss\n", "")


def test_different_runs_end_with_status_1(tmp_path: Path, tool: Tool) -> None:
    a, b = write(tmp_path / "a.json", RUN), write(tmp_path / "b.json", changed(2, loss_b=0.5))
    status, printed, complaint = tool(a, b)
    assert status == 1
    assert "first difference at step 2: loss_b 0.0 in A, 0.5 in B" in printed
    assert complaint == f"error: the runs A '{a}' and B '{b}' differ\n"


BAD = {
    "missing": (None, "cannot be read"),
    "empty": ("", "holds no losses"),
    "without losses": ('{"iteration": 1, "time": 2.0}\n', "holds no losses"),
    "cut short": ('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "lo', "line 2 is no JSON object"),
    "no object": ("[1, 2]\n", "line 1 is no JSON object"),
    "no iteration": ('{"loss": 2.0}\n', "line 1 is no JSON object"),
    "no number": ('{"iteration": 1, "loss": null}\n', "line 1 is no JSON object"),
    "not finite": ('{"iteration": 1, "loss": NaN}\n', "line 1 is no JSON object"),
    "no text": (b"\xff\xfe\x00", "it is no text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_run_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, words = BAD[case]
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as caught:
        read_losses(path)
    assert str(path) in str(caught.value)


def test_faults_on_the_command_line_are_one_sentence(tmp_path: Path, tool: Tool) -> None:
    run = write(tmp_path / "a.json", RUN)
    for arguments, words in (((run, tmp_path / "no"), "cannot be read"), ((run, run, "--tolerance", "nan"), "give 0")):
        status, printed, complaint = tool(*arguments)
        assert (status, printed, complaint.count("\n")) == (1, "", 1)
        assert words in complaint


def test_a_run_in_a_file_is_compared_with_itself(tool: Tool) -> None:
    golden = "tests/golden/detection_vit_nano.json"
    status, printed, _ = tool(golden, golden)
    assert status == 0 and printed.startswith("equal: 4 steps")
