"""Configs: every file loads, errors are one sentence that names the key."""

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from detectron2.config import get_cfg

from relvit_d2.config.config_file import COMMANDS, flat
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.encoders import ENCODERS
from relvit_d2.tasks import TASKS, load_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.errors import UserError
from tests.support.base_configs import BASES

CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads(path: str) -> None:
    cfg = load_config(path, ["SOLVER.MAX_ITER", "3"])
    assert cfg.SOLVER.MAX_ITER == 3
    assert cfg.MODEL.ENCODER.NAME in ENCODERS


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
        "DATALOADER.NUM_WORKERS",
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
        ("DATALOADER.NUM_WORKERS", "-2", "NUM_WORKERS -2 is too small"),
        ("MODEL.ENCODER.PATCH_SIZE", "0", "MODEL.ENCODER.PATCH_SIZE 0 is too small: give 1 or more"),
        ("MODEL.ENCODER.DROP_PATH", "2", "MODEL.ENCODER.DROP_PATH 2.0 is too large: give 1 or less"),
    ],
)
def test_values_that_every_task_reads_are_checked_in_every_task(task: str, key: str, value: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(f"configs/base/{BASES[task]}.yaml", [key, value])


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
    defaults = TASKS[task].defaults()
    TASKS[task].finish(defaults)
    assert load_config(str(tmp_path / "own.yaml"), ["SEED", "0"], task) == defaults
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
def test_amp_is_bfloat16_unless_it_is_float16_and_contradicts_float32(task: str) -> None:
    base, amp = f"configs/base/{BASES[task]}.yaml", ["SOLVER.AMP.ENABLED", "True"]
    assert load_config(base, []).SOLVER.PRECISION == "auto"
    for setting in ("auto", "bfloat16"):
        assert load_config(base, [*amp, "SOLVER.PRECISION", setting]).SOLVER.PRECISION == "bfloat16"
    assert load_config(base, [*amp, "SOLVER.PRECISION", "float16"]).SOLVER.PRECISION == "float16"
    with pytest.raises(UserError, match=r"AMP.ENABLED True.*contradicts SOLVER.PRECISION float32: set .* auto or"):
        load_config(base, ["SOLVER.PRECISION", "float32", *amp])
