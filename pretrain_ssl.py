"""Pre-train an encoder from images alone, on the spatial relations of their patches."""

import argparse
import sys
from pathlib import Path

from detectron2.utils import comm

from relvit_d2.data.detection.catalog import keep_splits
from relvit_d2.data.detection.custom import config_pairs, register_own
from relvit_d2.engine.cli import add_data, keep_config, run_script, start_run
from relvit_d2.engine.weights import holds_encoder, load_proved, load_trained
from relvit_d2.pretraining.model import build_pretraining_model, export_encoder
from relvit_d2.pretraining.run import build_trainer, evaluate, image_files, next_command
from relvit_d2.report.run_summary import end_run
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError

TASK = "pretrain"


def main(args: argparse.Namespace) -> None:
    """Run one process."""
    cfg = load_config(args.config_file, [*config_pairs(args.data, TASK), *args.opts], TASK)
    cfg.freeze()
    start_run(cfg, args)
    register_own(cfg.DATASETS, labels=False)
    wanted = args.eval_only or cfg.DATASETS.TEST
    data = cfg.DATASETS
    how = (data.SKIP_MISSING, data.DOWNLOAD, data.SYNSETS)
    tests = image_files("DATASETS.TEST", data.TEST, *how) if wanted else []
    files = [] if args.eval_only else image_files("DATASETS.TRAIN", data.TRAIN, *how)
    keep_splits(data.TEST if args.eval_only else (*data.TRAIN, *data.TEST), Path(cfg.OUTPUT_DIR))
    model = build_pretraining_model(cfg)
    weights = cfg.MODEL.WEIGHTS
    if args.eval_only:
        keep_config(cfg)
        load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else weights)
        evaluate(cfg, model, tests)
        return
    trainer = build_trainer(cfg, model, files, tests)
    resumed = args.resume and trainer.resume(args.allow_changes)
    if weights and not resumed:
        if not holds_encoder(weights):
            raise UserError(
                f"MODEL.WEIGHTS '{weights}' is no encoder.safetensors and no timm:NAME; pre-training starts from one "
                "or from scratch"
            )
        load_proved(cfg, model.encoder, weights, "RGB")
    trainer.train()
    if comm.is_main_process():
        path = export_encoder(cfg, model, trainer.iter + 1, trainer.results)
        end_run(path.parent, next_command(args.config_file, args.data, cfg, path))


if __name__ == "__main__":
    sys.exit(run_script(main, "python pretrain_ssl.py --config-file configs/demo/ssl_streets.yaml", add_data))
