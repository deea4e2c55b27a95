"""Values of keys in files and overrides: errors, notations, epochs, paths."""

import functools
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st

from relvit_d2.config.config_file import flat, override_words
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.tasks import TASKS, load_config, read_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.errors import UserError
from tests.support.base_configs import BASES


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SOLVER.BASE_RL", "1"], r"unknown config key 'SOLVER.BASE_RL'; did you mean 'SOLVER.BASE_LR'"),
        (["MODEL.ENCODER.PATCHSIZE", "8"], r"did you mean 'MODEL.ENCODER.PATCH_SIZE'"),
        (["SOLVER.MAX_ITER", "many"], r"SOLVER.MAX_ITER.*int.*many"),
        (["SOLVER.MAX_ITER"], "KEY VALUE pairs"),
        (["SOLVER.MAX_ITER", "2.5"], r"SOLVER.MAX_ITER takes a value of type int, not 2.5"),
        (["SOLVER.MAX_ITER", "True"], r"SOLVER.MAX_ITER takes a value of type int, not True"),
        (["SOLVER.WARMUP_ITERS", "2.5"], r"SOLVER.WARMUP_ITERS takes a value of type int, not 2.5"),
        (["SOLVER.WARMUP_ITERS", "-0.1"], r"SOLVER.WARMUP_ITERS takes a value of type int, not -0.1"),
        (["SOLVER.EPOCHS", "-1"], r"SOLVER.EPOCHS -1.0 is too small: give 0 or more"),
        (["SOLVER.EPOCHS", "1e400"], r"SOLVER.EPOCHS inf is too large: give 1000000.0 or less"),
        (["SOLVER.BASE_LR", "nan"], r"SOLVER.BASE_LR takes a value of type float"),
        (["MODEL.MASK_ON", "2"], r"MODEL.MASK_ON takes a value of type bool, not 2"),
        (["INPUT.MIN_SIZE_TRAIN", "512"], r"takes a value of type tuple, such as \(800,\), not 512 of type int"),
        (["MODEL.PYRAMID.STRIDES", "['p2']"], r"MODEL.PYRAMID.STRIDES takes a value of type list"),
        (["SOLVER", "3"], r"SOLVER is a group of keys"),
        (["SOLVER.EMA", "0.999"], r"SOLVER.EMA is a group of keys, not a key; set SOLVER.EMA.ENABLED"),
        (["SOLVER.EMA.DECAY", "1"], r"SOLVER.EMA.DECAY 1.0 is out of range: give 0 to less than 1"),
        (["SOLVER.EMA.DECAY", "-0.1"], r"SOLVER.EMA.DECAY -0.1 is out of range"),
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
        ("_BASE_: ~nobody_here/a.yaml\n", "~nobody_here/a.yaml', the _BASE_ of .*, does not exist"),
        ("just words\n", "bad.yaml"),
    ],
)
def test_bad_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(str(path), [], "detection")


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
    fixed = {"TASK", "VERSION", "INPUT.CHANNELS", "TEST.AUG.ENABLED", "SOLVER.PRECISION"}
    fixed |= {*TASKS[task].without_effect, *TASKS[task].alternatives}
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


EPOCHS_OVER_ITERATIONS = [("SOLVER", "EPOCHS", "MAX_ITER"), ("TEST", "EVAL_EPOCHS", "EVAL_PERIOD")]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("group", "epochs", "iterations"), EPOCHS_OVER_ITERATIONS)
def test_epochs_replace_the_iterations_of_an_earlier_source_and_the_other_way_round(
    group: str, epochs: str, iterations: str, task: str, tmp_path: Path
) -> None:
    base = f"_BASE_: {Path(f'configs/base/{BASES[task]}.yaml').resolve()}\n"

    def read(text: str, *overrides: str) -> tuple[float, int]:
        (tmp_path / "own.yaml").write_text(base + text)
        cfg = load_config(str(tmp_path / "own.yaml"), list(overrides))
        (tmp_path / "dump.yaml").write_text(cfg.dump())
        assert load_config(str(tmp_path / "dump.yaml"), [])[group] == cfg[group]
        assert type(cfg[group][epochs]) is float and type(cfg[group][iterations]) is int
        return cfg[group][epochs], cfg[group][iterations]

    assert read(f"{group}: {{{epochs}: 12}}\n") == (12, 0)
    assert read(f"{group}: {{{iterations}: 5}}\n", f"{group}.{epochs}", "0.5") == (0.5, 0)
    assert read(f"{group}: {{{epochs}: 12}}\n", f"{group}.{iterations}", "5") == (0, 5)
    assert read(f"{group}: {{{epochs}: 12, {iterations}: 0}}\n") == (12, 0)
    assert read(f"{group}: {{{iterations}: 5}}\n", group, f"{{{epochs}: 3}}") == (3, 0)
    with pytest.raises(UserError, match=rf"own.yaml' gives both {group}.{epochs} and {group}.{iterations}: remove one"):
        read(f"{group}: {{{epochs}: 12, {iterations}: 5}}\n")
    with pytest.raises(UserError, match=rf"the command line gives both {group}.{epochs} and {group}.{iterations}"):
        read("", f"{group}.{iterations}", "5", f"{group}.{epochs}", "12")


