"""Commands in subprocesses."""

from pathlib import Path

import pytest

from relvit_d2.experiments.commands import iteration_seconds, run_command
from relvit_d2.utils.errors import UserError
from tests.support.scripts import CONFIGS


@pytest.mark.slow
def test_a_measured_command_is_stopped_after_its_time(root: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        words = ["train", "--config-file", CONFIGS["train_net.py"], "OUTPUT_DIR", str(tmp_path / "run")]
        long = ["SOLVER.MAX_ITER", "10000", "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0"]
        run_command("measuring", [*words, *long], tmp_path / "run", 10_000, tmp_path / "console.txt", 1.0)
        assert 2 <= len(iteration_seconds(tmp_path / "run")) < 10_000
        assert "iterations with" in (tmp_path / "console.txt").read_text()
        with pytest.raises(UserError, match=r"relvit-d2 train failed: .*SOLVER\.MAX_ITERS.*whole log: .*console\.txt"):
            run_command("measuring", [*words, "SOLVER.MAX_ITERS", "1"], tmp_path / "run", 1, limit=1.0)
