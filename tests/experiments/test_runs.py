"""Runs with resume: settings that are compared, refused keys, metrics that are read, images that are counted."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relvit_d2.classification.run import load_data
from relvit_d2.data.subsets import subset_name
from relvit_d2.experiments.runs import ImageCounts, count_images, plan_runs, scaled_schedule
from relvit_d2.experiments.steps import Step
from relvit_d2.experiments.table_rows import tables
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.run_results import write_results

TABLES = tables()
CONFIG = load_config("configs/demo/streets.yaml", [])


def test_a_finished_run_of_another_kind_is_not_taken(tmp_path: Path) -> None:
    row = TABLES["demo"]["streets"]
    plan_runs(row.steps(), 0, 1.0, tmp_path, [])["pretrain"].finish()
    assert plan_runs(row.steps(), 0, 1.0, tmp_path, [])["pretrain"].finished()
    with pytest.raises(UserError, match="choose another --output"):
        plan_runs(row.steps(), 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3"])["pretrain"].finished()
    step = Step("train", "configs/demo/streets.yaml", weights="encoder.safetensors")
    plan_runs([step], 0, 1.0, tmp_path, [])["train"].finish()
    assert plan_runs([step], 0, 1.0, tmp_path, [])["train"].finished()
    with pytest.raises(UserError, match=r"with weights encoder\.safetensors, but now it is None"):
        plan_runs([replace(step, weights="")], 0, 1.0, tmp_path, [])["train"].finished()


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(1e-4, 3))
def test_a_scaled_schedule_has_at_most_as_many_evaluations(iterations: int, period: int, scale: float) -> None:
    cfg = CONFIG.clone()
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = iterations, period
    scaled = scaled_schedule(cfg, scale)
    assert math.ceil(scaled["SOLVER.MAX_ITER"] / scaled["TEST.EVAL_PERIOD"]) <= math.ceil(iterations / period)
    assert scaled["TEST.EVAL_PERIOD"] == pytest.approx(period * scaled["SOLVER.MAX_ITER"] / iterations, abs=1)


@pytest.mark.parametrize("key", ["SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "SOLVER.CHECKPOINT_MAX_TO_KEEP"])
def test_a_key_that_every_run_sets_itself_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"key {key} is set for every run here"):
        plan_runs(TABLES["demo"]["streets"].steps(), 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3", key, "5"])


def test_a_key_that_sets_an_arm_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SOLVER\.MAX_ITER is set by the row itself, for 'supervised_longer'"):
        plan_runs(TABLES["table1"]["cifar10"].steps(), 0, 1.0, tmp_path, ["SOLVER.MAX_ITER", "3"])


def test_a_classifiers_sets_have_one_figure(tmp_path: Path) -> None:
    opts = ["DATASETS.TEST", "('cifar10_test[:5]','cifar10_test[:9]')"]
    run = plan_runs(TABLES["table1"]["cifar10"].steps(), 0, 1.0, tmp_path, opts)["supervised"]
    write_results(run, {"test": {"top1": 7.0}})
    assert run.metric(("top1",)) == 7.0
    run = plan_runs(TABLES["table1"]["cifar10_authors"].steps(), 0, 1.0, tmp_path / "authors", [])["supervised"]
    write_results(run, {"best_on_test": {"top1": 8.0}})
    assert run.metric(("top1",)) == 8.0


def test_labels_are_cut_and_pretraining_sees_all(tmp_path: Path) -> None:
    runs = plan_runs(TABLES["table2"]["vit_s_labels"].steps(), 0, 1.0, tmp_path, [])
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
    assert subset_name(name, share) == part


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
