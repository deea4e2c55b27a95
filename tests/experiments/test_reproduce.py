"""Rows of the papers' tables: what is run, the arithmetic of the comparison, and a row that is killed and resumed."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from relvit_d2.classification.run import load_data
from relvit_d2.config.config_file import COMMANDS
from relvit_d2.data.detection import catalog
from relvit_d2.experiments.results import collect, page, why_no_verdict
from relvit_d2.experiments.runs import ImageCounts, Run, count_images, plan_runs
from relvit_d2.experiments.statistics import _T, RunStatistics, difference
from relvit_d2.experiments.table_rows import Row, tables
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.scripts import fails, run, started, wait_for

TABLES = tables()
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]
CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml"))
# Rows by labels are the configs of another row; table 3's come with their data sets.
HERE = [
    (table, name)
    for table, name in ROWS
    if not name.endswith("_labels") and Path(TABLES[table][name].arms[0].steps[0].config).exists()
]


@pytest.mark.parametrize(("table", "name"), HERE)
def test_every_command_of_a_row_fits_its_config_and_the_others(table: str, name: str, tmp_path: Path) -> None:
    row = TABLES[table][name]
    runs = plan(row, 3, 0.5, tmp_path, [])
    labelled = [r for r in runs.values() if r.config.TASK != "pretrain" and r.step.name != "supervised_longer"]
    schedules = {r.config.SOLVER.MAX_ITER for r in labelled}
    assert len(schedules) == 1  # the same fine-tuning budget for all
    for planned in runs.values():
        command, _, path, flag, *keys = planned.command
        assert load_config(path, keys) == planned.config and flag == "--resume"
        assert command == COMMANDS[planned.config.TASK]
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


# The paper's tables a second time, typed row by row. Arms: supervised; joint; pre-trained; pre-trained on mega-patches.
PRINTED_TABLE1 = """
cifar10        86.09 0.46   90.23 0.09   +4.14
svhn           96.01 0.07   97.14 0.03   +1.13
cifar100       59.19 0.84   64.99 0.46   +5.85
flower102      42.08 0.29   45.78 0.75   +3.70
tiny_imagenet  43.19 0.78   51.98 0.20   +8.79
imagenet100    58.04 0.91   66.46 0.45   +8.42
imagenet       65.34 -      68.28 -      +2.94
"""
PRINTED_DETECTION = """
table2 vit_s       14.31 30.04 11.59   14.59 30.86 15.16   15.16 31.51 12.78   16.87 34.06 14.73   +2.56 +4.02 +3.14
table2 swin_t      15.43 32.40 12.73   12.98 28.37 10.21   20.98 40.02 19.60   21.65 41.04 20.65   +6.22 +8.64 +7.92
table2 t2t_vit_14  14.20 30.09 11.32   14.74 30.38 12.54   15.85 32.17 13.45   16.61 33.60 14.53   +2.41 +3.51 +3.21
table3 coco        20.43 35.36 20.27   -     -     -       22.44 37.35 22.59   22.03 36.79 22.37   +2.01 +1.99 +2.32
table3 svhn        32.55 74.01 21.73   34.42 76.52 24.51   32.30 74.84 20.68   34.36 76.71 24.10   +1.81 +2.70 +2.37
table3 kitti       32.17 55.73 33.26   29.82 52.81 30.50   37.02 63.52 35.79   33.86 58.39 34.40   +4.85 +7.99 +2.53
"""
# Printed gains that are not the difference of the printed figures.
GAIN_SLIPS = {"cifar100": ("+5.85", "5.80"), "kitti": ("+7.99", "7.79")}
ARMS = ("supervised", "joint", "upstream", "mega")
METRICS = ("box AP", "box AP50", "box AP75")


def printed() -> dict[tuple[str, str, str], dict[str, tuple[str, str]]]:
    """The figures and spreads of the lists above as text, ``-`` for none, by table, row and arm, then by metric."""
    found: dict[tuple[str, str, str], dict[str, tuple[str, str]]] = {}
    for line in PRINTED_TABLE1.split("\n")[1:-1]:
        name, supervised, spread, upstream, other, _ = line.split()
        found["table1", name, "supervised"] = {"top-1 accuracy": (supervised, spread)}
        found["table1", name, "upstream"] = {"top-1 accuracy": (upstream, other)}
    for line in PRINTED_DETECTION.split("\n")[1:-1]:
        table, name, *cells = line.split()
        for arm, start in zip(ARMS, (0, 3, 6, 9), strict=True):
            figures = {m: (x, "-") for m, x in zip(METRICS, cells[start : start + 3], strict=True) if x != "-"}
            found[table, name, arm] = figures
    return found


def plain(name: str) -> str:
    """Return a row's name in the paper: there is one figure for every image size and choice of the model."""
    return name.removesuffix("_512").removesuffix("_authors")


