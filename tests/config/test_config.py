"""Configs: every file loads, faults are one sentence that names the key."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from detectron2.config import get_cfg

from relvit_d2.config.config_file import COMMANDS, flat
from relvit_d2.detection.backbone import SimplePyramid, build_encoder_pyramid_backbone
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.detection.model import build_detector
from relvit_d2.encoders import ENCODERS
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import TASKS, load_config, read_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.errors import UserError

CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml"))
ROWS = [path for path in CONFIGS if "base/" not in path and "demo/" not in path]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads(path: str) -> None:
    cfg = load_config(path, ["SOLVER.MAX_ITER", "3"])
    assert cfg.SOLVER.MAX_ITER == 3
    assert cfg.MODEL.ENCODER.NAME in ENCODERS


@pytest.mark.parametrize("path", [path for path in ROWS if "MAX_ITER" in Path(path).read_text()])
def test_the_arithmetic_in_a_header_is_that_of_the_schedule(path: str) -> None:
    found = re.search(r"= (\d+) \* (\d+) / (\d+) = (\d+) iterations", Path(path).read_text().replace(",", ""))
    assert found
    epochs, images, batch, iterations = map(int, found.groups())
    cfg = load_config(path, [])
    assert (batch, iterations) == (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER)
    assert abs(epochs * images / batch - iterations) < 5


@pytest.mark.parametrize("path", ROWS)
def test_a_header_gives_row_commands_and_cost_and_the_commands_fit_together(path: str) -> None:
    header = Path(path).read_text()
    # Variants of a pre-training have no row of their own.
    assert re.search("Table [123]", header) or ("/ssl/" in path and re.search("_BASE_: [a-z]", header))
    assert re.search(r"^# Cost: .+", header, re.MULTILINE)
    commands = re.findall(r"python (\w+\.py) --config-file (\S+)", header)
    scripts = {"pretrain": "pretrain_ssl.py", "classification": "train_cls.py", "detection": "train_net.py"}
    assert (scripts[load_config(path, []).TASK], path) in commands
    for script, file in commands:
        assert scripts[load_config(file, []).TASK] == script
    weights = load_config(path, []).MODEL.WEIGHTS
    before = [load_config(file, []).OUTPUT_DIR for script, file in commands if script == "pretrain_ssl.py"]
    if "/ssl/" not in path:
        assert [f"{folder}/encoder.safetensors" for folder in before] == [weights] * bool(weights)


# The image transforms of the authors' code (guglielmocamporese/relvit, dataloaders/transforms.py:206-259), the same in
# pre-training and classification: RandomCrop(size, padding=4) for the small sets, else RandomResizedCrop(size) with
# torchvision's scale; RandomHorizontalFlip everywhere. Row: side, crop, pixels of padding or scale.
TRANSFORMS: dict[str, tuple[int, str, int | list[float]]] = {
    "cifar10_vit_s4": (32, "pad", 4),
    "cifar100_vit_s4": (32, "pad", 4),
    "svhn_vit_s4": (32, "pad", 4),
    "tiny_imagenet_vit_s8": (64, "pad", 4),
    "flower102_vit_s32": (224, "resized", [0.08, 1.0]),
    "imagenet100_vit_s32": (224, "resized", [0.08, 1.0]),
    "imagenet_vit_s32": (224, "resized", [0.08, 1.0]),
}


@pytest.mark.parametrize("row", TRANSFORMS)
def test_crop_scale_and_flip_of_a_row_of_table_1_are_the_authors(row: str) -> None:
    side, crop, extent = TRANSFORMS[row]
    views = load_config(f"configs/ssl/{row}.yaml", []).PRETEXT
    seen = views.IMAGE_SIZE, views.CROP, views.PAD if crop == "pad" else views.CROP_SCALE
    assert (*seen, views.FLIP, views.PAD_MODE) == (side, crop, extent, 0.5, "constant")
    paths = [path for path in CONFIGS if Path(path).parent.name == "cls" and Path(path).name.startswith(f"{row}")]
    assert len(paths) >= 2
    for path in paths:
        view = load_config(path, []).INPUT.VIEW
        assert (view.SIZE, view.CROP, view.PAD if crop == "pad" else view.SCALE, view.FLIP) == (side, crop, extent, 0.5)


def test_every_row_of_table_1_has_the_authors_transforms() -> None:
    assert {
        Path(path).stem.removesuffix("_supervised").removesuffix("_joint") for path in CONFIGS if "/cls/" in path
    } == {*TRANSFORMS}


@pytest.mark.parametrize("path", [path for path in CONFIGS if "base/" not in path])
def test_digits_are_not_mirrored_and_anchors_fit_the_levels(path: str) -> None:
    cfg = load_config(path, [])
    # Rows of Table 1 mirror digits as the authors do.
    if cfg.DATASETS.TRAIN[0].startswith(("svhn_", "streets")) and "svhn_digits" not in cfg.DATASETS.TRAIN[0]:
        flip = {"pretrain": "PRETEXT.FLIP", "detection": "INPUT.RANDOM_FLIP", "classification": "INPUT.VIEW.FLIP"}
        assert get_key(cfg, flip[cfg.TASK]) in (0, "none")
    if "ssl" not in path and "/cls/" not in path:
        assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(cfg.MODEL.RPN.IN_FEATURES)


@pytest.mark.parametrize("path", [path for path in ROWS if "ssl/" not in path and "cls/" not in path])
def test_a_header_names_the_pyramid_and_why(path: str) -> None:
    """The pyramid that the config builds, and beside the paper's FPN the key that is nearer to it."""
    cfg, header = load_config(path, []), " ".join(Path(path).read_text().replace("\n# ", " ").split())
    pyramid = built_pyramid(cfg.MODEL.ENCODER.NAME, cfg.MODEL.ENCODER.PATCH_SIZE, cfg.MODEL.PYRAMID.NAME)
    assert f"Pyramid: {'simple' if pyramid is SimplePyramid else 'FPN'}" in header and 'paper writes "FPN"' in header
    assert ("MODEL.PYRAMID.NAME multitap" in header) == (pyramid is SimplePyramid)


