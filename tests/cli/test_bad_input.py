"""Invalid input from the command line: one sentence with file, key or class and the correction, status 1, no traceback.

``CASES`` is the table: input, scripts, and part of the message.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.custom_data import write_coco, write_yolo
from tests.support.damaged_files import huge_png
from tests.support.scripts import command, digests, fails, run

SSL, DETECT = "pretrain_ssl.py", "train_net.py"
VOC = ("DATASETS.TRAIN", "('voc_2007_train',)", "DATASETS.TEST", "()")
OBJECT = (
    "<object><name>{name}</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>"
)
SIZE = "<size><width>64</width><height>48</height><depth>3</depth></size>"


def write_voc(root: Path, size: str = SIZE, name: str = "dog") -> Path:
    """Write VOC 2007 with the images a, b, c, d; size and name are those of b. Return the folder of images."""
    folder = root / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\nc\nd\n")
    for stem in "abcd":
        Image.effect_noise((64, 48), 60).convert("RGB").save(folder / f"JPEGImages/{stem}.jpg")
        values = (size, name) if stem == "b" else (SIZE, "dog")
        xml = f"<annotation>{values[0]}{OBJECT.format(name=values[1])}</annotation>"
        (folder / f"Annotations/{stem}.xml").write_text(xml)
    return folder / "JPEGImages"


def cut(root: Path) -> None:
    image = write_voc(root) / "b.jpg"
    image.write_bytes(image.read_bytes()[:500])


def empty(root: Path) -> None:
    for image in write_voc(root).iterdir():
        image.write_bytes(b"")


def huge(root: Path) -> None:
    (write_voc(root) / "b.jpg").write_bytes(huge_png())


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        message: part of the error message.
        more: overrides; ``{here}`` is a temporary folder.
        scripts: the scripts to run.
        flags: arguments before the overrides.
        make: fills the data root; None: the default one.
        files: text files to write into ``{here}``.
    """

    message: str
    more: tuple[object, ...] = ()
    scripts: tuple[str, ...] = (DETECT,)
    flags: tuple[object, ...] = ()
    make: Callable[[Path], object] | None = None
    files: dict[str, str] = field(default_factory=dict)