def test_published_figures_are_those_of_the_paper() -> None:
    """Every cell and spread, of every row and arm, against the second list; nothing more."""
    figures = printed()
    for table, name in ROWS:
        for arm in TABLES[table][name].arms:
            ours = {
                metric: (f"{found.runs.mean:.2f}", "-" if found.runs.std is None else f"{found.runs.std:.2f}")
                for metric, found in arm.published.items()
            }
            theirs = figures.get((table, plain(name), arm.name.removesuffix("_multitap")), {})
            assert ours == theirs, (table, name, arm.name)
    slips = [(t, n, a.name, m) for t, n in ROWS for a in TABLES[t][n].arms for m, f in a.published.items() if f.slip]
    assert slips == [("table2", name, "joint", "box AP75") for name in ("vit_s", "vit_s_512")]


def test_the_printed_gains_are_differences_of_the_figures_or_named_as_slips() -> None:
    gains = [("table1", *line.split()[::5]) for line in PRINTED_TABLE1.split("\n")[1:-1]]
    gains += [(*line.split()[:2], *line.split()[-3:]) for line in PRINTED_DETECTION.split("\n")[1:-1]]
    slips = {}
    for table, name, *signed in gains:
        row = TABLES[table][name]
        best = {"table1": "upstream", "coco": "upstream", "kitti": "upstream"}  # elsewhere mega-patches
        arm = best.get(table, best.get(name, "mega"))
        old, new = (next(a.published for a in row.arms if a.name == x) for x in ("supervised", arm))
        for metric, gain in zip(row.metrics, signed, strict=True):
            difference = f"{new[metric].runs.mean - old[metric].runs.mean:.2f}"
            if gain != f"+{difference}":
                slips[name] = (gain, difference)
                assert gain in " ".join(row.remarks) and difference in " ".join(row.remarks)
    assert slips == GAIN_SLIPS


def test_every_config_of_a_paper_row_carries_its_figures() -> None:
    """Figures of a config's arm and of the arm from scratch, typed above, and the remarks on the row."""
    figures, walked = printed(), set()
    for table, name in HERE:
        row = TABLES[table][name]
        for arm in row.arms if row.paper else ():
            for path in {step.config for step in arm.steps if not step.overrides}:
                walked.add(path)
                header = " ".join(line[1:].strip() for line in Path(path).read_text().split("\n") if line[:1] == "#")
                assert "not known to this project" not in header and "not known here" not in header
                for which in ("supervised", arm.name):
                    cells = figures.get((table, plain(name), which), {}).values()
                    spreads = [f"{mean} ± {spread}".removesuffix(" ± -") for mean, spread in cells]
                    assert " / ".join(spreads) in header, (path, which)
                if (table, plain(name), arm.name) == ("table2", "vit_s", "joint"):
                    assert "slip" in header
                if plain(name) in GAIN_SLIPS and arm.name == "upstream":
                    assert all(gain in header for gain in GAIN_SLIPS[plain(name)])
    rows = {path for path in CONFIGS if not {"base", "demo"} & set(Path(path).parts)}
    # What is left is not in the paper, and says so.
    for path in rows - walked:
        assert re.search(r"The paper has no (joint|permuted) row", Path(path).read_text()), path


def test_labels_are_cut_and_pretraining_sees_all(tmp_path: Path) -> None:
    runs = plan(TABLES["table2"]["vit_s_labels"], 0, 1.0, tmp_path, [])
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
    ours, theirs = RunStatistics.of([10.0, 11, 12]), RunStatistics.of([13.0, 13.5, 14])
    assert (ours.mean, ours.std, ours.count) == (11, 1, 3)
    # By hand: variances of the means 1/3 and 1/12, degrees of freedom (5/12)^2 / (1/18 + 1/288) = 2.94, rounded down.
    found = difference(ours, theirs)
    assert found.value == -2.5 and found.margin == pytest.approx(4.303 * math.sqrt(5 / 12))
    assert found.within_noise
    # Against one published run: it is taken to spread as ours do.
    single = difference(ours, RunStatistics(20.0))
    assert single.margin == pytest.approx(4.303 * math.sqrt(1 / 3 + 1)) and single.within_noise is False
    assert difference(RunStatistics(3.0), RunStatistics(9.0)) == (-6.0, None)
    assert difference(RunStatistics(3.0), RunStatistics(9.0)).within_noise is None