@pytest.mark.parametrize("path", ROWS)
def test_a_header_states_how_the_authors_data_and_choice_of_the_model_differ(path: str) -> None:
    header, stem = " ".join(Path(path).read_text().replace("\n# ", " ").split()), Path(path).stem
    assert ("minival that later became val2017 (from memory)" in header) == stem.startswith("coco_")
    assert ("Kaggle set ambityga/imagenet100" in header) == stem.startswith("imagenet100_")
    assert ("the least validation loss" in header) == ("/ssl/" in path)
    if "/cls/" in path and not stem.endswith(("_supervised", "_joint")):
        assert "The authors" in header and "TEST.BEST_ON_TEST True" in header


@functools.cache
def built_pyramid(encoder: str, patch: int, pyramid: str) -> type:
    keys = ["MODEL.ENCODER.NAME", encoder, "MODEL.ENCODER.PATCH_SIZE", str(patch), "MODEL.PYRAMID.NAME", pyramid]
    return type(build_encoder_pyramid_backbone(load_config("configs/base/detection.yaml", keys), None))


def test_no_two_runs_share_a_folder() -> None:
    folders = [load_config(path, []).OUTPUT_DIR for path in CONFIGS if "base/" not in path]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", [path for path in ROWS if "/ssl/" in path])
def test_the_stated_chance_is_that_of_the_model(path: str) -> None:
    found = re.search(r"on an? (\d+) x (\d+) grid: relation ([\d.]+) %, position ([\d.]+) %", Path(path).read_text())
    assert found
    task = build_pretraining_model(load_config(path, ["MODEL.DEVICE", "cpu"])).task
    assert task.grid == (int(found[1]), int(found[2]))
    told = {"relation": float(found[3]) / 100, "position": float(found[4]) / 100}
    assert {name: one.chance(task.grid) for name, one in task.named_tasks()} == pytest.approx(told, abs=6e-4)


