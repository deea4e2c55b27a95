"""Tell what a model of a config costs, stage by stage: parameters, operations, memory, speed, and the batch that fits.

Takes the config of any of the scripts. One training pass on random images is measured: operations are floating-point
ones of the forward pass (a multiplication and an addition count as two; fused attention included), memory is what the
pass keeps for the backward pass, images/s are those of the forward pass of a stage, and of a whole step without the
optimiser's for the model. No data set is needed.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detectron2.structures import BitMasks, Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from fvcore.common.config import CfgNode  # noqa: E402
from tabulate import tabulate  # type: ignore[import-untyped]  # noqa: E402

from relvit_d2.classification.model import build_classifier  # noqa: E402
from relvit_d2.classification.run import load_data  # noqa: E402
from relvit_d2.config.config_file import use_here  # noqa: E402
from relvit_d2.data.detection import catalog  # noqa: E402
from relvit_d2.data.detection.custom import register_own  # noqa: E402
from relvit_d2.detection.model import build_detector  # noqa: E402
from relvit_d2.detection.run import settle, training_records  # noqa: E402
from relvit_d2.engine.cli import silence  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.engine.precision import choose_precision  # noqa: E402
from relvit_d2.pretraining.model import build_pretraining_model  # noqa: E402
from relvit_d2.tasks import load_config  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402
from relvit_d2.utils.hardware import device_name, free_memory  # noqa: E402
from relvit_d2.utils.randomness import torch_generator  # noqa: E402

OBJECTS = 8  # of a random image
ADAMW = 16  # bytes a trained parameter: itself, its gradient and AdamW's two averages, float32
SPARE = 0.8  # share of the free memory that activations may fill; the backward pass needs some of its own
UNKNOWN_CLASSES = 1000  # of a classifier whose data is not here
REPEATS = 3

Batches = Callable[[int], Any]
Stages = dict[str, tuple[Any, ...]]  # owner and its methods


def main() -> int:
    """Parse the command line and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/analyze_model.py --config-file configs/demo/streets.yaml",
    )
    parser.add_argument("--config-file", required=True, help="of train_net.py, pretrain_ssl.py or train_cls.py")
    parser.add_argument("--batch", type=int, default=1, help="images of the measured pass (default 1)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    return guard(lambda: print(analyse(args.config_file, args.batch, args.opts)))


def analyse(config_file: str, batch: int, opts: list[str]) -> str:
    """Return the table of a config's model and the sentence on the batch that fits.

    Raises:
        UserError: if the file is no config of one of the scripts.
    """
    if batch < 1:
        raise UserError(f"--batch {batch}: give at least 1")
    silence()
    cfg = load_config(config_file, opts)
    use_here(cfg)
    model, stages, batches, what = BUILDERS[cfg.TASK](cfg)
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))
    model.train()
    meter = Meter(stages)

    def loss(images: int) -> Tensor:
        torch.manual_seed(0)
        with precision.autocast(), EventStorage():
            outputs = model(batches(images))
        return torch.stack([v.float() for name, v in outputs.items() if name.startswith("loss")]).sum()

    loss(batch).backward()  # kernels are chosen and compiled
    kept = meter.kept(lambda: loss(batch))
    operations = meter.operations(lambda: loss(batch))
    seconds, step = meter.seconds(lambda: loss(batch), cfg.MODEL.DEVICE)
    counts = meter.parameters(model)
    rows = [
        (
            name,
            f"{counts[name] / 1e6:.2f}",
            f"{operations[name] / batch / 1e9:.2f}",
            f"{kept[name] / batch / 2**20:.0f}",
        )
        + ((f"{batch / seconds[name]:.1f}" if seconds[name] > 1e-5 else "-"),)
        for name in [*stages, REST]
    ]
    total = sum(operations.values()) / batch / 1e9, sum(kept.values()) / batch / 2**20
    rows.append(
        ("all", f"{sum(counts.values()) / 1e6:.2f}", f"{total[0]:.2f}", f"{total[1]:.0f}", f"{batch / step:.2f}")
    )
    heads = ("stage", "parameters, M", "GFLOP/image", "kept, MiB/image", "images/s")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    free = free_memory(cfg.MODEL.DEVICE)
    fits = max(int((SPARE * free - ADAMW * trained) / (total[1] * 2**20)), 0)
    return (
        f"{what}, {precision.name} on {device_name(cfg.MODEL.DEVICE)}\n\n"
        f"{tabulate(rows, heads, stralign='right', disable_numparse=True)}\n\n"
        f"{free / 2**30:.1f} GiB are free: about {fits} images a batch fit with AdamW"
        f"{'' if fits else '; set MODEL.ACTIVATION_CHECKPOINT True or smaller images'}. "
        "Larger batches: SOLVER.GRAD_ACCUM_STEPS."
    )


