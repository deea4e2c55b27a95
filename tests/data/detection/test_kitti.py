"""KITTI's reader, splits and ignored regions."""

import hashlib
import json
import random
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.kitti import (
    CLASS_SETS,
    TYPES,
    kitti_ids,
    load_kitti,
    random_split,
    read_drives,
    sequence_split,
)
from relvit_d2.data.images.decode import read_rgb
from relvit_d2.evaluation.coco import CocoStyleEvaluator, coco_ground_truth
from relvit_d2.utils.errors import UserError
from tests.support.evaluation_cases import Found
from tests.support.evaluation_cases import run as evaluate
from tests.support.scripts import command, run

OFFICIAL = tuple(f"{index:06d}" for index in range(7481))
REST = "-1.57 {} 1.89 0.48 1.20 1.84 1.47 8.41 0.01"


def line(kind: str, box: str = "10 20 30 60", truncated: object = 0.0, occluded: object = 0) -> str:
    return f"{kind} {truncated} {occluded} {REST.format(box)}"


def write(folder: Path, *labels: str, size: tuple[int, int] = (120, 80)) -> Path:
    for name in ("image_2", "label_2"):
        (folder / name).mkdir(parents=True)
    for image_id, text in zip(OFFICIAL, labels, strict=False):
        Image.new("RGB", size).save(folder / "image_2" / f"{image_id}.png")
        (folder / "label_2" / f"{image_id}.txt").write_text(text)
    return folder


def test_the_samples(samples: Path) -> None:
    folder = samples / "kitti" / "training"
    ids = kitti_ids(folder)
    records = load_kitti(folder, ids, CLASS_SETS[8])
    assert ids == ("000000", "000001", "000002")
    assert [(r["width"], r["height"]) for r in records] == [(1224, 370), (1242, 375), (1242, 375)]
    objects = [[TYPES[a["category_id"]] for a in r["annotations"] if not a["iscrowd"]] for r in records]
    assert objects == [["Pedestrian"], ["Truck", "Car", "Cyclist"], ["Misc", "Car"]]
    cyclist = records[1]["annotations"][2]
    assert cyclist["bbox"] == [676.60, 163.95, 688.98, 193.93]
    assert (cyclist["truncated"], cyclist["occluded"]) == (0.0, 3)
    crowds = [a for a in records[1]["annotations"] if a["iscrowd"]]
    assert Counter(a["category_id"] for a in crowds) == dict.fromkeys(range(8), 4)
    assert {a["type"] for a in crowds} == {"DontCare"}


@pytest.mark.parametrize(
    ("count", "objects", "crowds"),
    [
        (8, list(TYPES), {"DontCare": list(TYPES)}),
        (7, list(TYPES[:-1]), {"DontCare": list(TYPES[:-1]), "Misc": list(TYPES[:-1])}),
        (
            3,
            ["Car", "Pedestrian", "Cyclist"],
            {
                "DontCare": ["Car", "Pedestrian", "Cyclist"],
                "Misc": ["Car", "Pedestrian", "Cyclist"],
                "Van": ["Car"],
                "Person_sitting": ["Pedestrian"],
            },
        ),
    ],
)
def test_types_in_each_class_set(tmp_path: Path, count: int, objects: list[str], crowds: dict[str, list[str]]) -> None:
    names = CLASS_SETS[count]
    write(tmp_path, "\n".join([line(kind) for kind in TYPES] + [line("DontCare", truncated=-1, occluded=-1)]) + "\n\n")
    (record,) = load_kitti(tmp_path, ["000000"], names)
    assert [a["type"] for a in record["annotations"] if not a["iscrowd"]] == objects
    assert all(names[a["category_id"]] == a["type"] for a in record["annotations"] if not a["iscrowd"])
    found: dict[str, list[str]] = {}
    for a in record["annotations"]:
        if a["iscrowd"]:
            found.setdefault(a["type"], []).append(names[a["category_id"]])
    assert found == crowds
    truth = coco_ground_truth([record], names, ignore_difficult=True)
    assert sum(a["iscrowd"] for a in truth["annotations"]) == sum(map(len, crowds.values()))


