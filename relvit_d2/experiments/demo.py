"""The demo: pre-training and detection on synthetic street numbers."""

import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relvit_d2.conversion.encoder_file import read_encoder
from relvit_d2.data.detection import catalog
from relvit_d2.data.images.decode import read_rgb
from relvit_d2.engine.precision import choose_precision
from relvit_d2.experiments.commands import run_command
from relvit_d2.experiments.statistics import RunStatistics, paired_difference
from relvit_d2.report.page import write_report
from relvit_d2.report.predictions import DetectionRow, draw_detections
from relvit_d2.tasks import load_config
from relvit_d2.utils.files import write_json, write_text
from relvit_d2.utils.hardware import device_name
from relvit_d2.utils.printing import print_text

SSL, DETECT = "configs/demo/ssl_streets.yaml", "configs/demo/streets.yaml"
TASKS = ("relation", "position")
SHOWN, SCORE = 12, 0.5

# Box AP with the seeds 0, 1, ... on an Intel Xeon, float32, 2026-11-30 (docs/evidence.md).
MEASURED = {"finetune": (78.2, 76.6, 77.6, 77.5, 77.2), "supervised": (70.0, 72.1, 71.1, 70.5, 71.6)}


def demo(opts: list[str]) -> None:
    """Run all phases in subprocesses and write the results to ``output/demo`` in the current folder."""
    output = Path("output/demo")
    shutil.rmtree(output, ignore_errors=True)
    started = time.monotonic()
    print_text("1/4 generating street numbers")
    records = catalog.get_records("streets_test")
    encoder = output / "pretrain" / "encoder.safetensors"
    arms = {"finetune": ["MODEL.WEIGHTS", str(encoder)], "supervised": []}
    seconds = {"pretrain": run("2/4 pre-training", "pretrain", SSL, output / "pretrain", opts)}
    for number, (arm, weights) in enumerate(arms.items(), start=3):
        title = f"{number}/4 {'fine-tuning' if weights else 'the same detector from scratch'}"
        seconds[arm] = run(title, "train", DETECT, output / arm, [*weights, *opts])
    figures = read_encoder(encoder)[1]["results"]["held_out"]
    pretext = {f"{task}_{what}": figures[f"{what}_{task}"] for task in TASKS for what in ("accuracy", "chance")}
    results: dict[str, Any] = {arm: scores(output / arm) | {"seconds": seconds[arm]} for arm in arms}
    results["pretrain"] = pretext | {"seconds": seconds["pretrain"]}
    results["machine"] = machine(opts)
    write_json(output / "results.json", results)
    text = table(results, len(records), time.monotonic() - started)
    write_text(output / "results.md", text)
    draw(records, output)
    write_report([output / arm for arm in (*arms, "pretrain")], output / "report.html")
    written = f"written: {output}/results.json, {output}/results.md, {output}/predictions.png"
    print_text(f"\n{text}\n{written}\nreport: {output}/report.html")


def run(title: str, command: str, config: str, output: Path, opts: list[str]) -> float:
    """Run one phase and return its wall-clock time in seconds."""
    start = time.monotonic()
    words = [command, "--config-file", config, "OUTPUT_DIR", str(output), *opts]
    run_command(title, words, output, load_config(config, opts).SOLVER.MAX_ITER)
    return round(time.monotonic() - start, 1)


def scores(folder: Path) -> dict[str, float]:
    """Return the box AP, AP50 and AP75 of a phase on its test set, in percent."""
    box = next(iter(json.loads((folder / "inference/results.json").read_text(encoding="utf-8")).values()))["bbox"]
    return {name: round(box[name], 2) for name in ("AP", "AP50", "AP75")}


def machine(opts: list[str]) -> dict[str, Any]:
    """Return device, precision, versions and seed of the measurement."""
    cfg = load_config(DETECT, opts)
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE)).name
    return {
        "device": device_name(cfg.MODEL.DEVICE),
        "precision": precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": cfg.SEED,
    }


def table(results: dict[str, Any], images: int, seconds: float) -> str:
    """Return the results as Markdown."""
    machine_, pre = results["machine"], results["pretrain"]
    lines = [
        f"Box AP on {images} test images of `streets` (synthetic street numbers), in percent.",
        "",
        "| detector | AP | AP50 | AP75 | training | pre-training |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, title in (
        ("finetune", "pre-trained, then fine-tuned"),
        ("supervised", "from scratch, same fine-tuning budget"),
    ):
        row = results[arm]
        before = f"{pre['seconds']:.0f} s" if arm == "finetune" else "none"
        lines.append(
            f"| {title} | {row['AP']:.1f} | {row['AP50']:.1f} | {row['AP75']:.1f} | {row['seconds']:.0f} s | {before} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Pre-training on held-out images: "
            + ", ".join(f"{t} accuracy {pre[t + '_accuracy']:.1%} (chance {pre[t + '_chance']:.1%})" for t in TASKS)
            + ".",
            f"One seed proves nothing. {of_seeds()}",
            f"Measured on {machine_['device']}, {machine_['precision']}, torch {machine_['torch']}, Python "
            f"{machine_['python']}, seed {machine_['seed']}; {seconds / 60:.1f} minutes in total. Seconds are "
            "wall-clock time including start-up and evaluation.",
            "",
        ]
    )


def of_seeds() -> str:
    """Return what several seeds gave, as a sentence."""
    before, scratch = map(RunStatistics.of, MEASURED.values())
    gain = paired_difference(*MEASURED.values())
    return (
        f"On an Intel Xeon, {before.count} seeds gave {before.mean:.1f} ± {before.std:.1f} AP pre-trained and "
        f"{scratch.mean:.1f} ± {scratch.std:.1f} from scratch (mean, standard deviation): a gain of {gain.value:.1f} ± "
        f"{gain.margin:.1f} (paired, 95 % interval)."
    )


def draw(records: list[dict[str, Any]], output: Path) -> None:
    """Draw the first test images: ground truth beside the boxes of the fine-tuned detector."""
    found = json.loads((output / "finetune/inference/coco_instances_results.json").read_text(encoding="utf-8"))
    rows = []
    for record in records[:SHOWN]:
        mine = [d for d in found if d["image_id"] == record["image_id"] and d["score"] >= SCORE]
        corners = np.array([d["bbox"] for d in mine]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]  # COCO results contain left, top, width, height
        rows.append(
            DetectionRow(
                read_rgb(record["file_name"]),
                np.array([a["bbox"] for a in record["annotations"]]),
                np.array([a["category_id"] for a in record["annotations"]]),
                corners,
                np.array([d["category_id"] for d in mine], dtype=int),
                np.array([d["score"] for d in mine]),
            )
        )
    classes = catalog.get_metadata("streets_test").thing_classes
    draw_detections(rows, classes, output / "predictions.png", title="street numbers: ground truth and detections")