REST = "rest"  # what runs outside of the stages


class Meter:
    """Attributes what a pass costs to the stage that runs, the innermost one.

    Args:
        stages: objects by name, modules or not, and the methods that are a stage's work; one may lie in another.
    """

    def __init__(self, stages: Stages) -> None:
        self._modules = {name: owner for name, (owner, *_) in stages.items() if isinstance(owner, nn.Module)}
        self._running = [REST]
        self._read: Callable[[], float] = lambda: 0.0
        self._sums: dict[str, float] = defaultdict(float)
        self._mark = 0.0
        for name, (owner, *methods) in stages.items():
            for method in methods:
                setattr(owner, method, partial(self._run, name, getattr(owner, method)))

    def _run(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._turn(lambda: self._running.append(name))
        try:
            return method(*args, **kwargs)
        finally:
            self._turn(self._running.pop)

    def _turn(self, change: Callable[[], Any]) -> None:
        now = self._read()
        self._sums[self._running[-1]] += now - self._mark
        self._mark = now
        change()

    def _measure(self, read: Callable[[], float], run: Callable[[], Any]) -> dict[str, float]:
        self._read, self._sums, self._mark = read, defaultdict(float), read()
        run()
        self._turn(lambda: None)
        return self._sums

    def kept(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Return the bytes that each stage keeps for the backward pass, parameters not counted."""
        own = {p.untyped_storage().data_ptr() for stage in self._modules.values() for p in stage.parameters()}
        seen, total = set(own), [0.0]

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total[0] += storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            return self._measure(lambda: total[0], run)

    def operations(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Return the floating-point operations of each stage's forward pass."""
        with FlopCounterMode(display=False) as counter:
            return self._measure(lambda: float(counter.get_total_flops()), run)

    def seconds(self, run: Callable[[], Tensor], device: str) -> tuple[dict[str, float], float]:
        """Return the seconds of each stage's forward pass and of a whole forward and backward pass, fastest ones."""

        def clock() -> float:
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return time.perf_counter()

        best: dict[str, float] = defaultdict(lambda: float("inf"))
        for _ in range(REPEATS):
            losses: list[Tensor] = []
            start = clock()
            forward = self._measure(clock, lambda losses=losses: losses.append(run()))  # type: ignore[misc]
            losses[0].backward()
            for name, value in {**forward, "step": clock() - start}.items():
                best[name] = min(best[name], value)
        step = best.pop("step")
        return defaultdict(float, best), step

    def parameters(self, model: nn.Module) -> dict[str, int]:
        """Return the parameters of each stage, those of stages within it left out."""
        own = {name: {id(p): p.numel() for p in module.parameters()} for name, module in self._modules.items()}
        for name, module in self._modules.items():
            for other, inner in self._modules.items():
                if inner is not module and any(inner is m for m in module.modules()):
                    own[name] = {k: v for k, v in own[name].items() if k not in own[other]}
        counts = defaultdict(int, {name: sum(values.values()) for name, values in own.items()})
        counts[REST] = sum(p.numel() for p in model.parameters()) - sum(counts.values())
        return counts


def _assumed(cfg: CfgNode, fault: UserError) -> str:
    """Say that something is assumed because of the ``fault`` of absent data, or raise it where no data are named."""
    if not cfg.DATASETS.TRAIN:
        raise fault
    return f"assumed, since the data cannot be read ({fault})"


def _detector(cfg: CfgNode) -> tuple[nn.Module, Stages, Batches, str]:
    register_own(cfg.DATASETS)
    assumed = ""
    try:
        records = training_records(cfg)
    except UserError as error:
        records, assumed = [], f"; {_assumed(cfg, error)}"
    asked, cfg = cfg.MODEL.MASK_ON, settle(cfg, records)
    if assumed:
        cfg.defrost()
        # Of the data sets that need not be here to be known, COCO's alone have masks.
        metadata = [catalog.get_metadata(name).as_dict() for name in cfg.DATASETS.TRAIN]
        cfg.MODEL.MASK_ON = asked and all("thing_dataset_id_to_contiguous_id" in known for known in metadata)
    model = build_detector(cfg)
    stages: Stages = {
        "encoder": (model.backbone.encoder, "forward"),
        "pyramid": (model.backbone, "forward"),
        "proposals": (model.proposal_generator, "forward"),
        "heads": (model.roi_heads, "forward"),
    }
    keys = cfg.INPUT
    height = max(keys.MIN_SIZE_TRAIN)
    width = min(height * 4 // 3, keys.MAX_SIZE_TRAIN)
    if keys.LSJ.SIZE:
        height = width = keys.LSJ.SIZE

    def batches(images: int) -> list[dict[str, Any]]:
        generator = torch_generator(0, "analysis")
        return [_random_image(height, width, cfg, generator) for _ in range(images)]

    masks = "with" if cfg.MODEL.MASK_ON else "without"
    return model, stages, batches, f"detector {masks} masks, images of {height} x {width}{assumed}"


def _random_image(height: int, width: int, cfg: CfgNode, generator: torch.Generator) -> dict[str, Any]:
    """Return an image of noise with :data:`OBJECTS` boxes, as a mapper would."""
    size = torch.tensor([width, height])
    corners = torch.rand(OBJECTS, 2, 2, generator=generator).sort(dim=1).values * (size - 2)
    boxes = torch.cat([corners[:, 0], corners[:, 1] + 2], dim=1)
    instances = Instances((height, width), gt_boxes=Boxes(boxes))
    instances.gt_classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (OBJECTS,), generator=generator)
    if cfg.MODEL.MASK_ON:
        y, x = torch.arange(height)[:, None], torch.arange(width)
        inside = [(x >= b[0]) & (x < b[2]) & (y >= b[1]) & (y < b[3]) for b in boxes]
        instances.gt_masks = BitMasks(torch.stack(inside))
    image = torch.randint(256, (len(cfg.MODEL.PIXEL_MEAN), height, width), dtype=torch.uint8, generator=generator)
    return {"image": image, "height": height, "width": width, "instances": instances}


def _pretraining(cfg: CfgNode) -> tuple[nn.Module, Stages, Batches, str]:
    model = build_pretraining_model(cfg)
    stages: Stages = {
        "views": (model.views, "train"),
        "encoder": (model.encoder, "tokens", "forward"),
        "pretext heads": (model.task, "forward"),
    }
    side, loaded = cfg.PRETEXT.IMAGE_SIZE, cfg.INPUT.LOAD_SIZE or cfg.PRETEXT.IMAGE_SIZE
    shape = (len(cfg.MODEL.PIXEL_MEAN), loaded * 3 // 4, loaded)

    def batches(images: int) -> dict[str, Any]:
        generator = torch_generator(0, "analysis")
        pixels = torch.randint(256, (images, *shape), dtype=torch.uint8, generator=generator)
        sizes = torch.tensor([shape[1:]] * images)
        return {"images": pixels, "sizes": sizes, "keys": torch.arange(images)}

    return model, stages, batches, f"pre-training, views of {side} x {side}"


def _classifier(cfg: CfgNode) -> tuple[nn.Module, Stages, Batches, str]:
    assumed = ""
    try:
        classes = load_data(cfg, training=True).classes
    except UserError as error:
        classes, assumed = UNKNOWN_CLASSES, f"; their number is {_assumed(cfg, error)}"
    model = build_classifier(cfg, classes)
    model.mix = None  # pairs of images cost nothing, and may be a pass of one
    stages: Stages = {
        "augmentation": (model.augmentation, "train"),
        "encoder": (model.network.encoder, "summarised"),
        "head": (model.network.head, "forward"),
    }
    if model.pretext is not None:
        stages["pretext heads"] = (model.pretext, "forward")
    side = cfg.INPUT.VIEW.SIZE

    def batches(images: int) -> dict[str, Any]:
        generator = torch_generator(0, "analysis")
        pixels = torch.randint(256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
        labels = torch.randint(classes, (images,), generator=generator)
        sizes = torch.tensor([(side, side)] * images)
        return {"images": pixels, "labels": labels, "sizes": sizes, "keys": torch.arange(images)}

    return model, stages, batches, f"classifier of {classes} classes, images of {side} x {side}{assumed}"


BUILDERS = {"detection": _detector, "pretrain": _pretraining, "classification": _classifier}


if __name__ == "__main__":
    sys.exit(main())
