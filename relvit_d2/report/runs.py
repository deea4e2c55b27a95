"""The files of a run in its OUTPUT_DIR."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from relvit_d2.config.config_file import flat
from relvit_d2.evaluation.average_precision import COCO_LIMIT
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import parse_row

# Keys in which runs of one arm may differ: paths, seed, hardware.
_NOT_THE_ARM = (
    *("SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "VERSION"),
    *("CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "DATASETS.HASH_CONTENTS"),
    *("DATALOADER.CACHE", "DATALOADER.CACHE_LIMIT_GB"),
)


@dataclass
class Run:
    """One run.

    Attributes:
        folder: its OUTPUT_DIR.
        name: the shortest trailing part of the folder's path that no other run has.
        config: key -> value of ``config.yaml``, keys such as ``SOLVER.MAX_ITER``.
        info: ``run.json``: script, command, versions and hardware; empty where the file is missing.
        rows: the lines of ``metrics.json``, the last one of each iteration.
        results: ``inference/results.json``: data set -> task -> metric -> value; empty where the file is missing.
        training: ``inference/training_images/results.json``: the number of evaluated training ``images``, and their
            results by task; empty where the file is missing.
        shared: ``inference/shared_images.json``: data set -> test images that are in the training set too.
        detection_limit: maximum detections per image of the AP in ``results``.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    info: dict[str, Any]
    rows: list[dict[str, Any]]
    results: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, list[str]] = field(default_factory=dict)
    detection_limit: int = COCO_LIMIT

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the iterations with a finite value of a scalar, and the values, both ``(n,)``."""
        points = [(row["iteration"], row[key]) for row in self.rows if row.get(key) is not None]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        table = table[np.isfinite(table[:, 1])]
        return table[:, 0], table[:, 1]

    @cached_property
    def scalars(self) -> list[str]:
        """Sorted names of all scalars."""
        return sorted({key for row in self.rows for key in row} - {"iteration"})

    @property
    def detects(self) -> bool:
        """Whether a detector was trained or evaluated."""
        return self.config.get("TASK") == "detection"

    @property
    def pretrains(self) -> bool:
        """Whether an encoder was pre-trained."""
        return self.config.get("TASK") == "pretrain"

    @property
    def arm(self) -> str:
        """The config without the seed as text; of the initial weights only the name of the file."""
        kept = {key: value for key, value in self.config.items() if key not in _NOT_THE_ARM}
        return json.dumps(kept | {"weights": Path(self.config.get("MODEL.WEIGHTS") or "").name}, default=str)


def read_runs(folders: list[Path]) -> list[Run]:
    """Read runs, in the order given.

    Raises:
        UserError: if a folder is not that of a run, is damaged, or is given twice.
    """
    names = _names(folders)
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"'{folder}' is not the folder of a run: it has no config.yaml; give the OUTPUT_DIR of a run")
    try:
        config = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        info = _json(folder / "run.json")
        training, shared = (
            _json(folder / "inference" / name) for name in ("training_images/results.json", "shared_images.json")
        )
        results = {k: v for k, v in _json(folder / "inference" / "results.json").items() if isinstance(v, dict)}
        # --eval-only does not change config.yaml, but may use another limit.
        evaluation = _json(folder / "inference" / "evaluation.json")
        limit = int(evaluation.get("detections_per_image", config.get("TEST.DETECTIONS_PER_IMAGE", COCO_LIMIT)))
        rows: dict[int, dict[str, Any]] = {}
        metrics = folder / "metrics.json"
        for number, line in enumerate(metrics.read_bytes().splitlines() if metrics.is_file() else (), 1):
            if (row := parse_row(line)) is None:
                raise ValueError(f"line {number} of metrics.json")
            rows[row.iteration] = {**row.scalars, "iteration": row.iteration}
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"the files of the run '{folder}' are damaged ({error}): give another run") from error
    return Run(folder, name, config, info, [rows[i] for i in sorted(rows)], results, training, shared, limit)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _names(folders: list[Path]) -> list[str]:
    """Return the shortest trailing parts of the paths that are all different."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("a run is given twice; give each once")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
