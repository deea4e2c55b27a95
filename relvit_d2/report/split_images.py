"""The images of a split of the data set that a detector was trained on, or of another one."""

from pathlib import Path
from typing import Any

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import TRAINING_SPLITS, named_sets, open_folder, register_custom
from relvit_d2.data.subsets import subset
from relvit_d2.detection.config import DETECTION
from relvit_d2.engine.weights import run_config
from relvit_d2.utils.errors import UserError


def split_images(weights: str, config_file: str, opts: list[str], data: str | None, split: str) -> list[str]:
    """Return the images of a split of a data set.

    Args:
        weights, config_file, opts: see :func:`relvit_d2.detection.predictor.load_detector`.
        data: folder of a custom data set; None: that of the training, or its ``DATASETS.TRAIN`` and ``TEST``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        UserError: the data set does not have the split.
    """
    keys: Any = {}
    if not data:
        keys = run_config(weights, config_file, opts, DETECTION).DATASETS
        trained = keys.CUSTOM.get(subset(keys.TRAIN[0])[0], {}) if keys.TRAIN else {}
        data = trained.get("ROOT") if trained.get("SPLIT") else None
    if data:
        form, folder = open_folder(Path(data).expanduser())
        custom = named_sets(data, form, folder)
        wanted = TRAINING_SPLITS if split == "train" else (split,)
        names = tuple(name for name, entry in custom.items() if entry["SPLIT"] in wanted)[:1]
        if not names:
            splits = ", ".join(entry["SPLIT"] for entry in custom.values())
            raise UserError(f"'{data}' has no split {split}: give --split with one of {splits}")
        keys = {"TRAIN": names, "TEST": (), "CUSTOM": custom}
    else:
        names = tuple(keys.TRAIN if split == "train" else keys.TEST)
        if not names:
            raise UserError(f"the config of '{weights}' names no data set for the split {split}: give --data FOLDER")
    register_custom(keys, labels=False)
    return [str(image) for name in names for image in catalog.get_images(name)]