def test_runs_that_differ_by_chance_are_within_noise_in_95_of_100_cases() -> None:
    draws = torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    within = [difference(RunStatistics.of(a), RunStatistics.of(b)).within_noise for a, b in draws]
    assert 0.94 < sum(map(bool, within)) / len(within) < 0.98  # a little wider, for degrees are rounded down


def plan(row: Row, seed: int, scale: float, output: Path, opts: list[str]) -> dict[str, Run]:
    """The runs of all arms of a row."""
    return plan_runs([step for arm in row.arms for step in arm.steps], seed, scale, output, opts)


def written(row: Row, figures: dict[str, Any], scale: float, folder: Path, *opts: str, **counts: Any) -> str:
    """The page of runs that found ``figures``, an AP or accuracy of each arm and seed; AP50 and AP75 are 2 and 3 AP."""
    seeds = [plan(row, seed, scale, folder, list(opts)) for seed in range(len(next(iter(figures.values()))))]
    for name, values in figures.items():
        for seed, value in zip(seeds, values, strict=False):
            found = dict(zip(("AP", "AP50", "AP75"), (value and value * k for k in (1, 2, 3)), strict=True))
            chosen = "best_on_test" if seed[name].config.TEST.get("BEST_ON_TEST") else "test"
            write_results(seed[name], {"bbox": found, chosen: {"top1": value}})
    images = ImageCounts(**({"train": 5011, "test": 4952} | counts))
    machine = dict.fromkeys(("device", "precision", "torch", "version"), "x")
    about = {"seeds": len(seeds), "note": "", "machine": machine, "command": "c"}
    return page(about | collect(row, seeds, {arm.name: images for arm in row.arms}, scale))


def write_results(run: Run, results: dict[str, Any]) -> None:
    """What a script leaves of a run that has found ``results`` on its test set."""
    (run.folder / "inference").mkdir(parents=True)
    tests = run.config.DATASETS.TEST
    (run.folder / "inference/results.json").write_text(json.dumps({", ".join(tests): results}))
    run.finish()


def test_the_page_has_what_the_runs_found_beside_every_published_figure(tmp_path: Path) -> None:
    row, figures = TABLES["table2"]["swin_t"], {"supervised": [15.0, 15.2, 15.4], "joint": [12.0, 12.1, 12.2]}
    text = written(row, figures, 1.0, tmp_path / "same")
    assert "| supervised | 15.20 ± 0.20 |  | 15.43 |  | -0.23, no verdict |" in text
    assert "| joint | 12.10 ± 0.10 | -3.10, beyond noise (± 0.56) | 12.98 | -2.45 | -0.88, no verdict |" in text
    assert "| joint | 24.20 ± 0.20 | -6.20, beyond noise (± 1.11) | 28.37 | -4.03 | -4.17, no verdict |" in text
    assert "| upstream | not run yet |  | 19.60 | +6.87 |  |" in text  # AP75
    assert "Training images: 5,011 of voc_2007_trainval; test images: 4,952 of voc_2007_test." in text
    assert "No verdict against the paper: the paper states neither" in text and "joint, 12.98, is below 15.43" in text
    one = {name: values[:1] for name, values in figures.items()}
    text = written(row, one, 0.5, tmp_path / "one")
    assert "| joint | 12.00* | -3.00* | 12.98 | -2.45 | -0.98*, no verdict |" in text and "noise" not in text
    assert "One seed" in text and "rehearsal" in text
    labels = TABLES["table2"]["vit_s_labels"]
    text = written(labels, {"supervised_10": [15.0]}, 1.0, tmp_path / "labels", train=501)
    assert "The paper has no figures of these arms." in text and "o verdict" not in text
    assert "supervised_10, upstream_10: Training images: 501 of voc_2007_trainval[:10%]; test" in text


def test_the_page_of_a_row_with_the_papers_protocol_has_a_verdict(tmp_path: Path) -> None:
    row, figures = (
        TABLES["table1"]["imagenet_authors"],
        {"supervised": [65.0, 65.2, 65.4], "upstream": [66.0, 66.1, 66.2]},
    )
    text = written(row, figures, 1.0, tmp_path, train=1_281_167, test=50_000)
    # One published run, taken to spread as ours do: margins 4.303 * 0.2 * sqrt(4/3) and 4.303 * 0.1 * sqrt(4/3).
    assert "| supervised | 65.20 ± 0.20 |  | 65.34 |  | -0.14, within noise of the published figure (± 0.99) |" in text
    assert "| 68.28 | +2.94 | -2.18, beyond noise of the published figure (± 0.50) |" in text
    assert "o verdict" not in text


