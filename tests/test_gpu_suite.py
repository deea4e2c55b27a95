"""The commands of the GPU's measurements can be started."""

from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.gpu_suite import rows_of, run, steps
from benchmarks.harness import arguments
from tests.support.commands import check_command


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_step_has_valid_arguments(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, *words in steps(device, False, tmp_path).values():
        if module == "relvit_d2":
            check_command(words)
        else:
            assert hasattr(import_module(module), "main")
            monkeypatch.setattr("sys.argv", [module, *words])
            if words:
                assert arguments("", module).device == device


def test_a_step_that_fails_or_takes_too_long_is_named(tmp_path: Path) -> None:
    console = tmp_path / "console.txt"
    assert run(["json.tool", "--help"], console, 60) == ""
    assert rows_of("step", console, "") == [("step", "", "ended")]
    failed = run(["relvit_d2_missing"], console, 60)
    assert "No module named relvit_d2_missing" in failed
    assert rows_of("step", console, failed) == [("step", "", failed)]
    assert run(["http.server", "0"], console, 1) == "stopped"
    console.write_text('text\n{"name": "row", "ratio": 1.5, "batch": 2, "rate": 0.123456}\n')
    assert rows_of("step", console, "") == [("row", "1.500", "batch 2, rate 0.1235")]
    assert len(rows_of("step", console, "stopped")) == 2
