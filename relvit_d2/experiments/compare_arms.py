"""The arms of a comparison as runs of the training commands."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import override_words
from relvit_d2.conversion.checkpoint_file import find_encoder
from relvit_d2.conversion.convert import convert
from relvit_d2.conversion.encoder_file import read_encoder, save_encoder
from relvit_d2.conversion.timm_hub import is_published
from relvit_d2.encoders import encoder_from_keys
from relvit_d2.engine.weights import load_verified
from relvit_d2.experiments.compare_data import ComparedData, labelled_subset
from relvit_d2.experiments.runs import Run, check_free_keys, plan_runs, scaled_schedule
from relvit_d2.experiments.steps import Overrides, Step
from relvit_d2.tasks import load_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.files import make_folder

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
CONTINUED = "+pretrained"
EVALUATIONS = 5  # on the validation set, if the config has no TEST.EVAL_PERIOD

# Keys that pre-training takes from the training.
_SHARED = (
    "MODEL.ENCODER.NAME",
    "MODEL.ENCODER.PATCH_SIZE",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.DEVICE",
    "SOLVER.PRECISION",
)
_SHARED_PIXELS = ("INPUT.CHANNELS", "INPUT.MAX_VALUE")  # which classification does not have
_SET_BY_DATA = dict.fromkeys(
    ("DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.VALIDATION", "DATASETS.CUSTOM"), "choose the data with --data"
) | {"MODEL.RELVIT.JOINT": "choose the arm joint"}
_SET_BY_ARM = {
    "DATASETS.TEST": "validation and test images are kept out of pre-training",
    "DATASETS.EXCLUDE": "validation and test images are kept out of pre-training",
    "DATASETS.CUSTOM": "choose the data with --data",
    "PRETEXT.MEGA.M": "choose the arm pretrained-mega",
} | dict.fromkeys(_SHARED[:2], "set it for the training, whose value the pre-training takes")


@dataclass(frozen=True)
class ComparedArm:
    """An arm of a comparison.

    Attributes:
        name: the value in ``--arms``.
        weights: initial weights, of the pre-training if there is one: ``timm:NAME`` or a file; empty: random.
        pretraining: name of the pre-training step; empty: none.
        joint: whether the pretext losses are added to the training.
        longer: whether the training is lengthened to the seconds of pre-training and training together.
    """

    name: str
    weights: str = ""
    pretraining: str = ""
    joint: bool = False
    longer: bool = False

    @property
    def kind(self) -> str:
        """The kind of its training iterations, ``train`` or ``joint``."""
        return "joint" if self.joint else "train"

    def step_name(self, share: float) -> str:
        """Return the name of the training step on ``share`` percent of the labels."""
        return f"{_folder_name(self.name)}_{share:g}"


_ARMS = {
    arm.name: arm
    for arm in (
        ComparedArm("scratch"),
        ComparedArm("scratch-longer", longer=True),
        ComparedArm("joint", joint=True),
        ComparedArm("pretrained", pretraining="pretrain"),
        ComparedArm("pretrained-mega", pretraining="pretrain_mega"),
    )
}


def read_arm(name: str) -> ComparedArm:
    """Return an arm by its name.

    Raises:
        UserError: the name is not a valid arm.
    """
    if name in _ARMS:
        return _ARMS[name]
    weights = name.removesuffix(CONTINUED)
    if not (is_published(weights) or weights.endswith(SUFFIXES)):
        raise UserError(
            f"--arms '{name}' is not a valid arm: give {', '.join(_ARMS)}, timm:NAME, a file ({', '.join(SUFFIXES)}), "
            f"or one of the last two with {CONTINUED}{nearest(name, list(_ARMS))}"
        )
    return ComparedArm(name, weights, f"pretrain_from_{_folder_name(weights)}" if weights != name else "")


def read_arms(names: Sequence[str]) -> tuple[ComparedArm, ...]:
    """Return arms by their names.

    Raises:
        UserError: a name is not a valid arm, or two arms would have the same folder.
    """
    arms: dict[str, ComparedArm] = {}
    for arm in map(read_arm, names):
        if other := arms.get(folder := _folder_name(arm.name)):
            raise UserError(f"--arms '{other.name}' and '{arm.name}' have the same folder '{folder}': rename one file")
        arms[folder] = arm
    return tuple(arms.values())


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w+.-]+", "_", name).strip("_.")


@dataclass(frozen=True)
class Comparison:
    """A comparison without its seeds and schedule.

    Attributes:
        data: the data sets.
        arms: the arms in the order of the tables; the first one is the baseline.
        shares: percentages of labelled images, ascending.
        config, opts: config file of the training, and alternating keys and values that override it.
        pretrain_config, pretrain_opts: the same of the pre-training.
        output: folder of all runs.
    """

    data: ComparedData
    arms: tuple[ComparedArm, ...]
    shares: tuple[float, ...]
    config: str
    opts: tuple[str, ...]
    pretrain_config: str
    pretrain_opts: tuple[str, ...]
    output: Path

    def training(self, share: float = 100, seed: int = 0, joint: bool = False) -> Overrides:
        """Return the overrides of a training on a labelled subset, without its schedule."""
        data = self.data
        pairs: dict[str, Any] = dict(zip(self.opts[::2], self.opts[1::2], strict=True))
        pairs["DATASETS.TRAIN"] = (labelled_subset(data.train, share, seed),)
        if data.task == "classification":
            pairs |= {"DATASETS.VALIDATION": data.validation, "DATASETS.TEST": (data.test,)}
        else:
            pairs["DATASETS.TEST"] = (data.validation or data.test,)
        if data.custom:
            pairs["DATASETS.CUSTOM"] = data.custom
        if joint:
            pairs["MODEL.RELVIT.JOINT"] = True
        return tuple(pairs.items())

    def pretraining(self, mega: bool) -> Overrides:
        """Return the overrides of a pre-training on all training images, without its schedule."""
        cfg, data = self.config_of(self.training()), self.data
        shared = _SHARED if data.task == "classification" else _SHARED + _SHARED_PIXELS
        pairs: dict[str, Any] = {"DATASETS.TRAIN": (data.train,)}
        pairs |= {key: get_key(cfg, key) for key in shared}
        pairs |= dict(zip(self.pretrain_opts[::2], self.pretrain_opts[1::2], strict=True))
        pairs["DATASETS.TEST"] = ()
        pairs["DATASETS.EXCLUDE"] = tuple(name for name in (data.validation, data.test) if name)
        if data.custom:
            pairs["DATASETS.CUSTOM"] = data.custom
        if mega:
            pairs["PRETEXT.MEGA.M"] = 10  # the paper's
        return tuple(pairs.items())

    def config_of(self, overrides: Overrides, pretraining: bool = False) -> CfgNode:
        """Return the config of a training or a pre-training."""
        file, task = (self.pretrain_config, "pretrain") if pretraining else (self.config, self.data.task)
        cfg = load_config(file, override_words(dict(overrides)), task)
        if cfg.SOLVER.EPOCHS:
            raise UserError(f"'{file}': a comparison counts iterations: set SOLVER.MAX_ITER in place of SOLVER.EPOCHS")
        return cfg

    def check_keys(self) -> None:
        """Refuse keys that the comparison sets, and a channel order that pre-training does not support.

        Raises:
            UserError: the overrides have such a key.
        """
        check_free_keys(self.opts[::2], _SET_BY_DATA)
        check_free_keys(self.pretrain_opts[::2], _SET_BY_ARM)
        order = self.config_of(self.training()).INPUT.get("FORMAT", "RGB")
        if order != "RGB" and any(arm.pretraining for arm in self.arms):
            raise UserError(f"INPUT.FORMAT {order} is not supported by pre-training: set INPUT.FORMAT RGB")

    def prepare_weights(self) -> dict[str, str]:
        """Check that the weights of each arm can be loaded, and return ``MODEL.WEIGHTS`` by arm.

        A file of another project is first converted into the folder ``weights`` of the output.

        Raises:
            UserError: weights are missing, do not contain an encoder or do not fit.
        """
        found = {}
        for arm in self.arms:
            if not arm.weights:
                continue
            found[arm.name] = weights = arm.weights if is_published(arm.weights) else self._encoder_file(arm.weights)
            cfg = self.config_of(self.training())
            load_verified(cfg, encoder_from_keys(cfg.MODEL), weights, "RGB")
            if arm.pretraining:
                cfg = self.config_of(self.pretraining(mega=False), pretraining=True)
                load_verified(cfg, encoder_from_keys(cfg.MODEL), weights, "RGB")
        return found

    def _encoder_file(self, weights: str) -> str:
        path = Path(weights).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"--arms '{weights}': the file does not exist; correct the path or remove the arm")
        if path.suffix == ".safetensors":
            try:
                read_encoder(path)
                return str(path)
            except UserError:
                pass  # a file of another project, or a damaged one, which the conversion reports
        converted = convert(find_encoder(path))
        target = self.output / "weights" / f"{_folder_name(weights)}.safetensors"
        make_folder(target.parent)
        save_encoder(converted.encoder, target, {"source": f"{converted.kind}: {path.name}", **converted.pixels})
        return str(target)

    def plan(self, seed: int, weights: dict[str, str], scale: float, longer: float) -> dict[str, Run]:
        """Return the runs of a seed by name, in the order of execution.

        Args:
            seed: seed of the labelled subset and of all training.
            weights: result of :meth:`prepare_weights`.
            scale: factor for every schedule.
            longer: further factor for ``scratch-longer``.
        """
        steps: list[Step] = []
        for share in self.shares:
            for arm in self.arms:
                start = weights.get(arm.name, "")
                if arm.pretraining:
                    steps.append(self._pretraining_step(arm, start, scale))
                steps += self._training_steps(arm, share, seed, start, scale * (longer if arm.longer else 1))
        return plan_runs(steps, seed, 1.0, self.output, [])

    def _pretraining_step(self, arm: ComparedArm, start: str, scale: float) -> Step:
        keys = self.pretraining(mega=arm.pretraining == "pretrain_mega")
        keys += tuple(scaled_schedule(self.config_of(keys, pretraining=True), scale).items())
        return Step(arm.pretraining, self.pretrain_config, overrides=keys, weights=start)

    def _training_steps(self, arm: ComparedArm, share: float, seed: int, start: str, scale: float) -> list[Step]:
        data, name = self.data, arm.step_name(share)
        keys = dict(self.training(share, seed, arm.joint))
        cfg = self.config_of(tuple(keys.items()))
        selection: dict[str, Any] = {"TEST.EVAL_PERIOD": 0, "TEST.BEST_METRIC": ""}
        if data.validation:
            period = cfg.TEST.EVAL_PERIOD or max(cfg.SOLVER.MAX_ITER // EVALUATIONS, 1)
            metric = "bbox/AP" if data.task == "detection" else "validation/top1"
            selection |= {"TEST.EVAL_PERIOD": period, "TEST.BEST_METRIC": metric}
        keys |= selection
        keys |= scaled_schedule(self.config_of(tuple(keys.items())), scale)
        encoder = arm.pretraining
        train = Step(name, self.config, encoder, overrides=tuple(keys.items()), weights="" if encoder else start)
        if not data.validation or data.task == "classification":  # whose training tests the best model itself
            return [train]
        keys |= {"DATASETS.TEST": (data.test,), "TEST.EVAL_PERIOD": 0, "TEST.BEST_METRIC": ""}
        return [train, Step(f"{name}/test", self.config, overrides=tuple(keys.items()), evaluates=name)]

    def tested(self, runs: dict[str, Run], arm: ComparedArm, share: float) -> Run:
        """Return the run that evaluates an arm on the test set."""
        name = arm.step_name(share)
        return runs.get(f"{name}/test", runs[name])

    def trainings(self, runs: dict[str, Run], arm: ComparedArm, share: float) -> Sequence[Run]:
        """Return the pre-training of an arm, if any, and its training."""
        return [runs[name] for name in (arm.pretraining, arm.step_name(share)) if name]
