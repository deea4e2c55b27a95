"""Train, fine-tune or evaluate a classifier, or probe an encoder."""

import argparse
import sys
from pathlib import Path

from detectron2.utils import comm

from relvit_d2.classification.model import build_classifier
from relvit_d2.classification.run import build_trainer, evaluate, finish, load_data, next_command, probe, settle, tell
from relvit_d2.engine.cli import keep_config, run_script, start_run
from relvit_d2.engine.weights import holds_encoder, load_trained, load_weights
from relvit_d2.report.run_summary import end_run
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError

TASK = "classification"


def main(args: argparse.Namespace) -> None:
    """Run one process."""
    args.eval_only |= bool(args.eval)
    asked = load_config(args.config_file, args.opts, TASK)
    start_run(asked, args)
    data = load_data(asked, training=not args.eval_only or bool(args.eval))
    cfg = settle(asked, data)
    model = build_classifier(cfg, data.classes)
    encoder = model.network.encoder
    if args.eval_only:
        if data.test is None:
            raise UserError("DATASETS.TEST is empty; name a set to evaluate on, such as ('cifar10_test',)")
        keep_config(cfg)
        if args.eval and not args.resume and holds_encoder(cfg.MODEL.WEIGHTS):
            load_weights(cfg, model, encoder, "RGB")
            model.restart_average()
        else:
            load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else cfg.MODEL.WEIGHTS)
        if args.eval:
            tell(cfg, probe(cfg, model, data, args.eval), data.test, file=f"{args.eval}.json")
        else:
            tell(cfg, {"test": evaluate(cfg, model, data.test)}, data.test)
        return
    trainer = build_trainer(cfg, model, data)
    if not (args.resume and trainer.resume(args.allow_changes)):
        load_weights(cfg, model, encoder, "RGB")
        model.restart_average()
    trainer.train()
    finish(cfg, model, trainer, data)
    if comm.is_main_process():
        end_run(Path(cfg.OUTPUT_DIR), next_command(cfg, data))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this script alone takes."""
    kinds = ("knn", "linear")
    parser.add_argument("--eval", choices=kinds, help="no training: probe the frozen encoder with the training images")


if __name__ == "__main__":
    sys.exit(run_script(main, "python train_cls.py --config-file configs/cls/cifar10_vit_s4.yaml", add_arguments))
