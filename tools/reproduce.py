"""Run a row of a paper's table: pre-train, fine-tune and train from scratch, once a seed, then compare.

Each arm is a few runs of the scripts, one after the other, in a folder of its own. A run that was cut off goes on where
it stopped and a finished one is not run again, so give the same command until it ends. results.md and results.json in
the output folder hold what is known so far: ours, the paper's, the difference, and whether the spread over seeds
explains it.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from running import run_script  # noqa: E402

from relvit_d2 import __version__  # noqa: E402
from relvit_d2.engine import signals  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.engine.precision import choose_precision  # noqa: E402
from relvit_d2.experiments.published import Row, tables  # noqa: E402
from relvit_d2.experiments.reproduce import ImageCounts, collect, count_images, page, plan  # noqa: E402
from relvit_d2.utils.errors import UserError, nearest  # noqa: E402
from relvit_d2.utils.files import write_json, write_text  # noqa: E402
from relvit_d2.utils.hardware import device_name  # noqa: E402


def main() -> int:
    """Parse the command line and run the row."""
    known = tables()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/reproduce.py table2 --row vit_s --seeds 3\nrows:\n"
        + "\n".join(f"  {table}: {', '.join(rows)}" for table, rows in known.items()),
    )
    parser.add_argument("table", choices=list(known))
    parser.add_argument("--row", required=True, metavar="NAME", help="one of those below")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every arm, with the seeds 0, 1, ... (default 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of schedule and images, for a rehearsal: 0.01")
    parser.add_argument("--output", type=Path, help="default output/TABLE_ROW, output/TABLE_ROW_SCALE if scaled")
    parser.add_argument(
        "--data-note", default="", metavar="TEXT", help="what readers of the table should know of the data"
    )
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs over every config")
    args = parser.parse_intermixed_args()

    def start() -> None:
        signals.install(patient=False)
        if args.row not in known[args.table]:
            rows = list(known[args.table])
            raise UserError(f"--row '{args.row}' is not in {args.table}: {', '.join(rows)}{nearest(args.row, rows)}")
        reproduce(args, known[args.table][args.row])

    return guard(start)


def reproduce(args: argparse.Namespace, row: Row) -> None:
    """Run what of a row is not finished yet.

    Raises:
        UserError: if an argument is out of range, a config or data are missing, or a run fails.
    """
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: give at least 1")
    if not 0 < args.scale <= 1:
        raise UserError(f"--scale {args.scale}: give more than 0, at most 1")
    ending = f"_{args.scale:g}" if args.scale < 1 else ""
    output = (args.output or Path(f"output/{args.table}_{args.row}{ending}")).absolute()
    seeds = [plan(row, seed, args.scale, output, args.opts) for seed in range(args.seeds)]
    images: dict[str, ImageCounts] = {}
    counts: dict[tuple[str, str], ImageCounts] = {}
    for run in seeds[0].values():  # missing data end the tool before the first run, not hours later
        if not run.config.DATASETS.TEST:
            raise UserError("DATASETS.TEST is empty, so there is nothing to compare; name a data set")
        key = (run.step.script, str(run.config.DATASETS))
        if key not in counts:
            counts[key] = count_images(run.config, run.step.script)
        images[run.step.name] = counts[key]
    arms = {arm.name: images[arm.steps[-1].name] for arm in row.arms}
    notes = dict.fromkeys(count.note for count in arms.values() if count.note)
    cfg = seeds[0][row.arms[0].steps[-1].name].config
    about: dict[str, Any] = {
        "table": args.table,
        "row": args.row,
        "seeds": args.seeds,
        "note": args.data_note or "; ".join(notes),
        "machine": {
            "device": device_name(cfg.MODEL.DEVICE),
            "precision": choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE)).name,
            "torch": torch.__version__,
            "version": __version__,
        },
        "command": shlex.join(["python", "tools/reproduce.py", *sys.argv[1:]]),
    }

    def write() -> str:
        results = about | collect(row, seeds, arms, args.scale)
        text = page(results)
        write_json(output / "results.json", results)
        write_text(output / "results.md", text)
        return text

    total = sum(len(runs) for runs in seeds)
    for number, (seed, run) in enumerate(((seed, run) for seed, runs in enumerate(seeds) for run in runs.values()), 1):
        if not run.finished():
            title = f"{number}/{total} {run.step.name}, seed {seed}"
            run_script(title, run.command, run.folder, run.config.SOLVER.MAX_ITER)
            run.finish()
            write()
    print(f"\n{write()}\nwritten: {output}/results.json, {output}/results.md")


if __name__ == "__main__":
    sys.exit(main())