@pytest.mark.parametrize("count", CLASS_SETS)
def test_detections_in_ignored_regions_do_not_lower_coco_ap(samples: Path, tmp_path: Path, count: int) -> None:
    folder, names = samples / "kitti" / "training", CLASS_SETS[count]
    records = load_kitti(folder, kitti_ids(folder), names)
    perfect: Found = {}
    for record in records:
        objects = [(a["bbox"], a["category_id"], 0.5) for a in record["annotations"] if not a["iscrowd"]]
        crowds = [(a["bbox"], a["category_id"], 0.9) for a in record["annotations"] if a["iscrowd"]]
        perfect[record["image_id"]] = objects + crowds
    evaluator = CocoStyleEvaluator("kitti_sample", records, names, tmp_path, True)
    assert evaluate(evaluator, perfect)["bbox"]["AP"] == pytest.approx(100)
    elsewhere = {image_id: [*found, ([0.0, 0, 50, 50], 0, 0.95)] for image_id, found in perfect.items()}
    assert evaluate(evaluator, elsewhere)["bbox"]["AP-Car"] < 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Car 0 0 -1 1 2 3 4", "line 1 has 8 columns, not 15"),
        (line("Car") + "\n" + line("Auto"), "line 2 is of the type 'Auto'"),
        (line("Cart"), "did you mean 'Car'"),
        (line("Car", truncated="no"), "not a number"),
        (line("Car", box="1 2 nan 4"), "not finite"),
        (line("DontCare", box="1 2 inf 4"), "not finite"),
        (line("Car", occluded="0.5"), "occlusion level"),
        (line("Car", box="30 20 10 60"), r"line 1 \(Car\) has a box without area"),
        (line("Car", box="10 20 400 60"), "outside its image of 120 x 80"),
        ("\u00e9" + line("Car"), "cannot be read"),
    ],
)
def test_damaged_labels_are_errors(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, text)
    with pytest.raises(UserError, match=rf"000000\.txt.*{words}"):
        load_kitti(tmp_path, ["000000"], CLASS_SETS[7])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=120) | st.text("Car DontCare\n-10.5eEnaif", max_size=120).map(str.encode))
def test_any_label_is_read_or_a_user_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), "")
        Path(folder, "label_2", "000000.txt").write_bytes(content)
        try:
            load_kitti(Path(folder), ["000000"], CLASS_SETS[7])
        except UserError as error:
            assert "000000.txt" in str(error)


def test_ignored_regions_are_clipped_or_left_out(tmp_path: Path) -> None:
    write(
        tmp_path, "\n".join(line("DontCare", box, -1, -1) for box in ("-5 -5 20 20", "110 70 500 500", "200 1 300 9"))
    )
    (record,) = load_kitti(tmp_path, ["000000"], ["Car"])
    assert [a["bbox"] for a in record["annotations"]] == [[0, 0, 20, 20], [110, 70, 120, 80]]


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image_2 does not exist or contains no PNG"):
        kitti_ids(tmp_path)
    write(tmp_path, "")
    (tmp_path / "label_2" / "000000.txt").unlink()
    with pytest.raises(UserError, match=r"000000\.txt is missing"):
        load_kitti(tmp_path, ["000000"], CLASS_SETS[7])


def test_a_name_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "image_2" / "000000.png").rename(tmp_path / "image_2" / "\udcff.png")
    with pytest.raises(UserError, match="not a plain file name"):
        kitti_ids(tmp_path)


def test_palette_images_are_read(samples: Path) -> None:
    folder = samples / "kitti_extra" / "training"
    assert kitti_ids(folder) == ("000000", "000007", "000008")
    path = folder / "image_2" / "000007.png"
    with Image.open(path) as image:
        assert image.mode == "P"
        colours = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.array(image)]
    assert colours.std() > 20
    for pixels in (read_rgb(path), read_image(path, "RGB")):  # pre-training's, detection's
        assert np.array_equal(pixels, colours)


def test_split_of_the_official_images_is_the_published_one() -> None:
    split = random_split(OFFICIAL)
    assert tuple(sorted(split["train"] + split["val"])) == OFFICIAL
    assert (len(split["train"]), len(split["val"])) == (5611, 1870)
    # The published split is a text file with the ids of val, one per line.
    lines = "".join(f"{image_id}\n" for image_id in split["val"])
    published = "cb03592cb123028e84bd6a3afcc3ecd50e57c0b8a85b7b6e3d89cd0d9bff0ed0"
    assert hashlib.sha256(lines.encode()).hexdigest() == published
    # Neighbors in the file are not kept together.
    held = set(split["val"])
    together = sum(a in held and b in held for a, b in pairwise(OFFICIAL))
    assert 350 < together < 600  # 1870 / 4 = 467 are expected


@pytest.mark.parametrize("count", [2, 3, 4, 100, 7480])
def test_other_image_counts_are_split_by_the_same_rule(count: int, caplog: pytest.LogCaptureFixture) -> None:
    ids = tuple(sorted(random.Random(count).sample(OFFICIAL, count)))
    split = random_split(ids)
    assert tuple(sorted(split["train"] + split["val"])) == ids
    assert len(split["val"]) == max(1, round(count / 4))
    assert f"{count} KITTI images were found instead of the official 7481" in caplog.text


def mapping(folder: Path, lines: list[str], numbers: list[int]) -> Path:
    folder.mkdir(parents=True)
    (folder / "train_mapping.txt").write_text("".join(f"{text}\n" for text in lines))
    (folder / "train_rand.txt").write_text(",".join(map(str, numbers)))
    return folder


