"""Reproduce a row of a table of the paper: pre-train, fine-tune and train from scratch with several seeds, and compare.

Each arm consists of a few trainings, executed one after the other in folders of their own. An interrupted run resumes
and a finished run is not repeated: give the same command until it ends. results.md and results.json in the output
folder contain the results so far: ours, the paper's, the difference, and whether it exceeds the variation over seeds.
--print prints the commands of all runs instead of executing them.
"""

import argparse
from pathlib import Path

from relvit_d2.experiments.table_rows import row_names
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.printing import print_text

EXAMPLE = (
    "relvit-d2 reproduce table2 --row vit_s --seeds 3\n"
    "relvit-d2 reproduce table2 --row vit_s --arm joint --print\nrows:\n"
) + "\n".join(f"  {table}: {', '.join(rows)}" for table, rows in row_names().items())

# KEY VALUE pairs may come before and after options.
parse = argparse.ArgumentParser.parse_intermixed_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("table", choices=list(row_names()))
    parser.add_argument("--row", metavar="NAME", help="one of the rows below; required unless the table has one row")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME",
        help="run this arm only, such as supervised, joint or upstream; repeat it for several (default: all arms)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of every arm, with the seeds 0, 1, ... (default 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of schedule and images, for a rehearsal: 0.01")
    parser.add_argument("--output", type=Path, help="default output/TABLE_ROW, output/TABLE_ROW_SCALE if scaled")
    parser.add_argument("--data-note", default="", metavar="TEXT", help="a note on the data, printed with the results")
    parser.add_argument("--print", action="store_true", help="print the commands of the runs and exit")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for every config")


def run(args: argparse.Namespace) -> None:
    """Run the row.

    Raises:
        UserError: if an argument is out of range, a config or data are missing, or a run fails.
    """
    rows = row_names()[args.table]
    name = args.row or (rows[0] if len(rows) == 1 else "")
    if name not in rows:
        wrong = f"--row '{name}' is not in {args.table}" if name else f"--row is missing; those of {args.table} are"
        raise UserError(f"{wrong}: {', '.join(rows)}{nearest(name, rows)}")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: give at least 1")
    if not 0 < args.scale <= 1:
        raise UserError(f"--scale {args.scale}: give more than 0, at most 1")
    from relvit_d2.engine.provenance import command_line
    from relvit_d2.experiments.reproduce import command_lines, plan_row, reproduce

    plan = plan_row(args.table, name, args.arm, args.seeds, args.scale, args.output, args.opts)
    if args.print:
        print_text("\n".join(command_lines(plan)))
        return
    about = {"table": args.table, "row": name, "scale": args.scale, "note": args.data_note, "command": command_line()}
    print_text(f"\n{reproduce(plan, about)}")
