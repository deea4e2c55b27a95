"""The page of a row: our results beside the paper's figures, and when there is a verdict."""

import re
from pathlib import Path
from typing import Any

import pytest

from relvit_d2.experiments.results import collect, page, why_no_verdict
from relvit_d2.experiments.runs import ImageCounts, plan_runs
from relvit_d2.experiments.table_rows import Row, tables
from tests.support.printed_tables import ARMS, GAIN_SLIPS, paper_name, printed
from tests.support.run_results import write_results

TABLES = tables()
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]


def written(row: Row, figures: dict[str, Any], scale: float, folder: Path, *opts: str, **counts: Any) -> str:
    """The page of runs that found ``figures``, an AP or accuracy of each arm and seed; AP50 and AP75 are 2 and 3 AP."""
    count = len(next(iter(figures.values())))
    seeds = [plan_runs(row.steps(), seed, scale, folder, list(opts)) for seed in range(count)]
    for name, values in figures.items():
        for seed, value in zip(seeds, values, strict=False):
            found = dict(zip(("AP", "AP50", "AP75"), (value and value * k for k in (1, 2, 3)), strict=True))
            chosen = "best_on_test" if seed[name].config.TEST.get("BEST_ON_TEST") else "test"
            write_results(seed[name], {"bbox": found, chosen: {"top1": value}})
    images = ImageCounts(**({"train": 5011, "test": 4952} | counts))
    machine = dict.fromkeys(("device", "precision", "torch", "version"), "x")
    about = {"seeds": len(seeds), "note": "", "machine": machine, "command": "c"}
    return page(about | collect(row, seeds, {arm.name: images for arm in row.arms}, scale))


def test_the_page_has_what_the_runs_found_beside_every_published_figure(tmp_path: Path) -> None:
    row, figures = TABLES["table2"]["swin_t"], {"supervised": [15.0, 15.2, 15.4], "joint": [12.0, 12.1, 12.2]}
    text = written(row, figures, 1.0, tmp_path / "same")
    assert "| supervised | 15.20 ± 0.20 |  | 15.43 |  | -0.23, no verdict |" in text
    assert "| joint | 12.10 ± 0.10 | -3.10, beyond noise (± 0.42) | 12.98 | -2.45 | -0.88, no verdict |" in text
    assert "| joint | 24.20 ± 0.20 | -6.20, beyond noise (± 0.83) | 28.37 | -4.03 | -4.17, no verdict |" in text
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


def test_a_misprint_of_the_paper_is_named_and_not_compared_with(tmp_path: Path) -> None:
    figures = {"supervised": [15.0, 15.2], "joint": [12.0, 12.1]}
    text = written(TABLES["table2"]["vit_s"], figures, 1.0, tmp_path)
    assert "| 15.16 (probably a misprint) |  |  |" in text and "the AP of the next row" in text


@pytest.mark.parametrize(
    ("table", "name"),
    [one for one in ROWS if one[1] == paper_name(one[1]) and not one[1].endswith("_labels") and one[0] != "demo"],
)
def test_the_page_of_a_row_has_all_its_published_figures_and_remarks(table: str, name: str, tmp_path: Path) -> None:
    text = written(TABLES[table][name], {"supervised": [12.0]}, 1.0, tmp_path)
    for arm in ARMS:
        for mean, spread in printed().get((table, name, arm), {}).values():
            assert re.search(rf"\| {arm} \|.*\| {mean}{f' ± {spread}' if spread != '-' else ''} ", text)
    if name in GAIN_SLIPS:
        assert all(gain in text for gain in GAIN_SLIPS[name])


def test_a_finished_run_without_a_figure_is_not_given_as_to_be_run(tmp_path: Path) -> None:
    text = written(TABLES["table2"]["swin_t"], {"supervised": [None]}, 1.0, tmp_path)
    assert "| supervised | none found |" in text and "| upstream | not run yet |" in text


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
    run = plan_runs(row.steps(), 0, 1.0, tmp_path, list(opts))["supervised"]
    found = why_no_verdict(row.paper, run, images, 1.0)
    assert words in found and bool(words) == bool(found)
    assert "cut to 0.5" in why_no_verdict(row.paper, run, images, 0.5)


def test_a_model_that_the_test_images_did_not_select_gets_no_verdict_in_table_1(tmp_path: Path) -> None:
    row = TABLES["table1"]["cifar10"]
    assert row.paper
    run = plan_runs(row.steps(), 0, 1.0, tmp_path, [])["supervised"]
    assert "do not select the model" in why_no_verdict(row.paper, run, ImageCounts(50_000, 10_000), 1.0)
