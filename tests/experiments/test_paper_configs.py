"""The configs of the paper's rows: header, figures, schedule, transforms, chance levels."""

import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest

from relvit_d2.config.config_file import COMMANDS, flat
from relvit_d2.detection.backbone import SimplePyramid, build_encoder_pyramid_backbone
from relvit_d2.experiments.table_rows import tables
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.config_keys import get_key
from tests.support.printed_tables import GAIN_SLIPS, paper_name, printed

TABLES = tables()
CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml") if path.parent.name != "base")
ROWS = [path for path in CONFIGS if "demo/" not in path and Path(path).stem != "custom"]


def header(path: str) -> str:
    """The comment at the top of a config as one line."""
    lines = Path(path).read_text().split("\n")
    return " ".join(line[1:].strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def test_every_config_of_a_paper_row_carries_its_figures() -> None:
    """Figures of the arms, from the second list, and remarks; a pre-training has the figures of ``upstream``."""
    figures, walked = printed(), set()
    for table, rows in TABLES.items():
        for name, row in rows.items():
            for arm in row.arms if row.paper else ():
                for path in {step.config for step in arm.steps}:
                    walked.add(path)
                    text, row_name = header(path), paper_name(name)
                    for which in ("supervised", arm.name if "/ssl/" not in path else "upstream"):
                        cells = figures.get((table, row_name, which), {}).values()
                        spreads = [f"{mean} ± {spread}".removesuffix(" ± -") for mean, spread in cells]
                        assert " / ".join(spreads) in text, (path, which)
                    if (table, row_name, arm.name) == ("table2", "vit_s", "joint"):
                        assert "misprint" in text
                    if row_name in GAIN_SLIPS and arm.name == "upstream":
                        assert all(gain in text for gain in GAIN_SLIPS[row_name])
    assert walked == set(ROWS)


def test_no_two_configs_differ_only_in_weights_and_output_folder() -> None:
    keys = {path: {k: repr(v) for k, v in flat(load_config(path, [])).items()} for path in CONFIGS}
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for path, values in keys.items():
        rest = tuple(sorted((k, v) for k, v in values.items() if k not in ("MODEL.WEIGHTS", "OUTPUT_DIR")))
        assert seen.setdefault(rest, path) == path
    assert len({values["OUTPUT_DIR"] for values in keys.values()}) == len(CONFIGS)


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
    text = Path(path).read_text()
    assert re.search("^# Paper: Table [123]", text, re.MULTILINE) and re.search(r"^# Cost: .+", text, re.MULTILINE)
    commands = re.findall(r"relvit-d2 (\w+) --config-file (\S+)", text)
    assert path in [file for _, file in commands]
    assert [command for command, _ in commands] == [COMMANDS[load_config(file, []).TASK] for _, file in commands]
    for table, name, arm in re.findall(r"relvit-d2 reproduce (\w+) --row (\w+)(?: --arm (\w+))?", text):
        arms = {one.name: [step.config for step in one.steps] for one in TABLES[table][name].arms}
        assert path in arms[arm or "supervised"]
    if "/ssl/" not in path:
        (before,) = [load_config(file, []).OUTPUT_DIR for command, file in commands if command == "pretrain"]
        assert f"{before}/encoder.safetensors" == load_config(path, []).MODEL.WEIGHTS


def test_a_header_gives_the_overrides_of_the_other_arms() -> None:
    """The keys after "add" are those of an arm of a row, and load."""
    found = [
        (path, shlex.split(words))
        for path in ROWS
        for words in re.findall(r": add ((?:[A-Z][A-Z_.]+ \S+?[. ]+)+)", header(path))
    ]
    assert len(found) > 10
    steps = [step for rows in TABLES.values() for row in rows.values() for step in row.steps()]
    arms = [(step.config, {key: str(value) for key, value in step.overrides}) for step in steps]
    for path, words in found:
        words = [word.rstrip(".") for word in words]
        load_config(path, words)
        keys = dict(zip(words[::2], words[1::2], strict=True))
        assert (path, {k: v for k, v in keys.items() if k not in ("MODEL.WEIGHTS", "OUTPUT_DIR")}) in arms


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
    view = load_config(f"configs/cls/{row}.yaml", []).INPUT.VIEW
    assert (view.SIZE, view.CROP, view.PAD if crop == "pad" else view.SCALE, view.FLIP) == (side, crop, extent, 0.5)


def test_every_row_of_table_1_has_the_authors_transforms() -> None:
    assert {Path(path).stem for path in ROWS if "/cls/" in path} == {*TRANSFORMS}


@pytest.mark.parametrize("path", CONFIGS)
def test_digits_are_not_mirrored_and_anchors_fit_the_levels(path: str) -> None:
    cfg = load_config(path, [])
    # Rows of Table 1 mirror digits as the authors do.
    data = "".join(cfg.DATASETS.TRAIN)
    if data.startswith(("svhn_", "streets")) and "svhn_digits" not in data:
        flip = {"pretrain": "PRETEXT.FLIP", "detection": "INPUT.RANDOM_FLIP", "classification": "INPUT.VIEW.FLIP"}
        assert get_key(cfg, flip[cfg.TASK]) in (0, "none")
    if "ssl" not in path and "/cls/" not in path:
        assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(cfg.MODEL.RPN.IN_FEATURES)


@pytest.mark.parametrize("path", [path for path in ROWS if "ssl/" not in path and "cls/" not in path])
def test_a_header_names_the_pyramid_and_why(path: str) -> None:
    """The pyramid that the config builds, and beside the paper's FPN the key that is nearer to it."""
    cfg, text = load_config(path, []), header(path)
    pyramid = built_pyramid(cfg.MODEL.ENCODER.NAME, cfg.MODEL.ENCODER.PATCH_SIZE, cfg.MODEL.PYRAMID.NAME)
    assert f"Pyramid: {'simple' if pyramid is SimplePyramid else 'FPN'}" in text and 'paper writes "FPN"' in text
    assert ("MODEL.PYRAMID.NAME multitap" in text) == (pyramid is SimplePyramid)


@pytest.mark.parametrize("path", ROWS)
def test_a_header_states_how_the_authors_data_and_choice_of_the_model_differ(path: str) -> None:
    text, stem = header(path), Path(path).stem
    assert ("minival that later became val2017 (from memory)" in text) == stem.startswith("coco_")
    assert ("Kaggle set ambityga/imagenet100" in text) == stem.startswith("imagenet100_")
    assert ("the lowest validation loss" in text) == ("/ssl/" in path)
    if "/cls/" in path:
        assert "The authors" in text and "TEST.BEST_ON_TEST True" in text


@functools.cache
def built_pyramid(encoder: str, patch: int, pyramid: str) -> type:
    keys = ["MODEL.ENCODER.NAME", encoder, "MODEL.ENCODER.PATCH_SIZE", str(patch), "MODEL.PYRAMID.NAME", pyramid]
    return type(build_encoder_pyramid_backbone(load_config("configs/base/detection.yaml", keys), None))


@pytest.mark.parametrize("path", [path for path in ROWS if "/ssl/" in path])
def test_the_stated_chance_is_that_of_the_model(path: str) -> None:
    """Of the config as it is, then on mega-patches, of the detection data sets."""
    text = header(path)
    mega = re.findall(r"Mega-patches: add ((?:PRETEXT\S+ \w+ ?)+)", text.replace(",", ""))
    stated = re.findall(r"on an? (\d+) x (\d+) grid: relation ([\d.]+) %, position ([\d.]+) %", text)
    assert len(stated) == 1 + len(mega) == 1 + (not re.search(r"vit_s\d", path))
    for keys, (rows, cols, relation, position) in zip(["", *mega], stated, strict=True):
        task = build_pretraining_model(load_config(path, [*keys.split(), "MODEL.DEVICE", "cpu"])).task
        assert task.grid == (int(rows), int(cols))
        expected = {"relation": float(relation) / 100, "position": float(position) / 100}
        assert {name: one.chance(task.grid) for name, one in task.named_tasks()} == pytest.approx(expected, abs=6e-4)
