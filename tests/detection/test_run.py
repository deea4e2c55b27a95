"""What a training leaves beside its results."""

import json
from pathlib import Path

from PIL import Image

from relvit_d2.detection.evaluation import list_shared_images
from relvit_d2.tasks import load_config
from tests.support.custom_data import picture


def test_test_images_that_are_training_images_are_listed(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        picture(file, number)
    Image.open(files[0]).save(copy := tmp_path / "copy.bmp")  # the same pixels
    train, test = ([{"file_name": str(file)} for file in part] for part in (files[:2], [files[1], files[3], copy]))
    cfg = load_config("configs/custom.yaml", ["OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", "('mine',)"])
    list_shared_images(cfg, train, {"mine_val": test, "other": [train[0], *test[1:2]]})
    found = json.loads((tmp_path / "inference/shared_images.json").read_text())
    assert found == {"mine_val": [str(files[1]), str(copy)], "other": [str(files[0])]}