def test_epochs_and_iterations_of_a_config_without_sources() -> None:
    """As in Detectron2's way to make a config."""
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.SOLVER.EPOCHS = 3.0
    with pytest.raises(UserError, match=r"SOLVER.EPOCHS 3 and SOLVER.MAX_ITER 40000 are both set: set one to 0"):
        TASKS["detection"].finish(cfg)
    cfg.SOLVER.EPOCHS, cfg.SOLVER.MAX_ITER = 0.0, 0
    with pytest.raises(UserError, match=r"SOLVER.MAX_ITER and SOLVER.EPOCHS are both 0: set one of them"):
        TASKS["detection"].finish(cfg)


@pytest.mark.parametrize(("given", "meant"), [("0.1", 0.1), ("0", 0), ("1", 1), ("1.0", 1), ("1e-2", 0.01)])
def test_a_warmup_may_be_a_fraction(given: str, meant: float, tmp_path: Path) -> None:
    cfg = load_config("configs/base/ssl.yaml", ["SOLVER.WARMUP_ITERS", given])
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    for read in (cfg, load_config(str(tmp_path / "dump.yaml"), [])):
        assert (read.SOLVER.WARMUP_ITERS, type(read.SOLVER.WARMUP_ITERS)) == (meant, type(meant))


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


NAMES = st.text(st.characters(exclude_characters="\0"), min_size=1) | st.sampled_from(
    ["it's", 'a "b"', "C:\\new", "a: b", "a #b", "{a}", "[a", "2024", "None", "null", "\x1b[31m", "\udcff", "\u2028"]
)


@given(NAMES, st.lists(NAMES, max_size=2))
def test_values_are_read_back_from_the_words_of_a_command_line(name: str, classes: list[str]) -> None:
    pairs = {
        "DATASETS.CUSTOM": {"cells": {"ROOT": name, "CLASSES": classes}},
        "DATASETS.TRAIN": (name, *classes),
        "MODEL.WEIGHTS": f"out/{name}/encoder.safetensors",
        "SOLVER.BASE_LR": 1e-5,
        "SOLVER.STEPS": (3, 5),
        "MODEL.MASK_ON": False,
    }
    words = override_words(pairs)
    assert all(type(word) is str for word in words)
    cfg = read_config("configs/base/detection.yaml", words)
    assert {key: get_key(cfg, key) for key in pairs} == pairs


def test_a_folder_in_braces_is_a_path() -> None:
    assert load_config("configs/base/detection.yaml", ["OUTPUT_DIR", "{runs}/1"]).OUTPUT_DIR == "{runs}/1"


def test_an_absent_file_is_named() -> None:
    with pytest.raises(UserError, match=r"'configs/voc_vit_x.yaml' does not exist"):
        load_config("configs/voc_vit_x.yaml", [])


def test_relative_bases_stay_in_the_folders_of_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("project/base/a.yaml", "outside/a.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("TASK: pretrain\nSEED: 7\n")
    config = tmp_path / "project/configs/b.yaml"
    config.parent.mkdir()
    (config.parent / "link.yaml").symlink_to(tmp_path / "outside/a.yaml")

    def seed(base: object) -> int:
        config.write_text(f"_BASE_: {base}\n")
        return int(read_config(str(config), []).SEED)

    assert seed(tmp_path / "outside/a.yaml") == seed(f"[{tmp_path}/outside/a.yaml]") == 7  # absolute
    with pytest.raises(UserError, match=r"b.yaml': _BASE_ '../base/a.yaml' leads out of .*: give an absolute path"):
        seed("../base/a.yaml")
    monkeypatch.chdir(tmp_path / "project")
    assert seed("../base/a.yaml") == 7
    for base in ("../../outside/a.yaml", "link.yaml"):
        with pytest.raises(UserError, match=rf"_BASE_ '{base}' leads out of"):
            seed(base)
    for base in (
        "3",
        "{a: b.yaml}",
        "[[a.yaml]]",
        "''",
        "~",
        r'"a\0.yaml"',
        r'"\ud800"',
        "https://example.org/a.yaml",
        "[file:///a.yaml]",
    ):
        with pytest.raises(UserError, match=r"_BASE_ .* is not the path of a yaml file on this machine"):
            seed(base)


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.mkdir [made]", "!!python/name:os.mkdir", "!!python/tuple [1]", "!made x"]
)
def test_tags_make_no_objects(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path("configs/base/ssl.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    for text in (f"OUTPUT_DIR: {value}\n", f"? {value}\n: 1\n", f"_BASE_: {value}\n"):
        Path("a.yaml").write_text(f"_BASE_: {base}\n{text}" if "_BASE_" not in text else text)
        with pytest.raises(UserError, match=r"a.yaml"):
            read_config("a.yaml", [])
    with pytest.raises(UserError, match=r"override 'DATASETS.CUSTOM"):
        read_config(str(base), ["DATASETS.CUSTOM", f"{{a: {value}}}"])
    assert not Path("made").exists()