def test_our_keys_leave_detectron2s_as_they_are_but_for_the_named_ones() -> None:
    stock, ours = get_cfg(), get_cfg()
    add_relvit_config(ours)

    def keys(node: dict[str, object], prefix: str = "") -> set[str]:
        found = set()
        for name, value in node.items():
            found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
        return found

    assert keys(stock) < keys(ours)
    assert {key for key in keys(stock) if get_key(stock, key) != get_key(ours, key)} - {"MODEL.DEVICE"} == {
        "SEED",
        "INPUT.FORMAT",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
        "MODEL.BACKBONE.NAME",
        "MODEL.BACKBONE.FREEZE_AT",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "SOLVER.LR_SCHEDULER_NAME",
        "SOLVER.WEIGHT_DECAY",
        "SOLVER.WEIGHT_DECAY_BIAS",
        "SOLVER.BASE_LR",
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    }


# A value that no key without effect has by default.
OTHER = {bool: "True", float: "0.7", int: "7", str: "other"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("MODEL.DEVICE", "gpu", "MODEL.DEVICE 'gpu' is not a device of torch"),
        ("SOLVER.BASE_LR", "-1", "SOLVER.BASE_LR -1.0 is too small: give 0 or more"),
        ("DATALOADER.NUM_WORKERS", "-1", "NUM_WORKERS -1 is too small"),
        ("MODEL.ENCODER.PATCH_SIZE", "0", "MODEL.ENCODER.PATCH_SIZE 0 is too small: give 1 or more"),
        ("MODEL.ENCODER.DROP_PATH", "2", "MODEL.ENCODER.DROP_PATH 2.0 is too large: give 1 or less"),
    ],
)
def test_values_that_every_task_reads_are_checked_in_every_task(task: str, key: str, value: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(f"configs/base/{BASES[task]}.yaml", [key, value])


BASES = {"pretrain": "ssl", "detection": "detection", "classification": "cls"}


@pytest.mark.parametrize("task", TASKS)
def test_keys_without_effect_are_refused_and_exist(task: str) -> None:
    stock, base = get_cfg(), f"configs/base/{BASES[task]}.yaml"
    for key in TASKS[task].without_effect:
        default = get_key(stock, key)
        other = "False" if default is True else OTHER.get(type(default), "[1]")
        with pytest.raises(UserError, match=rf"key {key} has no effect here; leave it out and set "):
            load_config(base, [key, other])


@pytest.mark.parametrize("task", TASKS)
def test_a_config_is_of_its_task_only(task: str, tmp_path: Path) -> None:
    base = Path(f"configs/base/{BASES[task]}.yaml").resolve()
    run = load_config(str(base), [], task)
    (tmp_path / "config.yaml").write_text(run.dump())
    again = load_config(str(tmp_path / "config.yaml"), [])
    assert yaml.safe_load(again.dump()) == yaml.safe_load(run.dump())  # yaml has no tuples
    (tmp_path / "own.yaml").write_text("SEED: 3\n")
    assert load_config(str(tmp_path / "own.yaml"), ["SEED", "0"], task) == TASKS[task].defaults()
    with pytest.raises(UserError, match=r"own.yaml' has no key TASK: add"):
        load_config(str(tmp_path / "own.yaml"), [])
    (tmp_path / "typo.yaml").write_text("TASK: [pretraining]\n")
    with pytest.raises(UserError, match=r"TASK '\['pretraining'\]' is unknown; give one of pretrain, detection"):
        load_config(str(tmp_path / "typo.yaml"), [], task)
    for other in set(TASKS) - {task}:
        # Whatever else is in the file, the task is the error.
        (tmp_path / "other.yaml").write_text(f"_BASE_: {base}\nTASC: 3\n")
        with pytest.raises(
            UserError, match=rf"other.yaml' is of the task {task}, not {other}: start relvit-d2 {COMMANDS[task]}"
        ):
            load_config(str(tmp_path / "other.yaml"), [], other)
        with pytest.raises(UserError, match=f"override 'TASK {other}': the config is of the task {task}"):
            load_config(str(base), ["TASK", other])


def test_a_key_of_another_task_names_it() -> None:
    keys = {name: set(flat(task.defaults())) for name, task in TASKS.items()}
    ours = set().union(*keys.values()) - set(flat(get_cfg()))
    with pytest.raises(UserError, match=r"key DATASETS.CUSTOM.a.ROOT belongs to the task pretrain .* or detection"):
        load_config("configs/base/cls.yaml", ["DATASETS.CUSTOM.a.ROOT", "data"])
    for task, base in BASES.items():
        assert ours - keys[task]
        for key in ours - keys[task]:
            owners = " or ".join(f"{name} (relvit-d2 {COMMANDS[name]})" for name in TASKS if key in keys[name])
            with pytest.raises(UserError) as error:
                load_config(f"configs/base/{base}.yaml", [key, "1"])
            assert f"'{key} 1': key {key} belongs to the task {owners}, not to {task}: leave it out" in str(error.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("MODEL.CHECKPOINT", "MODEL.ACTIVATION_CHECKPOINT"),
        ("SOLVER.ACCUMULATE", "SOLVER.GRAD_ACCUM_STEPS"),
        ("INPUT.WHITE", "INPUT.MAX_VALUE"),
    ],
)
def test_a_renamed_key_names_the_new_one(old: str, new: str, task: str, tmp_path: Path) -> None:
    if new not in flat(TASKS[task].defaults()):
        assert (task, new) == ("classification", "INPUT.MAX_VALUE")
        return
    group, name = old.split(".")
    (tmp_path / "old.yaml").write_text(f"{group}:\n  {name}: 1\n")
    with pytest.raises(UserError, match=rf"old.yaml': key {old} was renamed to {new}: rename it"):
        load_config(str(tmp_path / "old.yaml"), [], task)
    assert get_key(load_config(f"configs/base/{BASES[task]}.yaml", [new, "1"]), new) == 1


