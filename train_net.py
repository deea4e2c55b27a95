"""Train or evaluate a Mask R-CNN whose backbone is a relational vision transformer."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from detectron2.utils import comm

from relvit_d2.analysis.data_checks import before_training
from relvit_d2.data.detection.catalog import get_metadata, keep_splits
from relvit_d2.data.detection.custom import config_pairs, register_own
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.run import (
    build_trainer,
    check_expected_results,
    evaluate,
    evaluate_with_tta,
    evaluated_records,
    evaluation_sets,
    mask_notes,
    settle,
    training_records,
)
from relvit_d2.engine.cli import add_data, keep_config, run_script, start_run
from relvit_d2.engine.weights import load_trained, load_weights
from relvit_d2.report.run_summary import end_run
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError

TASK = "detection"

logger = logging.getLogger("relvit_d2.train_net")


def main(args: argparse.Namespace) -> None:
    """Run one process."""
    asked = load_config(args.config_file, [*config_pairs(args.data, TASK), *args.opts], TASK)
    start_run(asked, args)
    register_own(asked.DATASETS)
    tests = evaluation_sets(asked)
    if args.eval_only and not tests:
        raise UserError("DATASETS.TEST is empty; name a data set to evaluate on, such as ('voc_2007_test',)")
    records = evaluated_records(tests) if args.eval_only else training_records(asked)
    keep_splits(tests if args.eval_only else (*asked.DATASETS.TRAIN, *tests), Path(asked.OUTPUT_DIR))
    cfg = settle(asked, records)
    for note in mask_notes(asked, cfg, records, tests):
        logger.info(note)
    if not args.eval_only:
        before_training(cfg, records, tests, get_metadata(cfg.DATASETS.TRAIN[0]).thing_classes)
    model = build_detector(cfg)
    if args.eval_only:
        keep_config(cfg)
        load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else cfg.MODEL.WEIGHTS)
        results = evaluate(cfg, model, tests)
        check_expected_results(cfg, evaluate_with_tta(cfg, model, tests, results))
        return
    trainer = build_trainer(cfg, model, records, tests)
    if not (args.resume and trainer.resume(args.allow_changes)):
        load_weights(cfg, model, model.backbone.encoder, cfg.INPUT.FORMAT)
    trainer.train()
    results = evaluate_with_tta(cfg, model, tests, trainer.results)
    if comm.is_main_process():
        predict = ["python", "tools/predict.py", "--weights", cfg.OUTPUT_DIR, "--input", "IMAGES"]
        end_run(Path(cfg.OUTPUT_DIR), shlex.join(predict))
    check_expected_results(cfg, results)


if __name__ == "__main__":
    sys.exit(run_script(main, "python train_net.py --config-file configs/demo/streets.yaml", add_data))