def test_a_slip_of_the_paper_is_named_and_not_compared_with(tmp_path: Path) -> None:
    figures = {"supervised": [15.0, 15.2], "joint": [12.0, 12.1]}
    text = written(TABLES["table2"]["vit_s"], figures, 1.0, tmp_path)
    assert "| 15.16 (probably a slip) |  |  |" in text and "the AP of the next row" in text


@pytest.mark.parametrize(("table", "name"), sorted({(table, plain(name)) for table, name in HERE if table != "demo"}))
def test_the_page_of_a_row_has_all_its_published_figures_and_remarks(table: str, name: str, tmp_path: Path) -> None:
    text = written(TABLES[table][name], {"supervised": [12.0]}, 1.0, tmp_path)
    for arm in ARMS:
        for mean, spread in printed().get((table, name, arm), {}).values():
            assert re.search(rf"\| {arm} \|.*\| {mean}{f' ± {spread}' if spread != '-' else ''} ", text)
    if name in GAIN_SLIPS:
        assert all(gain in text for gain in GAIN_SLIPS[name])


CIFAR = {"train": 50_000, "test": 10_000}


@pytest.mark.parametrize(
    ("table", "name", "opts", "counts", "words"),
    [
        ("table2", "vit_s", (), {}, "neither image size nor schedule"),
        ("table2", "vit_s_512", (), {}, "neither image size nor schedule"),
        ("table3", "svhn", (), {"train": 33_402, "test": 13_068}, "neither image size nor schedule"),
        ("table3", "coco", (), {"train": 117_266, "empty": 1_021, "test": 5_000}, '"mini-val", which is taken for val'),
        ("table1", "cifar10_authors", ("SOLVER.PRECISION", "float32"), CIFAR, ""),
        ("table1", "cifar10_authors", (), CIFAR | {"test": 1_000}, "tests on 10,000 images, here it is on 1,000"),
        ("table1", "cifar10_authors", (), CIFAR | {"train": 49_000, "empty": 1_000}, ""),
        ("table1", "cifar10_authors", ("SOLVER.BASE_LR", "3"), CIFAR, "SOLVER.BASE_LR was changed"),
        ("table1", "cifar10_authors", ("DATASETS.TRAIN", "('a',)"), CIFAR, "trains on cifar10_train, here it is a"),
        ("table3", "kitti", (), {"train": 5_611, "test": 1_870}, "does not publish the split"),
        (
            "table1",
            "cifar10",
            (),
            {"train": 45_000, "held_out": 5_000, "test": 10_000},
            "45,000, because 5,000 are held out",
        ),
        ("table1", "cifar10_authors", (), {"train": 50_000, "test": 10_000}, ""),
        ("table1", "cifar10_authors", (), {"train": 50_000, "test": 10_000, "note": "JPEG"}, "the images are JPEG"),
        ("table1", "flower102", (), {"train": 1_020, "test": 6_149}, "flower102_val, ours on those of flower102_test"),
        ("table1", "flower102_authors", (), {"train": 1_020, "test": 1_020}, ""),
        ("table1", "imagenet100_authors", (), {"train": 126_689, "test": 5_000}, "ambityga/imagenet100"),
    ],
)
def test_there_is_a_verdict_only_where_data_and_protocol_are_the_papers(
    table: str, name: str, opts: tuple[str, ...], counts: dict[str, Any], words: str, tmp_path: Path
) -> None:
    row = TABLES[table][name]
    images = ImageCounts(**({"train": 5011, "test": 4952} | counts))
    assert row.paper
    run = plan(row, 0, 1.0, tmp_path, list(opts))["supervised"]
    found = why_no_verdict(row.paper, run, images, 1.0)
    assert words in found and bool(words) == bool(found)
    assert "cut to 0.5" in why_no_verdict(row.paper, run, images, 0.5)


def test_a_model_that_the_test_images_did_not_choose_gets_no_verdict_in_table_1(tmp_path: Path) -> None:
    row = TABLES["table1"]["cifar10"]
    assert row.paper
    run = plan(row, 0, 1.0, tmp_path, [])["supervised"]
    assert "do not choose the model" in why_no_verdict(row.paper, run, ImageCounts(50_000, 10_000), 1.0)