def test_detectron2s_merge_names_the_new_key_too() -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    with pytest.raises(KeyError, match=r"SOLVER.ACCUMULATE was renamed to SOLVER.GRAD_ACCUM_STEPS"):
        cfg.merge_from_list(["SOLVER.ACCUMULATE", 2])


@pytest.mark.parametrize("task", TASKS)
def test_amp_is_bfloat16_and_contradicts_float32(task: str) -> None:
    base, amp = f"configs/base/{BASES[task]}.yaml", ["SOLVER.AMP.ENABLED", "True"]
    assert load_config(base, []).SOLVER.PRECISION == "auto"
    for setting in ("auto", "bfloat16"):
        assert load_config(base, [*amp, "SOLVER.PRECISION", setting]).SOLVER.PRECISION == "bfloat16"
    with pytest.raises(UserError, match=r"AMP.ENABLED True.*contradicts SOLVER.PRECISION float32: set .* auto or"):
        load_config(base, ["SOLVER.PRECISION", "float32", *amp])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SOLVER.BASE_RL", "1"], r"unknown config key 'SOLVER.BASE_RL'; did you mean 'SOLVER.BASE_LR'"),
        (["MODEL.ENCODER.PATCHSIZE", "8"], r"did you mean 'MODEL.ENCODER.PATCH_SIZE'"),
        (["SOLVER.MAX_ITER", "many"], r"SOLVER.MAX_ITER.*int.*many"),
        (["SOLVER.MAX_ITER"], "KEY VALUE pairs"),
        (["SOLVER.MAX_ITER", "2.5"], r"SOLVER.MAX_ITER takes a value of type int, not 2.5"),
        (["SOLVER.MAX_ITER", "True"], r"SOLVER.MAX_ITER takes a value of type int, not True"),
        (["SOLVER.BASE_LR", "nan"], r"SOLVER.BASE_LR takes a value of type float"),
        (["MODEL.MASK_ON", "2"], r"MODEL.MASK_ON takes a value of type bool, not 2"),
        (["INPUT.MIN_SIZE_TRAIN", "512"], r"takes a value of type tuple, such as \(800,\), not 512 of type int"),
        (["MODEL.PYRAMID.STRIDES", "['p2']"], r"MODEL.PYRAMID.STRIDES takes a value of type list"),
        (["SOLVER", "3"], r"SOLVER is a group of keys"),
        (["SEED.VALUE", "3"], r"SEED takes a value of type int"),
        (["SOLVER.BASE", "{LR: 3}"], r"unknown config key 'SOLVER.BASE.LR'; did you mean 'SOLVER.BASE_LR'"),
        (["SOLVER.GRAD_ACCUM_STEPS", "0"], r"SOLVER.GRAD_ACCUM_STEPS 0 is too small: give 1 or more"),
        (
            ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 3.5]]"],
            r"\['bbox', 'AP', 3.5\] is not \[task, metric, value, tol",
        ),
        (["TEST.EXPECTED_RESULTS", "['bbox']"], r"bbox is not \[task, metric, value, tolerance\]"),
        (
            ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 3.5, 1]]", "DATASETS.TEST", "('streets_test', 'svhn_test')"],
            "EXPECTED_RESULTS needs one data set in DATASETS.TEST",
        ),
        (
            [
                "TEST.AUG.ENABLED",
                "True",
                "INPUT.CHANNELS",
                "2",
                "MODEL.PIXEL_MEAN",
                "[1, 2]",
                "MODEL.PIXEL_STD",
                "[1, 2]",
            ],
            "TEST.AUG.ENABLED needs images of 1 or 3 channels, but INPUT.CHANNELS is 2",
        ),
        (["INPUT.CHANNELS", "1"], r"MODEL.PIXEL_MEAN has 3 values, but images have 1 channels"),
        (["VERSION", "1"], r"VERSION 1 .* rewrite the file for version 2"),
        (["INPUT.MIN_SIZE_TRAIN", "((64,),)"], r"INPUT.MIN_SIZE_TRAIN takes a value of type tuple"),
        (["DATASETS.CUSTOM", "{a: ["], r"override 'DATASETS.CUSTOM \{a: \['"),
        (["DATASETS.CUSTOM", "{a: {ROOT: 2024-13-01}}"], "is not valid yaml: month must be in 1..12"),
        (["DATASETS.CUSTOM", "{a: {ROOT: x}, a: {ROOT: y}}"], "has the key 'a' twice"),
        (["DATASETS.TRAIN", "[['a']]"], "DATASETS.TRAIN takes a value of type tuple of text"),
        (["MODEL.MASK_ON", "["], r"MODEL.MASK_ON takes a value of type bool, not '\['"),
        (["MODEL.MASK_ON", "@x"], "MODEL.MASK_ON takes a value of type bool, not '@x'"),
        (["MODEL.MASK_ON", "a: b: c"], "MODEL.MASK_ON takes a value of type bool, not 'a: b: c'"),
    ],
)
def test_bad_overrides(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("configs/demo/streets.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "VERSION: 2\nSOLVER:\n  MAX_ITTER: 3\n",
            r"unknown config key 'SOLVER.MAX_ITTER'; did you mean 'SOLVER.MAX_ITER'",
        ),
        ("SOLVER:\n  MAX_ITER: null\n", r"SOLVER.MAX_ITER takes a value of type int, not None"),
        ("SOLVER: 3\n", r"bad.yaml': SOLVER is a group of keys"),
        ("VERSION: 2\nSOLVER:\n  MAX_ITER: soon\n", r"SOLVER.MAX_ITER.*int.*soon"),
        ("VERSION: 2\nSOLVER: [\n", "not valid yaml"),
        ("OUTPUT_DIR: 2024-13-01\n", "bad.yaml' is not valid yaml: month must be in 1..12"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ("just words\n", "bad.yaml"),
    ],
)
def test_bad_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(str(path), [], "detection")


