"""Checks of commands without running them."""

import argparse
import re

from relvit_d2.cli import COMMANDS, main, module_of, parser_of
from relvit_d2.config.config_file import COMMANDS as TRAINING_COMMANDS
from relvit_d2.config.config_file import flat
from relvit_d2.tasks import TASKS, load_config
from relvit_d2.utils.config_paths import has_config


def check_command(words: list[str]) -> None:
    """Parse the arguments, load the config with the overrides, and check names of rows and keys."""
    command, *rest = (re.sub(r"^\$SLURM_\w+$", "2", word) for word in words)
    if words in (["--help"], ["--version"]):
        return
    assert command in COMMANDS
    args = getattr(module_of(command), "parse", argparse.ArgumentParser.parse_args)(parser_of(command), rest)
    opts = getattr(args, "opts", getattr(args, "words", []))
    config = str(getattr(args, "config_file", "") or "")
    if has_config(config):
        tasks = {name: task for task, name in TRAINING_COMMANDS.items()}
        load_config(config, opts, tasks.get(command))
    else:
        assert not config.startswith("configs/")
    if "--print" in rest:
        assert main(words) == 0
    if command == "reproduce":
        assert args.row in module_of(command).row_names()[args.table]
        assert set(opts[::2]) <= all_keys()


def all_keys() -> set[str]:
    return {key for task in TASKS.values() for key in flat(task.defaults())}
