"""relvit-d2 compare: data sets and subsets, planned runs, expected time, results and verdict, bad input, real runs."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ttest_rel

from relvit_d2.conversion.encoder_file import save_encoder
from relvit_d2.encoders import build_encoder
from relvit_d2.experiments.compare import CONFIGS, PRETRAINING_CONFIG
from relvit_d2.experiments.compare_arms import Comparison, read_arm
from relvit_d2.experiments.compare_budget import Cost, Estimate, estimates, fitting_scale, longer_by
from relvit_d2.experiments.compare_data import check_labels, find_data
from relvit_d2.experiments.compare_results import collect, labels_for, page, write_page
from relvit_d2.experiments.runs import Run
from relvit_d2.utils.errors import UserError
from tests.support.labelled_folders import write_crops, write_yolo
from tests.support.run_results import write_results
from tests.support.runs import rows
from tests.support.scripts import fails, run, started, wait_for

TUNED = "SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 0 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
PRETRAINED = "SOLVER.MAX_ITER 6 SOLVER.WARMUP_ITERS 0 SOLVER.IMS_PER_BATCH 4 DATALOADER.NUM_WORKERS 0"
SMALL = "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TRAIN 96 INPUT.MAX_SIZE_TEST 96"


def tool(data: Path, output: Path, *more: object, opts: str = TUNED) -> tuple[object, ...]:
    """A command line with short schedules."""
    keys = PRETRAINED.split()
    pairs = [word for pair in zip(keys[::2], keys[1::2], strict=True) for word in ("--pretrain-opt", *pair)]
    return ("relvit-d2", "compare", "--data", data, "--output", output, *more, *pairs, *opts.split())


@pytest.fixture(scope="module")
def crops(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crops") / "cells"
    write_crops(samples, folder)
    return folder


@pytest.fixture(scope="module")
def yolo(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yolo") / "it's C:\\new" / "cells"
    write_yolo(samples, folder)
    return folder


def comparison(data: Path | str, output: Path, *arms: str, shares: Sequence[float] = (50, 100)) -> Comparison:
    found = find_data(str(data))
    config = CONFIGS[found.task]
    names = arms or ("scratch", "scratch-longer", "joint", "pretrained", "pretrained-mega")
    opts = tuple(TUNED.split())
    pretrain = (PRETRAINING_CONFIG, tuple(PRETRAINED.split()))
    return Comparison(found, tuple(map(read_arm, names)), tuple(shares), config, opts, *pretrain, output)


def test_the_sets_of_a_folder_and_of_registered_names_have_their_roles(crops: Path, yolo: Path, tmp_path: Path) -> None:
    data = find_data(str(yolo))
    assert (data.task, data.train, data.validation, data.test) == (
        "detection",
        *(f"cells_{x}" for x in ("train", "val", "test")),
    )
    data = find_data(str(crops))
    assert (data.task, data.train, data.validation, data.test) == (
        "classification",
        *(str(crops / split) for split in ("train", "val", "test")),
    )
    data = find_data("cifar10")
    assert (data.task, data.train, data.validation, data.test) == (
        "classification",
        "cifar10_train",
        "",
        "cifar10_test",
    )
    data = find_data("voc_2007")
    assert (data.task, data.train, data.validation, data.test) == (
        "detection",
        *(f"voc_2007_{x}" for x in ("train", "val", "test")),
    )
    assert find_data("coco_2017").test == "coco_2017_val" and find_data("coco_2017").validation == ""
    # Folders without splits, or with a training set only, are divided.
    for whole, base in ((crops / "train", crops / "train"), (tmp_path, tmp_path / "train")):
        if whole == tmp_path:
            shutil.copytree(crops / "train", tmp_path / "train")
        data = find_data(str(whole))
        assert (data.train, data.validation, data.test) == (f"{base}[train]", "", f"{base}[val]")


def test_all_arms_of_a_seed_have_the_same_labels_and_pretraining_all_training_images(
    yolo: Path, tmp_path: Path
) -> None:
    plans = [comparison(yolo, tmp_path).plan(seed, {}, 1.0, 2.0) for seed in range(3)]
    for seed, runs in enumerate(plans):
        labelled = {name: r.config.DATASETS.TRAIN for name, r in runs.items() if r.config.TASK == "detection"}
        for share, subset in (("50", f"cells_train[:50%@{seed}]"), ("100", "cells_train")):
            assert {t for name, t in labelled.items() if f"_{share}" in name} == {(subset,)}
        for name in ("pretrain", "pretrain_mega"):
            cfg = runs[name].config
            assert cfg.DATASETS.TRAIN == ("cells_train",) and cfg.DATASETS.TEST == ()
            assert cfg.DATASETS.EXCLUDE == ("cells_val", "cells_test")
        for name, planned in runs.items():
            cfg = planned.config
            assert seed == cfg.SEED
            if name.endswith("/test"):
                assert cfg.DATASETS.TEST == ("cells_test",) and "--eval-only" in planned.command
                assert Path(cfg.MODEL.WEIGHTS) == planned.folder.parent / "model_best.pth"
            elif cfg.TASK == "detection":
                assert cfg.DATASETS.TEST == ("cells_val",) and cfg.TEST.BEST_METRIC == "bbox/AP"
                assert name.startswith("joint") == cfg.MODEL.RELVIT.JOINT
        before = {name: Path(r.config.MODEL.WEIGHTS).parent.name for name, r in runs.items() if "pretrained" in name}
        assert before["pretrained_50"] == "pretrain" and before["pretrained-mega_100"] == "pretrain_mega"
        assert runs["pretrain_mega"].config.PRETEXT.MEGA.M == 10 and not runs["pretrain"].config.PRETEXT.MEGA.M


def test_weights_are_loaded_by_their_arm_or_its_pretraining(crops: Path, tmp_path: Path) -> None:
    encoder = build_encoder("vit_nano", patch_size=8, img_size=32)
    save_encoder(encoder, tmp_path / "native.safetensors", {})
    torch.save(
        {"state_dict": {f"backbone.{k.removeprefix('vit.')}": v for k, v in encoder.state_dict().items()}},
        tmp_path / "other.pth",
    )
    native, other = str(tmp_path / "native.safetensors"), str(tmp_path / "other.pth")
    namesake = str(tmp_path / "other.pt")
    shutil.copy(other, namesake)
    compared = comparison(crops, tmp_path / "out", "scratch", native, f"{other}+pretrained", namesake)
    weights = compared.prepare_weights()
    assert weights[namesake] != weights[f"{other}+pretrained"]
    assert weights[native] == native and Path(weights[f"{other}+pretrained"]).parent == tmp_path / "out/weights"
    runs = compared.plan(0, weights, 1.0, 1.0)
    starts = {name: planned.config.MODEL.WEIGHTS for name, planned in runs.items() if name.endswith("_100")}
    assert sorted(starts.values())[0] == "" and native in starts.values()
    (pretraining,) = (planned for planned in runs.values() if planned.config.TASK == "pretrain")
    assert weights[f"{other}+pretrained"] == pretraining.config.MODEL.WEIGHTS
    scratch = compared.config_of(compared.pretraining(mega=False), pretraining=True).SOLVER
    solver = pretraining.config.SOLVER
    assert pytest.approx(scratch.BASE_LR / 5) == solver.BASE_LR and solver.LAYER_DECAY == 0.75
    assert str(pretraining.folder / "encoder.safetensors") in starts.values()


def test_the_longer_arm_takes_the_seconds_of_both_and_hours_limit_the_total(yolo: Path, tmp_path: Path) -> None:
    compared = comparison(yolo, tmp_path, "scratch", "scratch-longer", "pretrained", shares=(100,))
    compared = Comparison(**{**compared.__dict__, "opts": ("SOLVER.MAX_ITER", "2000"), "pretrain_opts": ()})
    costs = {"train": Cost(0.5, 20, 0.1), "pretrain": Cost(2.0, 10, 0.0)}
    longer = longer_by(compared, costs)
    images = {"cells_train": 9, "cells_val": 5, "cells_test": 6}
    plans = [compared.plan(seed, {}, 1.0, longer) for seed in range(2)]
    found = estimates(compared, plans, costs, images)
    assert found["scratch-longer"].training == found["pretrained"].training == 2 * (2000 * 0.5 + 2000 * 2.0)
    # By hand: each run is started, tested on val after every 200 iterations, and started again for the 6 test images.
    assert found["scratch"] == pytest.approx((2 * 1000, 2 * (20 + 10 * 5 * 0.1 + 20 + 6 * 0.1)))
    total = Estimate(*map(sum, zip(*found.values(), strict=True)))
    scale = fitting_scale(total, 1.0)
    shorter = [compared.plan(seed, {}, scale, longer) for seed in range(2)]
    assert sum(map(sum, estimates(compared, shorter, costs, images).values())) == pytest.approx(3600, rel=0.01)
    train, pretrain = shorter[0]["scratch_100"].config, shorter[0]["pretrain"].config
    assert train.SOLVER.MAX_ITER == pretrain.SOLVER.MAX_ITER == round(2000 * scale)
    assert fitting_scale(total, 100.0) == 1.0
    with pytest.raises(UserError, match="starts and evaluations of the runs alone take"):
        fitting_scale(total, 0.01)


@given(st.floats(1, 90), st.floats(1, 50), st.floats(0.5, 99))
def test_the_curve_is_linear_over_the_logarithm_of_the_share(start: float, slope: float, share: float) -> None:
    curve = {x: start + slope * math.log(x) for x in (0.5, 10.0, 99.0)}
    assert labels_for(start + slope * math.log(share), curve) == pytest.approx(share)
    assert labels_for(curve[99.0] + 1, curve) is None and labels_for(curve[0.5] - 1, curve) == 0.5


FIGURES = {
    "scratch": {10: [10.0, 12.0, 11.0], 100: [40.0, 41.0, 42.0]},
    "scratch-longer": {10: [11.0, 13.5, 12.0], 100: [41.0, 43.0, 42.0]},
    "pretrained": {10: [20.0, 23.0, 22.0], 100: [40.0, 42.0, 42.5]},
}


def written(compared: Comparison, figures: dict[str, dict[int, list[float]]], seeds: int) -> list[dict[str, Run]]:
    """Plans with results: AP50 is twice AP, and the pre-training saw two of six test images."""
    plans = [compared.plan(seed, {}, 1.0, 1.0) for seed in range(seeds)]
    for arm, by_share in figures.items():
        for share, values in by_share.items():
            for runs, value in zip(plans, values, strict=False):
                found: dict[str, Any] = {"bbox": {"AP": value, "AP50": 2 * value}}
                if arm == "pretrained":
                    found["seen_in_pretraining"] = {"seen": 2, "images": 6}
                write_results(runs[f"{arm}_{share}/test"], found)
    return plans


def test_results_are_paired_and_the_verdict_follows_them(yolo: Path, tmp_path: Path) -> None:
    compared = comparison(yolo, tmp_path, *FIGURES, shares=(10, 100))
    results = collect(compared, written(compared, FIGURES, 3))
    for share in (10, 100):
        for other in ("scratch", "scratch-longer"):
            expected = ttest_rel(FIGURES["pretrained"][share], FIGURES[other][share]).confidence_interval(0.95)
            found = results["metrics"]["AP"]["pretrained"][str(share)]["against"][other]
            assert (found["value"] - found["margin"], found["value"] + found["margin"]) == pytest.approx(
                (expected.low, expected.high)
            )
    text = " ".join(results["verdict"])
    assert "pretrained beats scratch and scratch-longer beyond noise with 10 % of the labels." in text
    assert "The difference of pretrained to scratch in AP is within noise: +0.50 ± 1.24 with 100 %" in text
    assert results["metrics"]["AP"]["pretrained"]["100"]["against"]["scratch"]["needed"] == 10  # an effect of 1 std
    assert "a difference of this size needs about 10 seeds" in text
    # On scratch's line over the logarithm of the share, from 11 at 10 % to 41 at 100 %, 21.67 is at 22.66 %.
    assert results["saved"]["pretrained"] == {"10": pytest.approx(10 ** (1 + (65 / 3 - 11) / 30))}
    about = {
        "scale": 1.0,
        "longer": 2.5,
        "command": "c",
        "machine": dict.fromkeys(("device", "precision", "torch", "version"), "x"),
    }
    markdown = page(results | about)
    assert "| 10 % | pretrained | 21.67 | 1.53 | 3 | +10.67 ± 1.43 | +9.50 ± 1.24 |" in markdown
    assert "pretrained with 10 % of the labels is as good as scratch with 22.7 %." in markdown
    assert "pretrained: 2 of 6 images of cells_test were seen in pre-training" in markdown
    assert "configs times 1; that of scratch-longer is further multiplied by 2.5, so that it takes" in markdown
    write_page(results | about, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert html.count('class="chart"') == 2 and "were seen in pre-training" in html and "+10.67 ± 1.43" in html
    assert "All schedules are those of the configs times 1." in page(results | about | {"longer": 1.0})


def test_one_seed_has_no_interval_and_unfinished_runs_no_result(yolo: Path, tmp_path: Path) -> None:
    compared = comparison(yolo, tmp_path, *FIGURES, shares=(10, 100))
    results = collect(compared, written(compared, {name: {10: row[10]} for name, row in FIGURES.items()}, 1))
    cell = results["metrics"]["AP"]["pretrained"]["10"]
    assert cell["std"] is None and cell["against"]["scratch"] == {
        "value": 10.0,
        "margin": None,
        "pairs": 1,
        "needed": None,
    }
    assert results["metrics"]["AP"]["pretrained"]["100"]["mean"] is None and results["saved"] == {}
    text = " ".join(results["verdict"])
    assert "differs from scratch in AP by +10.00 with 10 %" in text and "One seed has no interval" in text
    assert "beats" not in text.replace("does not beat", "") and "±" not in text
    other = comparison(yolo, tmp_path / "other", *FIGURES, shares=(10, 100))
    assert collect(other, written(other, {"scratch": FIGURES["scratch"]}, 1))["verdict"] == []


def test_subsets_of_a_class_folder_have_every_class_and_differ_by_seed(crops: Path, tmp_path: Path) -> None:
    compared = comparison(crops, tmp_path)
    cfg = compared.config_of(compared.training())
    counts = check_labels(compared.data, cfg, (25, 50, 100), 3)
    assert counts[str(crops / "train")] == sum(1 for _ in (crops / "train").rglob("*.png"))
    with pytest.raises(UserError, match=r"leaves the class '\w+' without an example: give a larger share"):
        check_labels(compared.data, cfg, (10, 100), 3)


@pytest.mark.parametrize(
    ("message", "more"),
    [
        ("--labels 3%", ("--labels", "3%")),
        ("leaves the class", ("--labels", "5%", "--seeds", 1)),
        ("give only", ("--labels", "95%", "--seeds", 60)),
        ("is not a percentage above 0", ("--labels", "0%")),
        ("is not a percentage above 0", ("--labels", "10")),
        ("--seeds 0 is not positive", ("--seeds", 0)),
        ("--hours 0 is not positive", ("--hours", 0)),
        ("is one arm", ("--arms", "scratch")),
        ("give each value once", ("--arms", "scratch", "scratch")),
        ("'a/b.pth' and 'a_b.pth' have the same folder", ("--arms", "a/b.pth", "a_b.pth")),
        ("did you mean 'pretrained'", ("--arms", "scratch", "pretraind")),
        ("absent.pth': the file does not exist", ("--arms", "scratch", "absent.pth")),
        ("has no model 'no_such'", ("--arms", "scratch", "timm:no_such")),
        ("is of the task pretrain", ("--config-file", "configs/demo/ssl_streets.yaml")),
        ("config file 'absent.yaml' does not exist", ("--pretrain-config", "absent.yaml")),
        ("choose the arm pretrained-mega", ("--pretrain-opt", "PRETEXT.MEGA.M", 3)),
    ],
)
def test_invalid_arguments_are_errors_before_training(
    message: str, more: tuple[object, ...], crops: Path, tmp_path: Path
) -> None:
    assert message in fails(tmp_path, *tool(crops, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_invalid_data_and_keys_are_errors(crops: Path, yolo: Path, tmp_path: Path) -> None:
    def sentence(data: Path | str, opts: str = TUNED) -> str:
        return fails(tmp_path, *tool(Path(data), tmp_path / "out", opts=opts))

    assert "choose the data with --data" in sentence(crops, f"{TUNED} DATASETS.TEST ('a',)")
    assert "choose how many with --seeds" in sentence(crops, f"{TUNED} SEED 3")
    assert "SOLVER.WARMUP_ITERS 9 is not less than SOLVER.MAX_ITER 4" in sentence(
        crops, f"{TUNED} SOLVER.WARMUP_ITERS 9"
    )
    assert "did you mean 'cifar10'" in sentence("cifer10")
    (tmp_path / "empty").mkdir()
    assert "has neither annotated objects" in sentence(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(yolo, broken)
    label = next((broken / "labels/train").iterdir())
    label.write_text("0 0.5 0.5 nonsense 0.1")
    assert label.name in sentence(broken, f"{TUNED} {SMALL}")
    (broken / "labels/test").rename(broken / "elsewhere")
    assert not (tmp_path / "out").exists()
    # An output folder with other files, or with another comparison.
    (tmp_path / "out").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "out/photo.png")
    assert "contains files of another kind" in sentence(crops)
    (tmp_path / "out/photo.png").unlink()
    plan: dict[str, Any] = {"about": {"data": {}}, "costs": {}, "scale": None}
    (tmp_path / "out/plan.json").write_text(json.dumps(plan))
    assert "contains another comparison, with data" in sentence(crops)
    for text in ("{", '{"about": {}}'):
        (tmp_path / "out/plan.json").write_text(text)
        assert "plan.json' is damaged" in sentence(crops)


def outcome(output: Path) -> dict[str, Any]:
    """Metrics and results of a comparison, without measured times."""
    runs = {str(path.parent.relative_to(output)): rows(path.parent) for path in output.glob("seed_*/*/metrics.json")}
    results = json.loads((output / "results.json").read_text())
    return {"runs": runs, **{key: results[key] for key in ("metrics", "saved", "seen", "verdict")}}


@pytest.mark.slow
def test_a_class_folder_is_compared_killed_and_resumed(crops: Path, tmp_path: Path) -> None:
    arms = ("--arms", "scratch", "pretrained", "joint", "--labels", "50%", "--seeds", 2)
    opts = f"{TUNED} TEST.EVAL_PERIOD 2 SOLVER.CHECKPOINT_PERIOD 1"
    done = run(tmp_path, *tool(crops, tmp_path / "straight", *arms, opts=opts))
    assert "top-1 on" in done.stdout and (tmp_path / "straight/report.html").is_file()
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "straight/trial", killed / "trial")
    shutil.copy(tmp_path / "straight/plan.json", killed)
    command = tool(crops, killed, *arms, opts=opts)
    with started(tmp_path, *command) as process:
        wait_for((killed / "seed_0/pretrain/metrics.json").exists, process)
        process.kill()
    assert not (killed / "seed_0/pretrain/finished.json").exists()
    run(tmp_path, *command)
    assert outcome(killed) == outcome(tmp_path / "straight")
    assert outcome(killed)["seen"]["pretrained"] == {
        "seen": 0,
        "images": outcome(killed)["seen"]["pretrained"]["images"],
    }
    # More seeds can be added.
    more = run(tmp_path, *tool(crops, killed, *arms[:-1], 3, opts=opts))
    assert "seed 2" in more.stderr and "seed 1" not in more.stderr


@pytest.mark.slow
def test_a_yolo_folder_is_compared(yolo: Path, tmp_path: Path) -> None:
    arms = ("--arms", "scratch", "pretrained", "scratch-longer", "--labels", "60%", "--seeds", 2)
    done = run(tmp_path, *tool(yolo, tmp_path / "out", *arms, opts=f"{TUNED} {SMALL}"))
    assert "AP on cells_test, percent" in done.stdout and "pretrained does not beat" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["seen"]["pretrained"]["images"] == 6
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    longer = 1 + 6 * plan["costs"]["pretrain"]["iteration"] / (4 * plan["costs"]["train"]["iteration"])
    lines = (tmp_path / "out/seed_0/scratch-longer_60/metrics.json").read_text().splitlines()
    assert len(lines) == max(round(4 * longer), 1)
