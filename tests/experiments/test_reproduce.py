"""relvit-d2 reproduce: the printed commands, and a row that is killed and resumed."""

import json
import shlex
from pathlib import Path

import pytest

from tests.support.scripts import fails, run, started, wait_for


def test_an_unknown_row_is_one_sentence(root: Path) -> None:
    assert "did you mean 'swin_t'" in fails(root, "relvit-d2", "reproduce", "table2", "--row", "swint")


def test_printed_commands_run_as_they_are(root: Path, tmp_path: Path) -> None:
    data = ("DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "('svhn_test',)", "SOLVER.IMS_PER_BATCH", 4)
    row = ("relvit-d2", "reproduce", "demo", "--arm", "upstream", "--scale", 0.004, "--output", tmp_path / "a b", *data)
    lines = run(root, *row, "--print").stdout.splitlines()
    assert not (tmp_path / "a b").exists()
    assert [shlex.split(line)[:2] for line in lines] == [["relvit-d2", "pretrain"], ["relvit-d2", "train"]]
    for line in lines:
        run(root, *shlex.split(line))
    folders = [tmp_path / "a b/seed_0" / name for name in ("pretrain", "upstream")]
    assert [len((folder / "metrics.json").read_text().splitlines()) for folder in folders] == [2, 2]
    assert str(folders[0] / "encoder.safetensors") in (folders[1] / "log.txt").read_text()


@pytest.mark.slow
def test_a_row_that_is_killed_twice_goes_on_where_it_stopped(root: Path, tmp_path: Path) -> None:
    data = ("DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "('svhn_test',)")
    keys = (*data, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 800)
    tool = ("relvit-d2", "reproduce", "demo", "--row", "streets", "--scale", 0.01, "--output", tmp_path, *keys)
    supervised = tmp_path / "seed_0/supervised"
    assert "relvit-d2 train failed" in fails(root, *tool, fault="step:6")
    assert not (supervised / "finished.json").exists() and not (tmp_path / "results.md").exists()
    with started(root, *tool) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: bool(children.read_text()), process)
        child = Path(f"/proc/{children.read_text().split()[0]}/cmdline")
        process.kill()
        wait_for(lambda: not child.exists() or not child.read_bytes(), None, seconds=10)
    assert "| upstream | not run yet |" in run(root, *tool, "--arm", "supervised").stdout
    done = run(root, *tool)
    assert "resumed at iteration 4" in (supervised / "log.txt").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    images = results["arms"]["supervised"]["data"]["images"]
    assert (results["scale"], results["seeds"], images["train"], images["test"]) == (0.01, 1, 1, 1)
    for name in ("supervised", "upstream"):
        rows = (tmp_path / f"seed_0/{name}/metrics.json").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in rows] == list(range(8))
        assert results["metrics"]["box AP"][name]["mean"] >= 0
    assert "A rehearsal" in done.stdout and (tmp_path / "results.md").read_text() in done.stdout
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    run(root, *tool)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
