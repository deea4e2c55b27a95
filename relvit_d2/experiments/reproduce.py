"""The runs of a table row, one after the other, and their results."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from relvit_d2 import __version__
from relvit_d2.engine import signals
from relvit_d2.engine.precision import choose_precision
from relvit_d2.experiments.results import collect, page
from relvit_d2.experiments.runs import Run, count_images_of_runs, plan_runs, run_unfinished
from relvit_d2.experiments.table_rows import Row, tables
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.files import write_json, write_text
from relvit_d2.utils.hardware import device_name


class RowPlan(NamedTuple):
    """The runs of a row.

    Attributes:
        folder: output folder of all runs.
        seeds: the runs of all arms by the name of their step, of each seed.
        selected: those of the selected arms.
    """

    row: Row
    folder: Path
    seeds: list[dict[str, Run]]
    selected: list[dict[str, Run]]


def plan_row(
    table: str, name: str, arms: Sequence[str], seeds: int, scale: float, output: Path | None, opts: list[str]
) -> RowPlan:
    """Return the runs of a row.

    Args:
        table, name: table and name of the row.
        arms: names of the arms to run; empty for all.
        scale: share of the schedule and of the images, 0..1.
        output: folder of all runs; None: ``output/TABLE_ROW``, ``output/TABLE_ROW_SCALE`` if scaled.
        opts: keys and values for every config.

    Raises:
        UserError: for an unknown arm, a config that cannot be read, or a key that the runs set themselves.
    """
    row = tables()[table][name]
    known = [arm.name for arm in row.arms]
    if wrong := next((arm for arm in arms if arm not in known), None):
        raise UserError(f"--arm '{wrong}' is not in {table} --row {name}: {', '.join(known)}{nearest(wrong, known)}")
    folder = (output or Path(f"output/{table}_{name}{f'_{scale:g}' if scale < 1 else ''}")).absolute()
    planned = [plan_runs(row.steps(), seed, scale, folder, opts) for seed in range(seeds)]
    names = {step.name for arm in row.arms if not arms or arm.name in arms for step in arm.steps}
    return RowPlan(row, folder, planned, [{n: run for n, run in runs.items() if n in names} for runs in planned])


def command_lines(plan: RowPlan) -> list[str]:
    """Return the selected runs as shell commands, in the order of execution."""
    return [" ".join(["relvit-d2", *map(_quoted, run.command)]) for runs in plan.selected for run in runs.values()]


def _quoted(word: str) -> str:
    """Quote a shell word; double quotes around tuples of names are easier to read than escaped single quotes."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def reproduce(plan: RowPlan, about: dict[str, Any]) -> str:
    """Execute the selected runs that are not finished, and write the results of the row after each.

    Args:
        about: ``table``, ``row``, ``note`` on the data, ``command`` line and ``scale``, stored with the results.

    Returns:
        The results as Markdown, and the paths of the files.
    """
    signals.install(patient=False)
    row = plan.row
    images = count_images_of_runs(plan.seeds[0])
    counts = {arm.name: images[arm.steps[-1].name] for arm in row.arms}
    notes = dict.fromkeys(count.note for count in counts.values() if count.note)
    cfg = plan.seeds[0][row.arms[0].steps[-1].name].config
    about = about | {
        "seeds": len(plan.seeds),
        "note": about["note"] or "; ".join(notes),
        "machine": {
            "device": device_name(cfg.MODEL.DEVICE),
            "precision": choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE)).name,
            "torch": torch.__version__,
            "version": __version__,
        },
    }

    def write() -> str:
        results = about | collect(row, plan.seeds, counts, about["scale"])
        text = page(results)
        write_json(plan.folder / "results.json", results)
        write_text(plan.folder / "results.md", text)
        return text

    run_unfinished(plan.selected, write)
    return f"{write()}\nwritten: {plan.folder}/results.json, {plan.folder}/results.md"