BOTH = (SSL, DETECT)
STRICT = (*VOC, "DATASETS.SKIP_UNREADABLE", "False")
CASES = {
    "misspelt key": Case("did you mean 'SOLVER.MAX_ITER'", ("SOLVER.MAX_ITTER", 3)),
    "wrong type": Case("SOLVER.MAX_ITER takes a value of type int", ("SOLVER.MAX_ITER", "soon")),
    "key twice in a file": Case(
        "bad.yaml' has the key 'MAX_ITER' twice, the second time in line 4",
        flags=("--config-file", "{here}/bad.yaml"),
        files={"bad.yaml": "VERSION: 2\nSOLVER:\n  MAX_ITER: 3\n  MAX_ITER: 4\n"},
    ),
    "key twice in a base": Case(
        "base.yaml' has the key 'SEED' twice",
        scripts=(SSL,),
        flags=("--config-file", "{here}/bad.yaml"),
        files={"bad.yaml": "_BASE_: base.yaml\n", "base.yaml": "SEED: 3\nSEED: 4\n"},
    ),
    "base that builds on itself": Case(
        "is its own base",
        flags=("--config-file", "{here}/bad.yaml"),
        files={"bad.yaml": "_BASE_: other.yaml\n", "other.yaml": "_BASE_: bad.yaml\n"},
    ),
    "base that leads out": Case(
        "_BASE_ '../../other.yaml' leads out of its folder",
        flags=("--config-file", "{here}/bad.yaml"),
        files={"bad.yaml": "_BASE_: ../../other.yaml\n"},
    ),
    "base that is a URL": Case(
        "_BASE_ 'http://127.0.0.1:9/a.yaml' is not the path of a yaml file",
        flags=("--config-file", "{here}/bad.yaml"),
        files={"bad.yaml": "_BASE_: http://127.0.0.1:9/a.yaml\n"},
    ),
    "tag of Python": Case(
        "bad.yaml' is not valid yaml: could not determine a constructor for the tag",
        flags=("--config-file", "{here}/bad.yaml"),
        files={"bad.yaml": "OUTPUT_DIR: !!python/object/apply:os.mkdir [made]\n"},
    ),
    "empty file": Case("has no keys", flags=("--config-file", "{here}/bad.yaml"), files={"bad.yaml": ""}),
    "config of the other script": Case(
        "is of the task pretrain, not detection: start relvit-d2 pretrain with it",
        flags=("--config-file", "configs/ssl/voc_vit_s.yaml"),
    ),
    "config of the detector": Case(
        "is of the task detection, not pretrain: start relvit-d2 train with it",
        scripts=(SSL,),
        flags=("--config-file", "configs/voc_vit_s.yaml"),
    ),
    "key of the other script": Case(
        "key PRETEXT.FLIP belongs to the task pretrain (relvit-d2 pretrain), not to detection", ("PRETEXT.FLIP", 0.5)
    ),
    "key without effect": Case("SOLVER.MOMENTUM has no effect here", ("SOLVER.MOMENTUM", 0.5)),
    "mixed precision in float32": Case("set SOLVER.PRECISION auto", ("SOLVER.AMP.ENABLED", "True")),
    "batch of nothing": Case("give 1 or more", ("SOLVER.IMS_PER_BATCH", 0)),
    "batch below the processes": Case(
        "SOLVER.IMS_PER_BATCH 1 is not a multiple of 2 processes", ("SOLVER.IMS_PER_BATCH", 1), flags=("--num-gpus", 2)
    ),
    "batch that parts do not divide": Case(
        "not a multiple of 1 processes times SOLVER.GRAD_ACCUM_STEPS 3", ("SOLVER.GRAD_ACCUM_STEPS", 3)
    ),
    "parts of nothing": Case("SOLVER.GRAD_ACCUM_STEPS 0 is too small: give 1 or more", ("SOLVER.GRAD_ACCUM_STEPS", 0)),
    "seed below nothing": Case("SEED -1 is too small: give 0 or more", ("SEED", -1), (SSL,)),
    "reference below nothing": Case("SOLVER.REFERENCE_BATCH -4 is too small", ("SOLVER.REFERENCE_BATCH", -4), (SSL,)),
    "less than no checkpoints": Case(
        "SOLVER.CHECKPOINT_MAX_TO_KEEP -1 is too small", ("SOLVER.CHECKPOINT_MAX_TO_KEEP", -1), (SSL,)
    ),
    "patience below nothing": Case("TEST.PATIENCE -1 is too small", ("TEST.PATIENCE", -1), (SSL,)),
    "less than no workers": Case("DATALOADER.NUM_WORKERS -2 is too small", ("DATALOADER.NUM_WORKERS", -2), (SSL,)),
    "patience without a metric": Case("needs TEST.BEST_METRIC", ("TEST.PATIENCE", 2, "TEST.EVAL_PERIOD", 1)),
    "metric that is none": Case(
        "did you mean 'bbox/AP50'", ("TEST.BEST_METRIC", "box/AP50", "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 2)
    ),
    "gpu that is not there": Case("MODEL.DEVICE cpu", ("MODEL.DEVICE", "cuda")),
    "output is a file": Case("choose another folder", ("OUTPUT_DIR", "{here}/file"), files={"file": "text"}),
    "output is empty": Case("OUTPUT_DIR is empty: give a folder", ("OUTPUT_DIR", ""), BOTH),
    "output cannot be made": Case("choose another folder", ("OUTPUT_DIR", "/proc/relvit")),
    "unknown data set": Case("did you mean 'svhn_train'", ("DATASETS.TRAIN", "('svhn_trian',)"), BOTH),
    "no training set": Case("DATASETS.TRAIN is empty", ("DATASETS.TRAIN", "()")),
    "data root is absent": Case("make demo", VOC, make=lambda root: root.rmdir()),
    "data root is empty": Case("PASCAL VOC 2007 is missing", VOC, (SSL,), make=lambda root: None),
    "folder without images": Case(
        "contains no image", ("DATASETS.TRAIN", "('{here}/',)"), (SSL,), files={"notes.txt": "no image"}
    ),
    "image is absent": Case(
        "b.jpg is missing but listed in", VOC, make=lambda root: (write_voc(root) / "b.jpg").unlink()
    ),
    "image is cut short": Case("b.jpg' is damaged or truncated", STRICT, BOTH, make=cut),
    "image is cut short, with workers": Case(
        "b.jpg' is damaged or truncated", (*STRICT, "DATALOADER.NUM_WORKERS", 2), make=cut
    ),
    "image of 100,000 x 100,000": Case("b.jpg' has too many pixels", STRICT, BOTH, make=huge),
    "no readable image": Case("none of the 4 images can be read: '", VOC, BOTH, make=empty),
    "channels without statistics": Case(
        "MODEL.PIXEL_MEAN has 3 values, but images have 1 channels", ("INPUT.CHANNELS", 1)
    ),
    "own folder is absent": Case("'no/folder' does not exist", flags=("--data", "no/folder")),
    "own folder without labels": Case(
        "contains no labels that can be read", flags=("--data", "{here}"), files={"notes.txt": "nothing"}
    ),
    "labels without images": Case(
        "it contains no images either: put them beside",
        flags=("--data", "{here}"),
        files={"a.txt": "0 0.5 0.5 0.4 0.4"},
    ),
    "own set with an unknown key": Case(
        "DATASETS.CUSTOM.cells has the unknown key 'ROOOT': use ROOT, FORMAT, SPLIT, CLASSES, JSON, IMAGES; did",
        ("DATASETS.CUSTOM", "{{'cells': {{'ROOOT': 'somewhere'}}}}"),
    ),
    "annotation without a size": Case("b.xml has no <size/width>", VOC, make=lambda root: write_voc(root, size="")),
    "annotation of an unknown class": Case(
        "b.xml, object 1 has the class 'dgo'", VOC, make=lambda root: write_voc(root, name="dgo")
    ),
    "class count": Case("NUM_CLASSES 7 contradicts data set 'svhn_train'", ("MODEL.ROI_HEADS.NUM_CLASSES", 7)),
    "weights are absent": Case("no/encoder.safetensors' does not exist", ("MODEL.WEIGHTS", "no/encoder.safetensors")),
    "weights are a folder": Case("holds no checkpoint", ("MODEL.WEIGHTS", "{here}")),
    "weights are text": Case(
        "not a readable safetensors file",
        ("MODEL.WEIGHTS", "{here}/a.safetensors"),
        (SSL,),
        files={"a.safetensors": "a"},
    ),
    "checkpoint is text": Case(
        "not a readable checkpoint", ("MODEL.WEIGHTS", "{here}/a.pth"), files={"a.pth": "no weights"}
    ),
    "weights at a URL that cannot be reached": Case(
        "'http://127.0.0.1:9/encoder.safetensors' could not be downloaded",
        ("MODEL.WEIGHTS", "http://127.0.0.1:9/encoder.safetensors"),
        BOTH,
    ),
    "anchors for another number of levels": Case(
        "SIZES has 3 lists, but MODEL.RPN.IN_FEATURES has 2 levels", ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16],[32]]")
    ),
    "keys that Detectron2 refuses": Case("Detectron2 cannot build this detector", ("MODEL.ROI_BOX_HEAD.NUM_FC", 0)),
    "weights are a pickle": Case(
        "can run arbitrary code: if you trust the source, set MODEL.ALLOW_PICKLE True",
        ("MODEL.WEIGHTS", "{here}/a.pkl"),
        files={"a.pkl": "anything"},
    ),
    "weights of another encoder": Case(
        "MODEL.ENCODER.NAME vit_nano", ("MODEL.WEIGHTS", "{encoder}", "MODEL.ENCODER.NAME", "vit_tiny")
    ),
    "pixels of another scale": Case("INPUT.FORMAT RGB, not BGR", ("MODEL.WEIGHTS", "{encoder}", "INPUT.FORMAT", "BGR")),
    "detector of another size": Case("fits only", ("MODEL.WEIGHTS", "{detector}", "MODEL.PYRAMID.OUT_CHANNELS", 32)),
}
# Messages of the same code as those of other rows.
LIKE_OTHERS = {
    "base that leads out",
    "base that is a URL",
    "tag of Python",
    "key twice in a base",
    "config of the detector",
    "key of the other script",
    "batch of nothing",
    "parts of nothing",
    "seed below nothing",
    "reference below nothing",
    "less than no checkpoints",
    "patience below nothing",
    "output cannot be made",
    "folder without images",
    "image is cut short",
    "annotation of an unknown class",
    "own folder is absent",
    "weights are text",
}
ROWS = [
    pytest.param(name, script, marks=[pytest.mark.slow] if name in LIKE_OTHERS else [])
    for name, case in CASES.items()
    for script in case.scripts
]