def test_mapping_is_read_as_documented_in_the_development_kit(tmp_path: Path) -> None:
    """Image 0 is of drive 106: its number, 7282, is the line, counted from 1 (readme.txt)."""
    lines = [f"2011_09_26 2011_09_26_drive_{index // 50:04d}_sync {index % 50:010d}" for index in range(7481)]
    lines[7281] = "2011_09_28 2011_09_28_drive_0106_sync 0000000048"
    numbers = [7282, *(index for index in range(1, 7482) if index != 7282)]
    drives = read_drives(mapping(tmp_path / "mapping", lines, numbers))
    assert len(drives) == 7481
    assert drives[:3] == ["2011_09_28_drive_0106_sync", *["2011_09_26_drive_0000_sync"] * 2]


@pytest.mark.parametrize("seed", range(4))
def test_no_drive_is_in_both_parts(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    lines = [f"2011_09_26 2011_09_26_drive_{rng.randrange(30) ** 2 // 20:04d}_sync {i:010d}" for i in range(600)]
    folder = mapping(tmp_path / "mapping", lines, rng.sample(range(1, 601), 600))
    drives = read_drives(folder)
    ids = OFFICIAL[:600]
    split = sequence_split(ids, folder)
    assert tuple(sorted(split["train"] + split["val"])) == ids
    sides = {name: {drives[int(image_id)] for image_id in split[name]} for name in split}
    assert not sides["train"] & sides["val"]
    assert 120 <= len(split["val"]) <= 150


def test_invalid_mapping(tmp_path: Path) -> None:
    line_of = "2011_09_26 2011_09_26_drive_0001_sync 0000000000"
    with pytest.raises(UserError, match=r"train_mapping\.txt is missing"):
        read_drives(tmp_path)
    with pytest.raises(UserError, match=r"train_rand\.txt has the entry '3'"):
        read_drives(mapping(tmp_path / "a", [line_of] * 2, [1, 3]))
    mapping(tmp_path / "e", [line_of], [])
    (tmp_path / "e" / "train_rand.txt").write_text("1" * 5000)
    with pytest.raises(UserError, match="has the entry '1111"):
        read_drives(tmp_path / "e")
    with pytest.raises(UserError, match=r"which is not the number of a line of train_mapping\.txt with a date"):
        read_drives(mapping(tmp_path / "b", ["2011"], [1]))
    with pytest.raises(UserError, match="has 1 images, not all those found"):
        sequence_split(["000000", "000001"], mapping(tmp_path / "c", [line_of], [1]))
    with pytest.raises(UserError, match=r"all KITTI images found are of the drive 2011_09_26_drive_0001_sync"):
        sequence_split(["000000", "000001"], mapping(tmp_path / "d", [line_of] * 2, [1, 2]))


def test_split_is_saved_in_the_run_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    write(data / "kitti" / "training", *[line("Car")] * 8)
    before = sorted(data.rglob("*"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    catalog.save_splits(["kitti_train[:2]", "kitti_val_3", "streets_train", str(tmp_path)], tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "cache" / "relvit_d2"):
        assert sorted(path.name for path in (folder / "splits").iterdir()) == ["kitti_train.txt", "kitti_val_3.txt"]
        kept = [(folder / "splits" / f"{name}.txt").read_text().split() for name in ("kitti_train", "kitti_val_3")]
        assert tuple(sorted(kept[0] + kept[1])) == OFFICIAL[:8]
        assert kept[1] == [r["image_id"] for r in catalog.get_records("kitti_val_3")]
    assert sorted(data.rglob("*")) == before
    # A cache that cannot be written is not an error.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    catalog.save_splits(["kitti_train"], tmp_path / "second")
    assert (tmp_path / "second" / "splits" / "kitti_train.txt").is_file()


def test_missing_mapping_error_contains_the_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "kitti" / "training", *[line("Car")] * 4)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    words = r"devkit_object\.zip.*train_mapping\.txt.*\$DETECTRON2_DATASETS/kitti/mapping or .*kitti/devkit/mapping"
    with pytest.raises(UserError, match=words):
        catalog.get_records("kitti_train_sequences")


def test_a_short_training_on_the_samples(samples: Path, tmp_path: Path) -> None:
    """Train from the command line on read-only data."""
    (tmp_path / "kitti").mkdir()
    (tmp_path / "kitti" / "training").symlink_to(samples / "kitti" / "training")
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", 224, "INPUT.MIN_SIZE_TEST", 64)
    names = ("DATASETS.TRAIN", "('kitti_train_3',)", "DATASETS.TEST", "('kitti_val_3',)")
    keys = (*sizes, "INPUT.MAX_SIZE_TEST", 224, *names, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2)
    done = run(tmp_path, *command("train_net.py", tmp_path / "run", *keys))
    results = json.loads((tmp_path / "run/inference/results.json").read_text())["kitti_val_3"]
    assert {"bbox", "kitti"} <= results.keys()
    assert "AP40_moderate-Pedestrian" in results["kitti"]
    # Logged once, although both splits are read and saved.
    assert (done.stdout + done.stderr).count("3 KITTI images were found") == 1
    assert len((tmp_path / "run/splits/kitti_train_3.txt").read_text().split()) == 2
