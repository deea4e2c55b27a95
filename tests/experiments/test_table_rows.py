"""Rows of the paper's tables: their figures, and the runs of every arm."""

import shlex
from pathlib import Path

import pytest

from relvit_d2.cli import parser_of
from relvit_d2.config.config_file import COMMANDS, flat
from relvit_d2.experiments.reproduce import RowPlan, command_lines, plan_row
from relvit_d2.experiments.runs import plan_runs
from relvit_d2.experiments.table_rows import tables
from relvit_d2.tasks import load_config
from tests.support.printed_tables import GAIN_SLIPS, PRINTED_DETECTION, PRINTED_TABLE1, paper_name, printed

TABLES = tables()
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_every_printed_command_of_a_row_is_accepted_and_fits_its_config_and_the_others(
    table: str, name: str, tmp_path: Path
) -> None:
    row = TABLES[table][name]
    runs = plan_runs(row.steps(), 3, 0.5, tmp_path, [])
    labelled = [r for r in runs.values() if r.config.TASK != "pretrain" and r.step.name != "supervised_longer"]
    schedules = {r.config.SOLVER.MAX_ITER for r in labelled}
    assert len(schedules) == 1  # the same fine-tuning budget for all
    printed = command_lines(RowPlan(row, tmp_path, [runs], [runs]))
    for planned, line in zip(runs.values(), printed, strict=True):
        program, command, *words = shlex.split(line)
        args = parser_of(command).parse_args(words)
        path = args.config_file
        assert program == "relvit-d2" and command == COMMANDS[planned.config.TASK] and args.resume
        assert [command, *words] == planned.command and load_config(path, args.opts) == planned.config
        cfg, plain = planned.config, load_config(path, [str(x) for pair in planned.step.overrides for x in pair])
        assert cfg.SEED == 3 and Path(cfg.OUTPUT_DIR) == planned.folder
        assert round(plain.SOLVER.MAX_ITER / 2) == cfg.SOLVER.MAX_ITER
        if not planned.step.encoder:
            assert not cfg.MODEL.WEIGHTS
            continue
        before = runs[planned.step.encoder]
        assert Path(cfg.MODEL.WEIGHTS) == before.folder / "encoder.safetensors"
        assert cfg.MODEL.ENCODER.NAME == before.config.MODEL.ENCODER.NAME
        # The pre-training is the one whose encoder the config itself would start from.
        source = Path(load_config(before.command[2], []).OUTPUT_DIR) / "encoder.safetensors"
        assert table == "demo" or str(source) == plain.MODEL.WEIGHTS


def test_a_selected_arm_is_run_with_its_pretraining_alone(tmp_path: Path) -> None:
    for arms, names in (
        (["joint"], ["joint"]),
        (["mega_perm"], ["pretrain_mega_perm", "mega_perm"]),
        (["supervised", "upstream"], ["supervised", "pretrain", "upstream"]),
    ):
        plan = plan_row("table2", "vit_s", arms, 2, 1.0, tmp_path, [])
        assert [[*runs] for runs in plan.selected] == [names, names]


def test_arms_differ_from_the_row_in_what_their_name_states(tmp_path: Path) -> None:
    """Keys that differ from the config of the row's ``upstream`` and its pre-training."""
    stated = {
        "joint": {"MODEL.RELVIT.JOINT": "True"},
        "mega": {"PRETEXT.MEGA.M": "10"},
        "perm": {"PRETEXT.PERMUTE": "'always'", "MODEL.ENCODER.POS_EMBED": "True"},
        "upstream_multitap": {"MODEL.PYRAMID.NAME": "'multitap'"},
        "supervised": {},
    }
    runs = plan_runs(TABLES["table2"]["vit_s"].steps(), 0, 1.0, tmp_path, [])
    for arm, keys in stated.items():
        found = dict[str, str]()
        for name, base in ((arm, "upstream"), (f"pretrain_{arm}", "pretrain")):
            if name in runs:
                old, new = (flat(runs[one].config) for one in (base, name))
                found |= {k: repr(v) for k, v in new.items() if v != old[k]}
        assert {k: v for k, v in found.items() if k not in ("OUTPUT_DIR", "MODEL.WEIGHTS")} == keys