@pytest.fixture(scope="module")
def encoder(root: Path) -> Path:
    run(root, *command(SSL, root / "ssl", "SOLVER.MAX_ITER", 1))
    return root / "ssl/encoder.safetensors"


@pytest.fixture(scope="module")
def detector(root: Path) -> Path:
    run(root, *command(DETECT, root / "detector", "SOLVER.MAX_ITER", 1))
    return root / "detector/model_final.pth"


@pytest.mark.parametrize(("name", "script"), ROWS)
def test_invalid_input_is_reported_in_one_sentence(
    name: str, script: str, root: Path, encoder: Path, detector: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    here, data = tmp_path / "here", tmp_path / "data"
    here.mkdir()
    for file, text in case.files.items():
        (here / file).write_text(text)
    if case.make:
        data.mkdir()
        case.make(data)
    names = {"here": here, "encoder": encoder, "detector": detector}
    more, flags = (
        [part.format(**names) if isinstance(part, str) else part for part in given] for given in (case.more, case.flags)
    )
    output = tmp_path / "out"
    sentence = fails(data if case.make else root, *command(script, output, *more, flags=tuple(flags)))
    assert case.message in sentence
    assert not [path for path in output.rglob("*") if path.suffix in (".part", ".safetensors")]
    assert not Path(".run.lock").exists()


def test_pretraining_skips_unreadable_images(tmp_path: Path) -> None:
    data = tmp_path / "data"
    images = write_voc(data)
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:1000])  # more than its header
    (images / "c.jpg").write_bytes(b"")
    done = run(data, *command(SSL, tmp_path / "out", *VOC, "SOLVER.MAX_ITER", 2))
    assert "1 of 4 images cannot be read and are left out: " in done.stdout
    assert f"{images}/c.jpg ('{images}/c.jpg' is not an image" in done.stdout
    assert "b.jpg' is damaged or truncated" in done.stdout
    assert "the next image replaces it (1 replaced so far in this process)" in done.stdout
    assert "3 training images" in done.stdout


