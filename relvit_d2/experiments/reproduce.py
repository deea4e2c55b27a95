"""The runs of a row of a table, one after the other, and their results."""

from pathlib import Path
from typing import Any

import torch

from relvit_d2 import __version__
from relvit_d2.engine import signals
from relvit_d2.engine.precision import choose_precision
from relvit_d2.experiments.results import collect, page
from relvit_d2.experiments.runs import count_images_of_runs, plan_runs, run_unfinished
from relvit_d2.experiments.table_rows import tables
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
    steps = [step for arm in row.arms for step in arm.steps]
    planned = [plan_runs(steps, seed, scale, folder, opts) for seed in range(seeds)]
    images = count_images_of_runs(planned[0])
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

    run_unfinished(planned, write)
    return f"{write()}\nwritten: {folder}/results.json, {folder}/results.md"
