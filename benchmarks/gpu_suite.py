"""All measurements of a GPU in one command, each in a separate process, and one table of their results.

    python -m benchmarks.gpu_suite --minutes 9

Steps: ``relvit-d2 doctor``, which names missing packages and the command that installs them; ten iterations of each
script in bfloat16 and float16; whether iterations wait for the GPU; pre-training; relation loss; detectors at 512 and
1,024 px; and, in the minutes that are left, the CIFAR-10 row of table 1. The same command continues with the first step
that did not end. ``results.md`` in the output folder has the table.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate  # type: ignore[import-untyped]

from benchmarks.pretrain import draw_images
from relvit_d2.config.config_file import override_words

GRACE = 60  # seconds that a stopped training has to save a checkpoint


def steps(device: str, quick: bool, output: Path) -> dict[str, list[str]]:
    """Return the steps by name: modules and their arguments."""
    measured = ["--json", "--device", device, *(["--quick"] if quick else [])]
    keys: dict[str, object] = {"MODEL.DEVICE": device}
    found = {"doctor": ["relvit_d2", "doctor"]}
    for precision in ("bfloat16", "float16"):
        short = keys | {"SOLVER.PRECISION": precision, "SOLVER.MAX_ITER": 10, "SOLVER.WARMUP_ITERS": 0}
        found[f"ten_iterations_detection_{precision}"] = ["relvit_d2", "demo", *override_words(short)]
        short |= {"SOLVER.IMS_PER_BATCH": 32, "DATASETS.TRAIN": (str(output / "images"),), "DATASETS.TEST": ()}
        short |= {"DATASETS.VALIDATION": "", "MODEL.WEIGHTS": "", "OUTPUT_DIR": output / f"classify_{precision}"}
        classify = ["relvit_d2", "classify", "--config-file", "configs/cls/cifar10_vit_s4.yaml"]
        found[f"ten_iterations_classification_{precision}"] = [*classify, *override_words(short)]
    if device == "cuda":
        found["gpu_sync_check"] = ["benchmarks.gpu_sync_check"]
    for name in ("pretrain", "relation_loss"):
        found[name] = [f"benchmarks.{name}", *measured]
    found["detector"] = ["benchmarks.detector", "--quick", "--json", "--device", device]
    row = ["relvit_d2", "reproduce", "table1", "--row", "cifar10", "--output", str(output / "cifar10")]
    found["cifar10"] = [*row, *(["--scale", "0.0001"] if quick else []), *override_words(keys)]
    return found


def run(words: list[str], console: Path, seconds: float) -> str:
    """Run a module with its output in a file, and return "", or why it did not end: "stopped" or its last line."""
    with console.open("w", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "stopped"
    lines = console.read_text(encoding="utf-8").strip().splitlines()
    return "" if process.returncode == 0 else lines[-1] if lines else f"exit status {process.returncode}"


def rows_of(name: str, console: Path, state: str) -> list[tuple[str, str, str]]:
    """Return the rows of the table for a step: those that its benchmark printed, or its state."""
    rows = []
    for line in console.read_text(encoding="utf-8").splitlines():
        if line.startswith('{"name"'):
            row = json.loads(line)
            values = {
                k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k not in ("name", "ratio")
            }
            rows.append((row["name"], f"{row['ratio']:.3f}", ", ".join(f"{k} {v}" for k, v in values.items())))
    return rows if rows and not state else [*rows, (name, "", state or "ended")]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time after which the step is stopped (default 9)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tests the command")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller batches")
    parser.add_argument("--output", type=Path, default=Path("output/gpu_suite"), help="folder of the results")
    return parser


def main() -> None:
    """Run the steps that did not end and write the table."""
    args = build_parser().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: benchmarks.gpu_suite needs CUDA: run it on a machine with an NVIDIA GPU, or with --device cpu")
    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    for label in range(2):
        folder = args.output / f"images/{label}"
        if not folder.exists():
            draw_images(folder, (32, 32), 128, label)
    ended = args.output / "ended.json"
    states: dict[str, str] = json.loads(ended.read_text(encoding="utf-8")) if ended.exists() else {}
    rows = []
    for name, words in steps(args.device, args.quick, args.output).items():
        console = args.output / f"{name}.txt"
        if states.get(name) != "" and time.monotonic() < end:
            states[name] = run(words, console, end - time.monotonic())
            ended.write_text(json.dumps(states), encoding="utf-8")
            print(f"{name}: {states[name] or 'ended'}", flush=True)
        rows += rows_of(name, console, states[name]) if name in states else [(name, "", "not started")]
    table = tabulate(rows, ("measurement", "ratio", "values"), tablefmt="github", disable_numparse=True)
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\nwritten: {args.output}/results.md")


if __name__ == "__main__":
    main()