@pytest.mark.parametrize("script", BOTH)
def test_missing_images_are_skipped_on_request(script: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (write_voc(data) / "b.jpg").unlink()
    skip = ("DATASETS.SKIP_MISSING", "True", "SOLVER.MAX_ITER", 1)
    done = run(data, *command(script, tmp_path / "out", *VOC, *skip))
    assert "1 of the 4 images listed in" in done.stdout
    assert "left out: b.jpg" in done.stdout
    assert script == SSL or "voc_2007_train (training): 3 images" in done.stdout
    assert "3 training images" in done.stdout


def test_pickles_are_loaded_on_request(root: Path, detector: Path, tmp_path: Path) -> None:
    model = torch.load(detector, weights_only=True)["model"]
    arrays = {name: value.numpy() for name, value in model.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    torch.save({"model": model, "best": np.float64(3)}, tmp_path / "b.pth")
    given = ("MODEL.ALLOW_PICKLE", "True", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.WEIGHTS")
    found = []
    for weights in (detector, tmp_path / "a.pkl", tmp_path / "b.pth"):
        run(root, *command(DETECT, tmp_path / "out", *given, weights, flags=("--eval-only",)))
        found.append(json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text()))
    assert found[0]
    assert found[0] == found[1] == found[2]
    assert "MODEL.ALLOW_PICKLE" in fails(root, *command(DETECT, tmp_path, "MODEL.WEIGHTS", tmp_path / "b.pth"))


STREETS = ("--config-file", "configs/demo/streets.yaml")


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (("overfit-check", "--config-file", "no.yaml"), "no.yaml' does not exist"),
        (("overfit-check", *STREETS, "--images", 0), "give at least 1"),
        (("overfit-check", *STREETS, "SOLVER.MAX_ITTER", 3), "did you mean 'SOLVER.MAX_ITER'"),
        (("overfit-check", "--config-file", "configs/ssl/voc_vit_s.yaml"), "is of the task pretrain"),
        (("overfit-check", *STREETS, "DATASETS.TRAIN", "('streets_trian',)"), "did you mean 'streets_train'"),
        (("compare-runs", "no", "no"), "'no' cannot be read"),
        (("analyze", *STREETS, "SOLVER.BASE_LRR", 1), "did you mean 'SOLVER.BASE_LR'"),
        (("analyze", *STREETS, "--batch", 0), "--batch 0: give at least 1"),
    ],
)
def test_other_commands_report_invalid_input_in_one_sentence(
    tool: tuple[object, ...], message: str, root: Path, tmp_path: Path
) -> None:
    assert message in fails(root, "relvit-d2", *tool)