LEVELS = r"MODEL.RPN.IN_FEATURES has 2 levels \['p2', 'p3'\]: give one list for each level, or one for all"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES [[8],[16],[32]]", f"SIZES has 3 lists, but {LEVELS}"),
        ("MODEL.ANCHOR_GENERATOR.SIZES []", f"SIZES has 0 lists, but {LEVELS}"),
        ("MODEL.ANCHOR_GENERATOR.SIZES [[],[]]", "SIZES .* must have lists of one or more numbers above 0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES [[32,64],[64]]", r"give \[4, 2\] anchors per cell"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[1],[1],[1]]", f"ASPECT_RATIOS has 3 lists, but {LEVELS}"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[-1]]", "ASPECT_RATIOS .* numbers above 0"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET 1.5", "OFFSET 1.5 is too large: give 1 or less"),
        ("MODEL.ANCHOR_GENERATOR.NAME RotatedAnchorGenerator", "rotated boxes.* set DefaultAnchorGenerator"),
        ("MODEL.RPN.IN_FEATURES ['p2']", r"SIZES has 2 lists, but MODEL.RPN.IN_FEATURES has 1 levels \['p2'\]"),
        ("MODEL.RPN.IN_FEATURES []", "MODEL.RPN.IN_FEATURES is empty"),
        ("MODEL.RPN.IOU_THRESHOLDS [0.3]", r"IOU_THRESHOLDS \[0.3\] and IOU_LABELS \[0, -1, 1\] do not fit"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS (1,1)", "MODEL.RPN.BBOX_REG_WEIGHTS .* must be four numbers"),
        ("MODEL.RPN.HEAD_NAME StandardRPNHeda", "'StandardRPNHeda' is not registered .* 'StandardRPNHead'"),
        ("MODEL.ROI_HEADS.IN_FEATURES []", "MODEL.ROI_HEADS.IN_FEATURES is empty"),
        ("MODEL.ROI_HEADS.IN_FEATURES ['p3','p2']", "must be levels in a row, finest first"),
        ("MODEL.ROI_HEADS.IOU_LABELS [0]", "MODEL.ROI_HEADS.IOU_THRESHOLDS .* do not fit"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE ROI", "is not supported; give ROIAlignV2, ROIAlign, ROIPool"),
        ("MODEL.PYRAMID.NORM BatchNorm", "MODEL.PYRAMID.NORM 'BatchNorm' is not supported"),
        (
            "MODEL.PYRAMID.NORM SyncBN",
            "'SyncBN' is not supported, for it needs statistics .*; give '', LN, GN, FrozenBN",
        ),
        ("MODEL.PYRAMID.NORM BN", "MODEL.PYRAMID.NORM 'BN' is not supported, for it needs statistics over the batch"),
        ("MODEL.PYRAMID.NORM naiveSyncBN", "'naiveSyncBN' is not supported, for it needs"),
        ("MODEL.PYRAMID.NORM nnSyncBN", "'nnSyncBN' is not supported, for it needs"),
        ("MODEL.ROI_HEADS.NAME CascadeROIHeads", "several box heads, which are not supported: set StandardROIHeads"),
        ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS True", "USE_FED_LOSS has no effect here"),
        ("MODEL.KEYPOINT_ON True", "KEYPOINT_ON has no effect here; .* keypoints are not supported"),
        ("MODEL.DEVICE gpu", "MODEL.DEVICE 'gpu' is not a device of torch; set cpu or cuda"),
        ("INPUT.MIN_SIZE_TRAIN ()", r"INPUT.MIN_SIZE_TRAIN \(\) must be one or more sides"),
        ("INPUT.MIN_SIZE_TRAIN (0,)", r"INPUT.MIN_SIZE_TRAIN \(0,\) must be one or more sides"),
        ("INPUT.MIN_SIZE_TRAIN (9,8) INPUT.MIN_SIZE_TRAIN_SAMPLING range", r"\(9, 8\) is not a range"),
        ("INPUT.MAX_SIZE_TRAIN 0", "INPUT.MAX_SIZE_TRAIN 0 is too small: give 1 or more"),
        ("INPUT.MAX_SIZE_TEST 0", "INPUT.MAX_SIZE_TEST 0 is too small"),
        ("INPUT.MIN_SIZE_TEST -1", "INPUT.MIN_SIZE_TEST -1 is too small: give 0 or more"),
        ("INPUT.RANDOM_FLIP yes", "INPUT.RANDOM_FLIP 'yes' is not supported; give horizontal, vertical, none"),
        ("INPUT.CROP.SIZE [1.5,1]", r"INPUT.CROP.SIZE \[1.5, 1\] does not fit CROP.TYPE relative"),
        ("INPUT.LSJ.SCALE [2.0,0.1]", r"INPUT.LSJ.SCALE \[2.0, 0.1\] is not a range"),
        ("SOLVER.BASE_LR -1", "SOLVER.BASE_LR -1.0 is too small"),
    ],
)
def test_values_that_detectron2_would_fail_on_are_refused(overrides: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("configs/demo/streets.yaml", overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "MODEL.ANCHOR_GENERATOR.SIZES [[32,64]]",
        "MODEL.ANCHOR_GENERATOR.SIZES [32,64]",
        "MODEL.ANCHOR_GENERATOR.SIZES [[32,64],[64]] MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[1],[1,2]]",
        "MODEL.RPN.IN_FEATURES ['p2'] MODEL.ANCHOR_GENERATOR.SIZES [[32]]",
        "MODEL.ROI_HEADS.IN_FEATURES ['p3']",
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlign MODEL.PYRAMID.NORM GN MODEL.RPN.BBOX_REG_LOSS_TYPE giou",
    ],
)
def test_values_that_are_accepted_build_a_detector(overrides: str) -> None:
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", "MODEL.PYRAMID.OUT_CHANNELS", "32"]
    build_detector(load_config("configs/demo/streets.yaml", [*overrides.split(), *more]))


