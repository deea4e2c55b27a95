"""One training run as plain data, importable without torch."""

from dataclasses import dataclass

Overrides = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Step:
    """One run of a training command.

    Attributes:
        name: folder name below the folder of the seed; two steps with the same name are the same run.
        config: config file.
        encoder: name of the earlier step whose ``encoder.safetensors`` is loaded; empty: training from scratch.
        weights: ``MODEL.WEIGHTS`` if there is no ``encoder``.
        evaluates: name of the earlier step whose ``model_best.pth`` is evaluated instead of training; empty: training.
        labels: share of the training images to use, 0..1, counted from the first image.
        overrides: config keys and their values.
    """

    name: str
    config: str
    encoder: str = ""
    labels: float = 1.0
    overrides: Overrides = ()
    weights: str = ""
    evaluates: str = ""
