"""Rows of the papers' tables: what is run, the arithmetic of the comparison, and a row that is killed and resumed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import fails, run, started, wait_for

from relvit_d2.data import catalog
from relvit_d2.engine.config_file import load_config
from relvit_d2.errors import UserError
from relvit_d2.report.comparison import _T, Runs, difference
from relvit_d2.report.published import Row, tables
from relvit_d2.report.reproduce import collect, page, plan

ROWS = [(table, name) for table, rows in tables().items() for name in rows]
# Rows by labels are the configs of another row; table 3's come with their data sets.
HERE = [
    (table, name)
    for table, name in ROWS
    if not name.endswith("_labels") and Path(tables()[table][name].arms[0].steps[0].config).exists()
]


@pytest.mark.parametrize(("table", "name"), HERE)
def test_every_command_of_a_row_fits_its_config_and_the_others(table: str, name: str, tmp_path: Path) -> None:
    row = tables()[table][name]
    runs = plan(row, 3, 0.5, tmp_path, [])
    labelled = [r for r in runs.values() if r.step.script != "pretrain_ssl.py" and not r.step.overrides]
    schedules = {r.config.SOLVER.MAX_ITER for r in labelled}
    assert len(schedules) == 1  # the same fine-tuning budget for all
    for planned in runs.values():
        script, _, path, flag, *keys = planned.command
        assert load_config(path, keys, script) == planned.config and flag == "--resume"
        cfg, plain = planned.config, load_config(path, [str(x) for pair in planned.step.overrides for x in pair])
        assert cfg.SEED == 3 and Path(cfg.OUTPUT_DIR) == planned.folder
        assert round(plain.SOLVER.MAX_ITER / 2) == cfg.SOLVER.MAX_ITER
        if not planned.step.encoder:
            assert not cfg.MODEL.WEIGHTS and not plain.MODEL.WEIGHTS
            continue
        before = runs[planned.step.encoder]
        assert Path(cfg.MODEL.WEIGHTS) == before.folder / "encoder.safetensors"
        assert cfg.MODEL.ENCODER.NAME == before.config.MODEL.ENCODER.NAME
        # The pre-training is the one whose encoder the config itself would start from.
        source = Path(load_config(before.command[2], []).OUTPUT_DIR) / "encoder.safetensors"
        assert table == "demo" or str(source) == plain.MODEL.WEIGHTS


@pytest.mark.parametrize(("table", "name"), HERE)
def test_published_figures_and_images_are_those_of_the_headers(table: str, name: str) -> None:
    row = tables()[table][name]
    header = Path(row.arms[0].steps[-1].config).read_text()
    for figure in [*(arm.published for arm in row.arms), row.best]:
        assert figure is None or f"{figure.mean:.2f}" in header


def test_labels_are_cut_and_pretraining_sees_all(tmp_path: Path) -> None:
    runs = plan(tables()["table2"]["vit_s_labels"], 0, 1.0, tmp_path, [])
    sets = {name: run.config.DATASETS.TRAIN for name, run in runs.items()}
    assert sets["pretrain"] == sets["supervised_100"] == ("voc_2007_trainval",)
    assert sets["upstream_10"] == sets["supervised_10"] == ("voc_2007_trainval[:10%]",)
    assert len(runs) == 9


@pytest.mark.parametrize(
    ("name", "share", "part"),
    [
        ("voc_2007_test", 0.1, "voc_2007_test[:10%]"),
        ("voc_2007_test", 0.0025, "voc_2007_test[:0.25%]"),
        ("voc_2007_test[:500]", 0.01, "voc_2007_test[:5]"),
        ("voc_2007_test[:20%]", 0.5, "voc_2007_test[:10%]"),
        ("voc_2007_test[:3]", 0.01, "voc_2007_test[:1]"),
    ],
)
def test_a_part_of_a_subset_is_a_subset(name: str, share: float, part: str) -> None:
    assert catalog.part_of(name, share) == part


def test_quantiles_are_students() -> None:
    """The density, summed up between the two quantiles, is 95 %."""
    for freedom, quantile in enumerate(_T, start=1):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        x = torch.linspace(-quantile, quantile, 200_001, dtype=torch.float64)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert torch.trapezoid(density, x).item() == pytest.approx(0.95, abs=5e-5)


def test_a_difference_is_judged_by_the_spread_of_runs() -> None:
    ours, theirs = Runs.of([10.0, 11, 12]), Runs.of([13.0, 13.5, 14])
    assert (ours.mean, ours.spread, ours.count) == (11, 1, 3)
    # By hand: variances of the means 1/3 and 1/12, degrees of freedom (5/12)^2 / (1/18 + 1/288) = 2.94, rounded down.
    found = difference(ours, theirs)
    assert found.value == -2.5 and found.margin == pytest.approx(4.303 * math.sqrt(5 / 12))
    assert found.within_noise
    # Against one published run: it is taken to spread as ours do.
    single = difference(ours, Runs(20.0))
    assert single.margin == pytest.approx(4.303 * math.sqrt(1 / 3 + 1)) and single.within_noise is False
    assert difference(Runs(3.0), Runs(9.0)) == (-6.0, None)
    assert difference(Runs(3.0), Runs(9.0)).within_noise is None


def test_runs_that_differ_by_chance_are_within_noise_in_95_of_100_cases() -> None:
    draws = torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    within = [difference(Runs.of(a), Runs.of(b)).within_noise for a, b in draws]
    assert 0.94 < sum(map(bool, within)) / len(within) < 0.98  # a little wider, for degrees are rounded down


def told(row: Row, figures: dict[str, Any], images: tuple[int, int], scale: float, folder: Path) -> str:
    seeds = [plan(row, seed, scale, folder, []) for seed in range(len(next(iter(figures.values()))))]
    for name, values in figures.items():
        for seed, value in zip(seeds, values, strict=False):
            test = seed[name].config.DATASETS.TEST[0]
            (seed[name].folder / "inference").mkdir(parents=True)
            (seed[name].folder / "inference/results.json").write_text(json.dumps({test: {"bbox": {"AP": value}}}))
            seed[name].finish()
    data: dict[str, Any] = {"train": "a", "test": "b", "images": images, "published_images": row.images, "note": ""}
    machine = dict.fromkeys(("device", "precision", "torch", "version"), "x")
    about = {"seeds": len(seeds), "data": data, "machine": machine, "command": "c"}
    return page(about | collect(row, seeds, images, scale))


def test_the_table_says_what_the_runs_hold_and_no_more(tmp_path: Path) -> None:
    row, figures = tables()["table2"]["swin_t"], {"supervised": [15.0, 15.2, 15.4], "joint": [12.0, 12.1, 12.2]}
    text = told(row, figures, (5011, 4952), 1.0, tmp_path / "same")
    assert "| supervised | 15.20 ± 0.20 |  | 15.43 |  | -0.23, within noise (± 0.99) |" in text
    assert (
        "| joint | 12.10 ± 0.10 | -3.10, beyond noise (± 0.56) | 12.98 | -2.45 | -0.88, beyond noise (± 0.50) |" in text
    )
    assert "| upstream | not run yet |" in text and "best pre-trained" not in text
    figures |= {"upstream": [20.0, 20, 20], "mega": [21.0, 22, 23]}
    text = told(row, figures, (3952, 1000), 1.0, tmp_path / "other")
    assert "| best pre-trained, mega | | | 21.65 | +6.22 | +0.35, other data |" in text
    assert "5,011 and 4,952: these are other data" in text
    one = {name: values[:1] for name, values in figures.items()}
    text = told(row, one, (5011, 4952), 0.5, tmp_path / "one")
    assert "| upstream | 20.00* | +5.00* |" in text and "noise" not in text
    assert "One seed" in text and "rehearsal" in text
    labels = tables()["table2"]["vit_s_labels"]
    text = told(labels, {"supervised_10": [15.0]}, (3952, 1000), 1.0, tmp_path / "labels")
    assert "Nothing was published of these arms." in text and "other data" not in text


def test_a_finished_run_of_another_kind_is_not_taken(tmp_path: Path) -> None:
    row = tables()["demo"]["streets"]
    plan(row, 0, 1.0, tmp_path, [])["pretrain"].finish()
    assert plan(row, 0, 1.0, tmp_path, [])["pretrain"].finished()
    with pytest.raises(UserError, match="choose another --output"):
        plan(row, 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3"])["pretrain"].finished()


@pytest.mark.parametrize("key", ["SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "SOLVER.CHECKPOINT_MAX_TO_KEEP"])
def test_a_key_that_every_run_sets_itself_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"key {key} is set for every run here"):
        plan(tables()["demo"]["streets"], 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3", key, "5"])


def test_a_classifiers_sets_have_one_figure(tmp_path: Path) -> None:
    row = next(iter(tables()["table1"].values()))
    run = plan(row, 0, 1.0, tmp_path, ["DATASETS.TEST", "('cifar10_test[:5]','cifar10_test[:9]')"])["supervised"]
    results = {"cifar10_test[:5], cifar10_test[:9]": {"test": {"top1": 7.0}}}
    (run.folder / "inference").mkdir(parents=True)
    (run.folder / "inference/results.json").write_text(json.dumps(results))
    run.finish()
    assert run.figure(row.place) == 7.0


def test_a_finished_run_without_a_figure_is_not_told_as_to_be_run(tmp_path: Path) -> None:
    row = tables()["table2"]["swin_t"]
    text = told(row, {"supervised": [None]}, (5011, 4952), 1.0, tmp_path)
    assert "| supervised | none found |" in text and "| upstream | not run yet |" in text


@pytest.mark.slow
def test_a_row_that_is_killed_twice_goes_on_where_it_stopped(root: Path, tmp_path: Path) -> None:
    data = ("DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "('svhn_test',)")
    keys = (*data, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 800)
    tool = ("tools/reproduce.py", "demo", "--row", "streets", "--scale", 0.01, "--output", tmp_path, *keys)
    supervised = tmp_path / "seed_0/supervised"
    assert "train_net.py failed" in fails(root, *tool, fault="step:6")
    assert not (supervised / "finished.json").exists() and not (tmp_path / "results.md").exists()
    with started(root, *tool) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: bool(children.read_text()), process)
        child = Path(f"/proc/{children.read_text().split()[0]}/cmdline")
        process.kill()
        wait_for(lambda: not child.exists() or not child.read_bytes(), None, seconds=10)
    done = run(root, *tool)
    assert "resumed at iteration 4" in (supervised / "log.txt").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["scale"], results["seeds"], results["data"]["images"]) == (0.01, 1, [12, 5])
    for name in ("supervised", "upstream"):
        rows = (tmp_path / f"seed_0/{name}/metrics.json").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in rows] == list(range(8))
        assert results["arms"][name]["mean"] >= 0
    assert "A rehearsal" in done.stdout and (tmp_path / "results.md").read_text() in done.stdout
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    run(root, *tool)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}


def test_an_unknown_row_is_one_sentence(root: Path) -> None:
    assert "did you mean 'swin_t'" in fails(root, "tools/reproduce.py", "table2", "--row", "swint")
