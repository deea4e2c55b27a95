"""The command line: help texts, usage errors without torch, search for config files."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from relvit_d2.cli import COMMANDS, main, module_of, parse_arguments, parser_of
from relvit_d2.conversion import KINDS
from relvit_d2.conversion.convert import CONVERTERS
from relvit_d2.experiments.table_rows import row_names, tables
from relvit_d2.utils.config_paths import ROOT as CONFIG_ROOT
from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"pretrain_ssl.py": "pretrain", "train_net.py": "train", "train_cls.py": "classify"}

# Runs command lines in one process; prints for each its exit status and the heavy packages loaded so far.
LIGHT = """
import json, sys
from relvit_d2.cli import main
for words in json.loads(sys.argv.pop()):
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    heavy = [name for name in ("torch", "torchvision", "detectron2", "timm", "numpy", "fvcore") if name in sys.modules]
    print("STATUS", status, *heavy, flush=True)
"""


def examples(command: str) -> list[list[str]]:
    """The example command lines of a command."""
    text = module_of(command).EXAMPLE.replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("relvit-d2 ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_valid_and_their_configs_exist(command: str) -> None:
    assert examples(command)
    parse = getattr(module_of(command), "parse", argparse.ArgumentParser.parse_args)
    for name, *words in examples(command):
        assert name == command
        args = parse(parser_of(command), words)
        assert not getattr(args, "opts", None)
        if getattr(args, "config_file", None):
            assert find_config(args.config_file)


def command_lines() -> Iterator[tuple[list[str], int]]:
    """Command lines that do not need torch, and their exit statuses."""
    yield ["--help"], 0
    yield ["--version"], 0
    yield [], 2
    yield ["trian"], 2
    for command in SCRIPTS.values():
        yield [command], 1  # --config-file is missing
    for command in COMMANDS:
        parser = parser_of(command)
        yield [command, "--help"], 0
        # Before the other arguments, since after them it would be one of the KEY VALUE pairs.
        yield [command, "--no-such-option", *examples(command)[0][1:]], 2
        if any(action.required and action.nargs not in ("*", argparse.REMAINDER) for action in parser._actions):
            yield [command], 2
        if "--config-file" in parser._option_string_actions:
            for words in examples(command):
                if "--config-file" in words:
                    words[words.index("--config-file") + 1] = "configs/absent.yaml"
                    yield words, 1


def test_help_and_usage_errors_do_not_load_torch() -> None:
    lines = list(command_lines())
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps([words for words, _ in lines])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("STATUS")]
    assert found == [[str(status)] for _, status in lines]
    assert "did you mean 'train'?" in done.stderr
    absent = sum("configs/absent.yaml" in words for words, _ in lines)
    assert done.stderr.count("'configs/absent.yaml' does not exist") == absent > 5


def test_training_has_the_arguments_of_detectron2() -> None:
    ours = {action.dest: action for action in parser_of("train")._actions}
    for action in default_argument_parser()._actions:
        mine = ours[action.dest]
        for name in ("option_strings", "nargs", "type", "const", "choices", "required"):
            assert getattr(mine, name) == getattr(action, name), (action.dest, name)
        if action.dest not in ("dist_url", "opts"):  # a free port instead of a fixed one
            assert mine.default == action.default


def test_flags_may_follow_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_of("train")
    words = "--config-file a.yaml SEED 3 --resume OUTPUT_DIR -1 TEST.EVAL_PERIOD 2 --num-gpus 2 SEED 4"
    args = parse_arguments(parser, words.split())
    assert (args.config_file, args.resume, args.num_gpus, args.eval_only) == ("a.yaml", True, 2, False)
    assert args.opts == ["SEED", "3", "OUTPUT_DIR", "-1", "TEST.EVAL_PERIOD", "2", "SEED", "4"]
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--config-file", "a.yaml", "SEED", "3", "--resum3"])
    assert "unrecognized arguments: --resum3" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_scripts_equal_their_commands(script: str, command: str, tmp_path: Path) -> None:
    """From any folder, and without torch."""
    helps = [
        subprocess.run([sys.executable, *words, "--help"], stdout=subprocess.PIPE, text=True, check=True, cwd=folder)
        for words, folder in (((ROOT / script,), tmp_path), (("-m", "relvit_d2", command), ROOT))
    ]
    assert helps[0].stdout == helps[1].stdout
    assert re.search(rf"^  relvit-d2 {command} --config-file", helps[0].stdout, re.M)


def test_names_in_help_texts_exist() -> None:
    assert row_names() == {table: list(rows) for table, rows in tables().items()}
    assert tuple(CONVERTERS) == KINDS


def test_configs_are_searched_in_the_current_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "configs/voc_vit_s.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIG_ROOT / name
    (tmp_path / "configs").mkdir()
    (tmp_path / name).write_text("SEED: 1\n")
    assert find_config(name).read_text() == "SEED: 1\n"
    assert find_config(str(CONFIG_ROOT / name)) == CONFIG_ROOT / name
    with pytest.raises(UserError, match=f"'configs/none.yaml' does not exist; .* in {CONFIG_ROOT}/configs"):
        find_config("configs/none.yaml")


def test_a_table_with_several_rows_needs_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table2"]) == 1
    assert "--row is missing; those of table2 are: vit_s, " in capsys.readouterr().err


def test_an_unknown_arm_names_those_of_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table2", "--row", "swin_t", "--arm", "jont", "--print"]) == 1
    message = "--arm 'jont' is not in table2 --row swin_t: supervised, joint, upstream, mega; did you mean 'joint'"
    assert message in capsys.readouterr().err


def test_a_missing_package_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package, words in (
        ("detectron2", "run relvit-d2 doctor --install-detectron2"),
        ("av", "run pip install 'relvit_d2[video]'"),
        ("timm", "relvit-d2 doctor prints the command"),
    ):

        def fail(args: object, package: str = package) -> None:
            raise ModuleNotFoundError(f"No module named '{package}.part'", name=f"{package}.part")

        monkeypatch.setattr(module_of("demo"), "run", fail)
        assert main(["demo"]) == 1
        error = capsys.readouterr().err
        assert f"error: the package {package} is not installed: {words}" in error and error.count("\n") == 1
