"""A comparison of training procedures on a user's data: plan, measurement of the time, runs with resume, results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from relvit_d2 import __version__
from relvit_d2.engine import signals
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.schedule import build_schedule
from relvit_d2.experiments.compare_arms import Comparison, read_arms
from relvit_d2.experiments.compare_budget import (
    Cost,
    Estimate,
    estimates,
    fitting_scale,
    kinds,
    longer_by,
    measure,
    table,
)
from relvit_d2.experiments.compare_data import check_labels, find_data
from relvit_d2.experiments.compare_results import collect, page, write_page
from relvit_d2.experiments.custom_measurements import CONFIG, PRETRAINING_CONFIG
from relvit_d2.experiments.runs import run_unfinished
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder, write_json, write_text
from relvit_d2.utils.hardware import device_name
from relvit_d2.utils.printing import print_text

CONFIGS = {"detection": CONFIG, "classification": "configs/cls/custom.yaml"}


def compare(
    source: str,
    arms: Sequence[str],
    shares: Sequence[float],
    seeds: int,
    hours: float | None,
    output: Path | None,
    config: str,
    opts: Sequence[str],
    pretrain_config: str,
    pretrain_opts: Sequence[str],
    command: str,
) -> str:
    """Run the unfinished runs of a comparison, and write the results after each.

    Args:
        source: folder or registered name, see :func:`relvit_d2.experiments.compare_data.find_data`.
        arms: names of the arms; the first one is the baseline.
        shares: percentages of labelled images.
        hours: time of all runs; None: that of the configs' schedules.
        output: folder of all runs; None: ``output/compare/NAME``.
        config, opts: config file of the training, "" for a small model, and alternating keys and values that override
            it.
        pretrain_config, pretrain_opts: the same of the pre-training.
        command: the command line, for the results.

    Returns:
        The results as Markdown, and the files in which they are.
    """
    signals.install(patient=False)
    data = find_data(source)
    folder = (output or Path("output/compare") / Path(source).expanduser().resolve().name).absolute()
    comparison = Comparison(
        data,
        read_arms(arms),
        tuple(sorted(shares)),
        config or CONFIGS[data.task],
        tuple(opts),
        pretrain_config or PRETRAINING_CONFIG,
        tuple(pretrain_opts),
        folder,
    )
    comparison.check_keys()
    about = {
        "data": data.__dict__,
        "config": comparison.config,
        "overrides": list(opts),
        "pretrain config": comparison.pretrain_config,
        "pretrain overrides": list(pretrain_opts),
        "hours": hours,
    }
    plan = _read_plan(folder, json.loads(json.dumps(about)))
    images = check_labels(data, comparison.config_of(comparison.training()), comparison.shares, seeds)
    weights = comparison.prepare_weights()
    for run in comparison.plan(0, weights, 1.0, 1.0).values():
        build_schedule(run.config)  # raises the errors with which the run would fail
    for kind in kinds(comparison):
        if kind not in plan["costs"]:
            plan["costs"][kind] = measure(comparison, kind, images[data.test])._asdict()
            _write_plan(folder, plan)
    costs = {kind: Cost(**plan["costs"][kind]) for kind in kinds(comparison)}
    longer = longer_by(comparison, costs) if any(arm.longer for arm in comparison.arms) else 1.0
    if plan["scale"] is None:
        planned = [comparison.plan(seed, weights, 1.0, longer) for seed in range(seeds)]
        total = Estimate(*map(sum, zip(*estimates(comparison, planned, costs, images).values(), strict=True)))
        plan["scale"] = fitting_scale(total, hours) if hours else 1.0
        _write_plan(folder, plan)
    planned = [comparison.plan(seed, weights, plan["scale"], longer) for seed in range(seeds)]
    print_text(table(comparison, estimates(comparison, planned, costs, images), costs))

    def write() -> str:
        cfg = planned[0][comparison.arms[0].step_name(comparison.shares[0])].config
        results: dict[str, Any] = collect(comparison, planned) | {
            "scale": plan["scale"],
            "longer": longer,
            "machine": {
                "device": device_name(cfg.MODEL.DEVICE),
                "precision": choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE)).name,
                "torch": torch.__version__,
                "version": __version__,
            },
            "command": command,
        }
        text = page(results)
        write_json(folder / "results.json", results)
        write_text(folder / "results.md", text)
        write_page(results, folder / "report.html")
        return text

    run_unfinished(planned, write)
    return f"{write()}\nwritten: {folder}/results.json, {folder}/results.md, {folder}/report.html"


def _read_plan(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the plan in the output folder, or a new one.

    The plan keeps the measured times, so that a resumed or extended comparison has the same schedules.
    """
    path = folder / "plan.json"
    if path.is_file():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            previous, _, _ = dict(plan["about"]), dict(plan["costs"]), plan["scale"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{path}' is damaged ({error}): choose another --output, or delete the folder") from error
        if key := next((key for key in about if previous.get(key) != about[key]), None):
            raise UserError(
                f"'{folder}' contains another comparison, with {key} {previous.get(key)} instead of {about[key]}: "
                "choose another --output, or delete that folder"
            )
        return plan
    early = ("weights", "trial")  # folders of a comparison that was interrupted before its plan was written
    if folder.is_dir() and any(path.name not in early for path in folder.iterdir()):
        raise UserError(f"'{folder}' contains files of another kind than a comparison: choose another --output")
    return {"about": about, "costs": {}, "scale": None}


def _write_plan(folder: Path, plan: dict[str, Any]) -> None:
    make_folder(folder)
    write_json(folder / "plan.json", plan)