def test_published_figures_are_those_of_the_paper() -> None:
    """Every cell and spread, of every row and arm, against the second list; nothing more."""
    figures = printed()
    for table, name in ROWS:
        for arm in TABLES[table][name].arms:
            ours = {
                metric: (f"{found.runs.mean:.2f}", "-" if found.runs.std is None else f"{found.runs.std:.2f}")
                for metric, found in arm.published.items()
            }
            theirs = figures.get((table, paper_name(name), arm.name.removesuffix("_multitap")), {})
            assert ours == theirs, (table, name, arm.name)
    arms = [(table, name, arm) for table, name in ROWS for arm in TABLES[table][name].arms]
    misprints = [(t, n, arm.name, m) for t, n, arm in arms for m, found in arm.published.items() if found.misprint]
    assert misprints == [("table2", name, "joint", "box AP75") for name in ("vit_s", "vit_s_512")]


def test_the_printed_gains_are_differences_of_the_figures_or_named_as_misprints() -> None:
    gains = [("table1", *line.split()[::5]) for line in PRINTED_TABLE1.split("\n")[1:-1]]
    gains += [(*line.split()[:2], *line.split()[-3:]) for line in PRINTED_DETECTION.split("\n")[1:-1]]
    slips = {}
    for table, name, *signed in gains:
        row = TABLES[table][name]
        best = {"table1": "upstream", "coco": "upstream", "kitti": "upstream"}  # elsewhere mega-patches
        arm = best.get(table, best.get(name, "mega"))
        old, new = (next(a.published for a in row.arms if a.name == x) for x in ("supervised", arm))
        for metric, gain in zip(row.metrics, signed, strict=True):
            difference = f"{new[metric].runs.mean - old[metric].runs.mean:.2f}"
            if gain != f"+{difference}":
                slips[name] = (gain, difference)
                assert gain in " ".join(row.remarks) and difference in " ".join(row.remarks)
    assert slips == GAIN_SLIPS


def test_the_authors_choice_of_the_model_trains_100_epochs_of_all_images(tmp_path: Path) -> None:
    for name, row in TABLES["table1"].items():
        if row.paper and name.endswith("_authors"):
            for run in plan_runs(row.steps(), 0, 1.0, tmp_path, []).values():
                solver, phases = run.config.SOLVER, 2 if run.step.name == "supervised_longer" else 1
                epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / row.paper.train_images
                assert epochs == pytest.approx(100 * phases, rel=2e-3)
                assert pytest.approx(solver.MAX_ITER / 10, abs=1) == solver.WARMUP_ITERS
                if run.config.TASK == "classification":
                    assert run.config.TEST.BEST_ON_TEST and not run.config.DATASETS.VALIDATION
                    assert (row.paper.test,) == run.config.DATASETS.TEST


@pytest.mark.slow
def test_an_arm_taps_several_blocks_where_the_encoder_has_one_stride(tmp_path: Path) -> None:
    for table, name in ROWS:
        if table not in ("table2", "table3") or name.endswith("_labels"):
            continue
        runs = plan_runs(TABLES[table][name].steps(), 0, 1.0, tmp_path, [])
        for arm in ("supervised", "upstream"):
            plain, tapped = runs[arm], runs.get(f"{arm}_multitap")
            assert (tapped is None) == name.startswith("swin_t")
            if tapped:
                pyramid = dict(tapped.step.overrides)
                assert pyramid == {"MODEL.PYRAMID.NAME": "multitap"} and tapped.step.encoder == plain.step.encoder
                assert tapped.config.MODEL.PYRAMID.NAME == "multitap" and plain.config.MODEL.PYRAMID.NAME == "auto"