def test_what_detectron2_refuses_while_building_is_one_sentence() -> None:
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.NUM_FC", "0"]
    cfg = load_config("configs/demo/streets.yaml", more)
    with pytest.raises(UserError, match=r"cannot build this detector \(AssertionError: assert .*\): correct the keys"):
        build_detector(cfg)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "build_resnet_backbone",
            r"IN_FEATURES names \['p2', 'p3'\], but build_resnet_backbone has the levels \['res4'\]",
        ),
        ("build_retinanet_resnet_fpn_backbone", r"cannot build MODEL.BACKBONE.NAME '.*' \(KeyError: 'res5'\)"),
        (
            "build_resnet_backbone MODEL.RELVIT.JOINT True",
            "JOINT trains an encoder, and .* has none: set build_encoder_",
        ),
    ],
)
def test_another_backbone_has_to_fit(overrides: str, words: str) -> None:
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME"]
    cfg = load_config("configs/demo/streets.yaml", [*more, *overrides.split()])
    with pytest.raises(UserError, match=words):
        build_detector(cfg)


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError])
def test_a_defect_while_building_is_not_put_on_the_config(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise kind("defect")

    monkeypatch.setattr(SimplePyramid, "__init__", fail)
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu"]
    with pytest.raises(kind, match="defect"):
        build_detector(load_config("configs/demo/streets.yaml", more))


# Values in other notations than the key's, and what they mean.
MEANT: dict[type, list[tuple[str, Any]]] = {
    int: [("7.0", 7), ("1e3", 1000), ("1_000", 1000)],
    float: [("0", 0.0), ("3", 3.0), ("5e-4", 5e-4)],
    bool: [("true", True), ("0", False), ("no", False), ("True", True)],
    str: [("20240101", "20240101"), ("1.50", "1.50"), ("010", "010"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01")],
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("as_file", [False, True], ids=["override", "file"])
def test_every_key_takes_another_notation_of_its_type(as_file: bool, number: int, task: str, tmp_path: Path) -> None:
    base = str(Path(f"configs/base/{BASES[task]}.yaml").resolve())
    fixed = {"TASK", "VERSION", "INPUT.CHANNELS", "TEST.AUG.ENABLED", "SOLVER.PRECISION", *TASKS[task].without_effect}
    given, meant = dict[str, str](), dict[str, Any]()
    for key, item in flat(read_config(base, [])).items():
        if type(item) in MEANT and key not in fixed:
            given[key], meant[key] = MEANT[type(item)][number % len(MEANT[type(item)])]
    if as_file:
        tree: dict[str, Any] = {"_BASE_": base}
        for key, text in given.items():
            *groups, name = key.split(".")
            functools.reduce(lambda node, part: node.setdefault(part, {}), groups, tree)[name] = text
        (tmp_path / "notations.yaml").write_text(flow(tree))
        cfg = read_config(str(tmp_path / "notations.yaml"), [])
    else:
        cfg = read_config(base, [part for pair in given.items() for part in pair])
    found = flat(cfg)
    assert {key: (found[key], type(found[key])) for key in meant} == {k: (v, type(v)) for k, v in meant.items()}


def flow(node: Any) -> str:
    """The yaml of nested dictionaries with the texts as they are."""
    return "{" + ", ".join(f"{k}: {flow(v)}" for k, v in node.items()) + "}" if isinstance(node, dict) else node


def test_lists_take_other_notations_too(tmp_path: Path) -> None:
    keys = {
        "MODEL.PYRAMID.STRIDES": ("[4.0, 8, 16.0, 32]", [4, 8, 16, 32]),
        "MODEL.ANCHOR_GENERATOR.SIZES": ("[[22.6, 32.0], [64]]", [[22.6, 32], [64]]),
        "INPUT.CROP.SIZE": ("[384, 600]", [384, 600]),
        "INPUT.MIN_SIZE_TRAIN": ("[384.0, 600]", (384, 600)),
        "MODEL.RPN.IN_FEATURES": ("(2, 'p3')", ["2", "p3"]),
        "DATASETS.TRAIN": ("['a', 'b']", ("a", "b")),
    }
    cfg = read_config("configs/base/detection.yaml", [part for key in keys for part in (key, keys[key][0])])
    assert {key: repr(get_key(cfg, key)) for key in keys} == {key: repr(meant) for key, (_, meant) in keys.items()}


def test_names_of_data_sets_are_as_they_are_written(tmp_path: Path) -> None:
    """In a file without a base, over another value, and as keys; SOLVER.STEPS stays a list of numbers all the same."""
    names = "{TRAIN: [2024, no, 010], TEST: [1.50], CUSTOM: {2024: {ROOT: a}, no: {ROOT: b}, 010: {ROOT: c}}}"
    (tmp_path / "base.yaml").write_text("SOLVER: {STEPS: []}\nDATASETS: {TRAIN: [a]}\n")
    for base in ("", "_BASE_: base.yaml\n"):
        (tmp_path / "own.yaml").write_text(f"{base}DATASETS: {names}\nSOLVER: {{STEPS: [1, 2]}}\n")
        cfg = load_config(str(tmp_path / "own.yaml"), [], "detection")
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.SOLVER.STEPS) == (("2024", "no", "010"), ("1.50",), (1, 2))
        assert cfg.DATASETS.CUSTOM == {"2024": {"ROOT": "a"}, "no": {"ROOT": "b"}, "010": {"ROOT": "c"}}
    for overrides in (["DATASETS.CUSTOM", "{2024: {ROOT: a}}"], ["DATASETS.CUSTOM.2024.ROOT", "a"]):
        assert load_config("configs/base/detection.yaml", overrides).DATASETS.CUSTOM == {"2024": {"ROOT": "a"}}


def test_an_own_set_takes_texts_as_they_are_written(tmp_path: Path) -> None:
    text = "{ROOT: 2024, SPLIT: train, CLASSES: [no, 010, 1.50]}"
    (tmp_path / "own.yaml").write_text(f"DATASETS: {{CUSTOM: {{cells: {text}}}}}\n")
    meant = {"ROOT": "2024", "SPLIT": "train", "CLASSES": ["no", "010", "1.50"]}
    assert load_config(str(tmp_path / "own.yaml"), [], "detection").DATASETS.CUSTOM.cells == meant
    base = "configs/base/detection.yaml"
    assert load_config(base, ["DATASETS.CUSTOM", f"{{cells: {text}}}"]).DATASETS.CUSTOM.cells == meant
    assert {"cells": meant | {"ROOT": "2025"}} == load_config(
        base, ["DATASETS.CUSTOM.cells", text, "DATASETS.CUSTOM.cells.ROOT", "2025"]
    ).DATASETS.CUSTOM


def test_an_absent_file_is_named() -> None:
    with pytest.raises(UserError, match=r"'configs/voc_vit_x.yaml' does not exist"):
        load_config("configs/voc_vit_x.yaml", [])
