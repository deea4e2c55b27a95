"""Check that a detector can overfit a few images."""

import json
import time
from pathlib import Path

from relvit_d2.config.config_file import override_words
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.experiments.commands import run_command
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import print_text

PASS = 95.0  # percent
FIRST_ROUND, ROUND, LAST = 200, 100, 1000  # iterations


def overfit_check(config_file: str, images: int, opts: list[str]) -> None:
    """Train in rounds until box AP50 on the training images exceeds ``PASS`` percent.

    Args:
        config_file: a detection config; its first training set is used.
        images: number of training images.
        opts: keys and values that override the config.

    Raises:
        UserError: if AP50 is too low after ``LAST`` iterations.
    """
    cfg = load_config(config_file, opts, "detection")
    register_custom(cfg.DATASETS)
    if not cfg.DATASETS.TRAIN:
        raise UserError(f"config file '{config_file}' names no training set (DATASETS.TRAIN)")
    name = f"{cfg.DATASETS.TRAIN[0]}[:{images}]"
    overrides: dict[str, object] = {
        "DATASETS.TRAIN": (name,),
        "MODEL.WEIGHTS": "",
        "INPUT.RANDOM_FLIP": "none",
        "INPUT.CROP.ENABLED": False,
        **{f"INPUT.AUGMENT.{key}": 0.0 for key in cfg.INPUT.AUGMENT},
        "INPUT.MIN_SIZE_TRAIN": (cfg.INPUT.MIN_SIZE_TEST,),
        "INPUT.MAX_SIZE_TRAIN": cfg.INPUT.MAX_SIZE_TEST,
        "MODEL.ENCODER.DROP_PATH": 0.0,
        "MODEL.ENCODER.DROPOUT": 0.0,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 200,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 200,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 512,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 2e-4,
        "SOLVER.REFERENCE_BATCH": 0,
        "SOLVER.WARMUP_ITERS": 50,
        # A constant learning rate does not depend on MAX_ITER, so that a later round can resume the earlier one.
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.STEPS": (),
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 5.0,
        "OUTPUT_DIR": f"output/overfit/{Path(config_file).stem}",
    }
    pairs = override_words(overrides) + opts
    output = Path(load_config(config_file, pairs).OUTPUT_DIR)
    command = ["train", "--config-file", config_file]
    start = time.monotonic()
    for end in range(FIRST_ROUND, LAST + 1, ROUND):
        resume = ["--resume", "--allow-changes"] if end > FIRST_ROUND else ["--overwrite"]
        goal = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", str(end)]
        run_command(f"training to {end}", [*command, *resume, *pairs, *goal], output, end)
        test = override_words({"DATASETS.TEST": (name,), "MODEL.WEIGHTS": output / "model_final.pth"})
        run_command("evaluating", [*command, "--eval-only", *pairs, *test], output, 0)
        ap50 = json.loads((output / "inference/results.json").read_text(encoding="utf-8"))[name]["bbox"]["AP50"] or 0.0
        seconds = time.monotonic() - start
        print_text(f"after {end} iterations and {seconds:.0f} s: AP50 {ap50:.1f} on {images} images")
        if ap50 > PASS:
            print_text(f"passed: AP50 {ap50:.1f} is above {PASS:.0f}")
            return
    raise UserError(f"AP50 stayed at or below {PASS:.0f} after {LAST} iterations on '{name}': see {output}/log.txt")