def test_the_authors_choice_of_the_model_trains_100_epochs_of_all_images(tmp_path: Path) -> None:
    for name, row in TABLES["table1"].items():
        if row.paper and name.endswith("_authors"):
            for run in plan(row, 0, 1.0, tmp_path, []).values():
                solver, phases = run.config.SOLVER, 2 if run.step.name == "supervised_longer" else 1
                epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / row.paper.images[0]
                assert epochs == pytest.approx(100 * phases, rel=2e-3)
                assert pytest.approx(solver.MAX_ITER / 10, abs=1) == solver.WARMUP_ITERS
                if run.config.TASK == "classification":
                    assert run.config.TEST.BEST_ON_TEST and not run.config.DATASETS.VALIDATION
                    assert (row.paper.test,) == run.config.DATASETS.TEST


def test_the_images_that_are_counted_are_those_that_the_scripts_train_on(
    trees: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["DATASETS.TRAIN", f"('{trees}/train',)", "DATASETS.TEST", f"('{trees}/test',)", "INPUT.VIEW.SIZE", "16"]
    for share, counts in (("25%", (18, 12, 6)), ("", (24, 12, 0)), (f"{trees}/test", (24, 12, 0))):
        cfg = load_config("configs/cls/cifar10_vit_s4.yaml", [*names, "DATASETS.VALIDATION", share])
        data = load_data(cfg, training=True)
        assert data.train and data.test and (len(data.train), len(data.test)) == counts[:2]
        assert count_images(cfg)[:3] == counts
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    keys = ["DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('coco_2017_val[:7]',)"]
    truth = json.loads((samples / "coco/annotations/instances_train2017.json").read_text())
    full = {a["image_id"] for a in truth["annotations"] if not a["iscrowd"]}
    counted = count_images(load_config("configs/coco_vit_s.yaml", keys))
    assert counted == ImageCounts(len(full), 7, empty=len(truth["images"]) - len(full))
    assert count_images(load_config("configs/ssl/coco_vit_s.yaml", keys))[:2] == (30, 7)


def test_an_arm_taps_several_blocks_where_the_encoder_has_one_stride(tmp_path: Path) -> None:
    for table, name in HERE:
        if table not in ("table2", "table3"):
            continue
        runs = plan(TABLES[table][name], 0, 1.0, tmp_path, [])
        for arm in ("supervised", "upstream"):
            plain, tapped = runs[arm], runs.get(f"{arm}_multitap")
            assert (tapped is None) == name.startswith("swin_t")
            if tapped:
                pyramid = dict(tapped.step.overrides)
                assert pyramid == {"MODEL.PYRAMID.NAME": "multitap"} and tapped.step.encoder == plain.step.encoder
                assert tapped.config.MODEL.PYRAMID.NAME == "multitap" and plain.config.MODEL.PYRAMID.NAME == "auto"


def test_a_finished_run_of_another_kind_is_not_taken(tmp_path: Path) -> None:
    row = TABLES["demo"]["streets"]
    plan(row, 0, 1.0, tmp_path, [])["pretrain"].finish()
    assert plan(row, 0, 1.0, tmp_path, [])["pretrain"].finished()
    with pytest.raises(UserError, match="choose another --output"):
        plan(row, 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3"])["pretrain"].finished()


@pytest.mark.parametrize("key", ["SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "SOLVER.CHECKPOINT_MAX_TO_KEEP"])
def test_a_key_that_every_run_sets_itself_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"key {key} is set for every run here"):
        plan(TABLES["demo"]["streets"], 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3", key, "5"])


def test_a_key_that_sets_an_arm_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SOLVER\.MAX_ITER is set by the row itself, for 'supervised_longer'"):
        plan(TABLES["table1"]["cifar10"], 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3"])


def test_a_classifiers_sets_have_one_figure(tmp_path: Path) -> None:
    opts = ["DATASETS.TEST", "('cifar10_test[:5]','cifar10_test[:9]')"]
    run = plan(TABLES["table1"]["cifar10"], 0, 1.0, tmp_path, opts)["supervised"]
    write_results(run, {"test": {"top1": 7.0}})
    assert run.metric(("top1",)) == 7.0
    run = plan(TABLES["table1"]["cifar10_authors"], 0, 1.0, tmp_path / "authors", [])["supervised"]
    write_results(run, {"best_on_test": {"top1": 8.0}})
    assert run.metric(("top1",)) == 8.0


def test_a_finished_run_without_a_figure_is_not_given_as_to_be_run(tmp_path: Path) -> None:
    text = written(TABLES["table2"]["swin_t"], {"supervised": [None]}, 1.0, tmp_path)
    assert "| supervised | none found |" in text and "| upstream | not run yet |" in text


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


def test_an_unknown_row_is_one_sentence(root: Path) -> None:
    assert "did you mean 'swin_t'" in fails(root, "relvit-d2", "reproduce", "table2", "--row", "swint")
