"""relvit-d2 compare-runs: equal runs, different runs, invalid files."""

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
    """Run the tool on arguments; return its exit status, its output and its error output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return main(["compare-runs", *map(str, arguments)]), *capsys.readouterr()

    return run


def test_equal_runs_have_no_differences() -> None:
    found = compare(RUN, RUN)
    assert (found.steps, found.names, found.largest) == (3, ["loss_a", "loss_b", "total_loss"], 0.0)
    assert not found.differences


def test_one_ulp_is_a_difference_without_tolerance() -> None:
    other = changed(1, loss_a=1.0 + 2**-52)
    assert compare(RUN, other).differences[0] == f"first difference at step 1: loss_a 1.0 in A, {1 + 2**-52!r} in B"
    assert not compare(RUN, other, 1e-12).differences


def test_the_first_and_the_largest_difference_are_reported() -> None:
    lines = compare(RUN, changed(1, loss_a=1.5) | {2: RUN[2] | {"loss_a": 4.0}}, 0.1).differences
    assert lines == [
        "first difference at step 1: loss_a 1.0 in A, 1.5 in B",
        "largest relative difference: 0.75 (loss_a at step 2)",
    ]


def test_missing_steps_and_losses_are_reported() -> None:
    longer = changed(1, loss_mask=1.0) | {3: RUN[2], 4: RUN[2]}
    assert compare(RUN, longer, 1.0).differences == ["only B has steps 3, 4", "only B has loss_mask, first at step 1"]
    assert compare(longer, RUN, 1.0).differences[0] == "only A has steps 3, 4"


def test_only_losses_are_compared(tmp_path: Path, tool: Tool) -> None:
    """Not times and rates, and not the last line of held-out metrics."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, time in ((first, 0.1), (second, 0.2)):
        folder.mkdir()
        path = write(folder / "metrics.json", RUN, time=time)
        with path.open("a") as file:
            file.write(json.dumps({"iteration": 3, "held_out/loss_a": time}) + "\n")
    assert read_losses(first) == RUN
    done = tool(first, second / "metrics.json")
    assert done == (0, "equal: 3 steps, names loss_a, loss_b, total_loss\n", "")


def test_different_runs_have_exit_status_1(tmp_path: Path, tool: Tool) -> None:
    a, b = write(tmp_path / "a.json", RUN), write(tmp_path / "b.json", changed(2, loss_b=0.5))
    status, printed, error = tool(a, b)
    assert status == 1
    assert "first difference at step 2: loss_b 0.0 in A, 0.5 in B" in printed
    assert error == f"error: the runs A '{a}' and B '{b}' differ\n"


BAD = {
    "missing": (None, "cannot be read"),
    "empty": ("", "contains no losses"),
    "without losses": ('{"iteration": 1, "time": 2.0}\n', "contains no losses"),
    "cut short": ('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "lo', "line 2 is not a JSON object"),
    "not an object": ("[1, 2]\n", "line 1 is not a JSON object"),
    "no iteration": ('{"loss": 2.0}\n', "line 1 is not a JSON object"),
    "not a number": ('{"iteration": 1, "loss": null}\n', "line 1 is not a JSON object"),
    "not finite": ('{"iteration": 1, "loss": NaN}\n', "line 1 is not a JSON object"),
    "binary": (b"\xff\xfe\x00", "it is not a text file"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_file_is_reported_in_one_sentence(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_losses(path)
    assert str(path) in str(caught.value)


def test_invalid_arguments_are_reported_in_one_sentence(tmp_path: Path, tool: Tool) -> None:
    run = write(tmp_path / "a.json", RUN)
    for arguments, message in (
        ((run, tmp_path / "no"), "cannot be read"),
        ((run, run, "--tolerance", "nan"), "give 0"),
    ):
        status, printed, error = tool(*arguments)
        assert (status, printed, error.count("\n")) == (1, "", 1)
        assert message in error


def test_a_golden_file_equals_itself(tool: Tool) -> None:
    golden = "tests/golden/detection_vit_nano.json"
    status, printed, _ = tool(golden, golden)
    assert status == 0 and printed.startswith("equal: 4 steps")