def test_a_full_disk_keeps_the_last_checkpoint(root: Path, tmp_path: Path) -> None:
    run(root, *command(SSL, tmp_path, "SOLVER.MAX_ITER", 4))
    before = digests(tmp_path, "*.pth")
    more = command(SSL, tmp_path, "SOLVER.MAX_ITER", 8, flags=("--resume", "--allow-changes"))
    sentence = fails(root, *more, fault="full:1000000")
    assert "model_0000005.pth' could not be written" in sentence
    assert sentence.endswith("then continue with --resume")
    assert "the previous one is unchanged" in sentence or "an existing file is unchanged" in sentence
    assert before == digests(tmp_path, "*.pth")
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(tmp_path.rglob("*.part"))
    run(root, *more)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 7


ATTACK = "<script>\x1b[2J\x07\n"


def name_class_of_yolo(folder: Path) -> None:
    (folder / "data.yaml").write_text(f"names: {json.dumps([ATTACK, 'dog'])}\n")


def name_class_of_coco(folder: Path) -> None:
    shutil.rmtree(folder)
    write_coco(folder)
    file = folder / "annotations/train.json"
    file.write_text(file.read_text().replace('"dog"', json.dumps(ATTACK)))


def name_image(folder: Path) -> None:
    (folder / "images/train/a.png").rename(folder / f"images/train/{ATTACK}.png")


def name_unreadable_image(folder: Path) -> None:
    (folder / f"images/train/{ATTACK}.png").write_text("no image")


@pytest.mark.parametrize("name", ["cells", ATTACK])
@pytest.mark.parametrize("attack", [name_class_of_yolo, name_class_of_coco, name_image, name_unreadable_image])
def test_names_that_cannot_be_printed_are_refused(attack: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    folder = write_yolo(tmp_path / name)
    attack(folder)
    done = run(tmp_path, "relvit-d2", "check-data", folder, "--output", folder / "check", status=1)
    assert r"<script>\x1b[2J\x07" in done.stderr
    for text in (done.stdout, done.stderr):
        assert all(c.isprintable() or c in "\n\r" for c in text), text
