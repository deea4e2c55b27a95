"""The runs of a row of a table, one after the other, and their results."""

from pathlib import Path
from typing import Any

import torch

from relvit_d2 import __version__
from relvit_d2.engine import signals
from relvit_d2.engine.precision import choose_precision
from relvit_d2.experiments.commands import run_command
from relvit_d2.experiments.published import tables
from relvit_d2.experiments.reproduce import ImageCounts, collect, count_images, page, plan
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json, write_text
from relvit_d2.utils.hardware import device_name


def reproduce(
    table: str, name: str, seeds: int, scale: float, output: Path | None, note: str, opts: list[str], command: str
) -> str:
    """Run the runs of a row that are not finished yet, and write the results after each.

    Args:
        table, name: of the row.
        seeds: runs of every arm.
        scale: share of the schedule and of the images, 0..1.
        output: folder of all runs; None: ``output/TABLE_ROW``, ``output/TABLE_ROW_SCALE`` if scaled.
        note: on the data, for readers of the results.
        opts: keys and values over every config.
        command: the command line, for the results.

    Returns:
        The results as Markdown, and where they were written.

    Raises:
        UserError: if an argument is out of range, a config or data are missing, or a run fails.
    """
    signals.install(patient=False)
    row = tables()[table][name]
    ending = f"_{scale:g}" if scale < 1 else ""
    folder = (output or Path(f"output/{table}_{name}{ending}")).absolute()
    planned = [plan(row, seed, scale, folder, opts) for seed in range(seeds)]
    images: dict[str, ImageCounts] = {}
    counts: dict[tuple[str, str], ImageCounts] = {}
    for run in planned[0].values():  # missing data end the command before the first run, not hours later
        if not run.config.DATASETS.TEST:
            raise UserError("DATASETS.TEST is empty, so there is nothing to compare; name a data set")
        key = (run.config.TASK, str(run.config.DATASETS))
        if key not in counts:
            counts[key] = count_images(run.config)
        images[run.step.name] = counts[key]
    arms = {arm.name: images[arm.steps[-1].name] for arm in row.arms}
    notes = dict.fromkeys(count.note for count in arms.values() if count.note)
    cfg = planned[0][row.arms[0].steps[-1].name].config
    about: dict[str, Any] = {
        "table": table,
        "row": name,
        "seeds": seeds,
        "note": note or "; ".join(notes),
        "machine": {
            "device": device_name(cfg.MODEL.DEVICE),
            "precision": choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE)).name,
            "torch": torch.__version__,
            "version": __version__,
        },
        "command": command,
    }

    def write() -> str:
        results = about | collect(row, planned, arms, scale)
        text = page(results)
        write_json(folder / "results.json", results)
        write_text(folder / "results.md", text)
        return text

    todo = [(seed, run) for seed, runs in enumerate(planned) for run in runs.values()]
    for number, (seed, run) in enumerate(todo, 1):
        if not run.finished():
            title = f"{number}/{len(todo)} {run.step.name}, seed {seed}"
            run_command(title, run.command, run.folder, run.config.SOLVER.MAX_ITER)
            run.finish()
            write()
    return f"{write()}\nwritten: {folder}/results.json, {folder}/results.md"
