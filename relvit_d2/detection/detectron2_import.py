"""Import of a detector of Detectron2, with a config."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml  # type: ignore[import-untyped]
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.modeling import Backbone, GeneralizedRCNN, SwinTransformer
from torch import nn

from relvit_d2.config.config_file import load_config, override_words
from relvit_d2.conversion.converted import checked_difference, random_image
from relvit_d2.conversion.detectron2_checkpoint import Detectron2Checkpoint, config_keys, find_detector
from relvit_d2.conversion.detectron2_detector import adapt_checkpoint
from relvit_d2.data.detection import catalog
from relvit_d2.detection.config import DETECTION
from relvit_d2.detection.model import build_detector
from relvit_d2.encoders.plain import evenly_spaced
from relvit_d2.encoders.swin import SWIN_SIZES
from relvit_d2.encoders.vit import VITDET_SIZES
from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.digest import content_digest
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing, make_folder, write_json, write_text

_MODELS = Path(detectron2.__file__).parent / "model_zoo/configs/common/models"
_BASE = "configs/base/detection.yaml"
_SWIN_SIDE = 256  # pixels: Detectron2's Swin differs on maps that are not larger than a window
_COCO = "coco_2017_val"  # the published detectors have its classes


def import_detector(source: Path, output: Path, allow_pickle: bool) -> str:
    """Write a checkpoint of this package, and beside it ``config.yaml`` and, for COCO's classes, ``classes.json``.

    Args:
        source: a checkpoint of Detectron2's ViTDet or R-CNN on Swin, ``.pth`` or ``.pkl``.
        output: the file to write, ``.pth``.
        allow_pickle: read pickles, which can run arbitrary code.

    Returns:
        A report, as text.

    Raises:
        UserError: the file is not such a checkpoint, the features of an image differ from those of Detectron2's model,
            or the folder of ``output`` has a config already.
    """
    if output.suffix != ".pth":
        raise UserError(f"'{output}' does not end in .pth: rename it")
    config = output.with_name("config.yaml")
    if config.exists():
        raise UserError(f"'{config}' exists: write '{output.name}' into a folder without a run")
    content = _read(source, allow_pickle)
    found = find_detector(str(source), content["model"])
    if found is None:
        first = ", ".join(list(content["model"])[:3])
        raise UserError(
            f"'{source}' is neither a ViTDet nor an R-CNN on Swin of Detectron2 (first tensors: {first}): give another "
            "checkpoint"
        )
    keys = config_keys(found)
    cfg = load_config(
        _BASE,
        override_words(keys | {"MODEL.ROI_HEADS.NUM_CLASSES": found.classes, "MODEL.DEVICE": "cpu"}),
        {DETECTION.name: DETECTION},
    )
    model = build_detector(cfg).eval()
    report = adapt_checkpoint(str(source), content, model.state_dict(), partial(get_key, cfg), None)
    _load(model, content["model"], source)
    difference = _verify(model, found, keys)
    coco = list(catalog.get_metadata(_COCO).thing_classes)
    data: dict[str, Any] = {"model": model.state_dict()}
    if found.classes == len(coco):
        data["class_names"] = coco
    data["digest"] = content_digest(data)
    make_folder(output.parent)
    with appearing(output) as part:
        torch.save(data, part)
    if "class_names" in data:
        write_json(output.with_name("classes.json"), coco)
    write_text(config, _yaml(keys | {"MODEL.WEIGHTS": str(output.resolve())}))
    classes = f"{found.classes} classes" + (", taken to be COCO's" if "class_names" in data else " without names")
    return (
        f"{report}\n{classes}\nfeatures of a random image agree with Detectron2's model: relative difference "
        f"{difference:.1e}\nwritten: {output}, {config}"
    )


def _read(source: Path, allow_pickle: bool) -> dict[str, Any]:
    if source.suffix == ".pkl" and not allow_pickle:
        raise UserError(
            f"'{source}' is a pickle; unpickling can run arbitrary code: if you trust the source, add --allow-pickle"
        )
    if not source.is_file():
        raise UserError(f"weights file '{source}' does not exist; give a .pth or .pkl file")
    problems: list[str] = []
    content = Checkpointer(nn.Module(), allow_pickle=allow_pickle).read_intact(str(source), problems)
    if content is None:
        raise UserError(problems[0].replace("set MODEL.ALLOW_PICKLE True", "add --allow-pickle"))
    return content


def _load(model: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    state = model.state_dict()
    odd = [n for n in {**state, **tensors} if n not in tensors or n not in state or state[n].shape != tensors[n].shape]
    if odd:
        raise UserError(
            f"'{source}' has other tensors than a detector of its size ({', '.join(odd[:3])}), which is not supported: "
            "give another checkpoint"
        )
    model.load_state_dict(tensors)


@torch.no_grad()
def _verify(model: GeneralizedRCNN, found: Detectron2Checkpoint, keys: dict[str, Any]) -> float:
    """Compare the levels of the pyramid with those of Detectron2's model; return the largest relative difference."""
    image = random_image(keys.get("MODEL.ENCODER.IMG_SIZE", _SWIN_SIDE), 3)
    levels, expected = model.backbone(image), reference_pyramid(found, keys)(image)
    return max(
        checked_difference(
            levels[name], value, f"'{found.path}' differ from those of Detectron2's model", "give another checkpoint"
        )
        for name, value in expected.items()
    )


def reference_pyramid(found: Detectron2Checkpoint, keys: dict[str, Any]) -> Backbone:
    """Build Detectron2's backbone from its own config, with the tensors of a checkpoint.

    Args:
        found: the checkpoint.
        keys: its config keys, of :func:`relvit_d2.conversion.detectron2_checkpoint.config_keys`.
    """
    tensors = {n.removeprefix("backbone."): v for n, v in found.tensors.items() if n.startswith("backbone.")}
    simple = keys["MODEL.PYRAMID.NAME"] == "simple"
    file = "mask_rcnn_vitdet.py" if simple else "mask_rcnn_fpn.py"
    backbone = LazyConfig.load(str(_MODELS / file)).model.backbone
    (set_vit if simple else set_swin)(backbone, keys)
    if (positions := tensors.get("net.pos_embed")) is not None:
        count = positions.shape[1]
        backbone.net.pretrain_use_cls_token = bool(round((count - 1) ** 0.5) ** 2 == count - 1)
        grid = round((count - backbone.net.pretrain_use_cls_token) ** 0.5)
        backbone.net.pretrain_img_size = grid * backbone.net.patch_size
    built = instantiate(backbone).eval()
    # In the state of a Swin, relative position indices are buffers, which are computed.
    computed = {name: value for name, value in built.state_dict().items() if name.endswith("relative_position_index")}
    built.load_state_dict(tensors | computed)
    return built


def set_swin(backbone: Any, keys: dict[str, Any]) -> None:
    """Set a Swin as the encoder in the lazy config of an FPN of Detectron2, in place."""
    width, depths, heads = SWIN_SIZES[re.split("[:_]", keys["MODEL.ENCODER.NAME"])[1]]
    backbone.bottom_up = LazyCall(SwinTransformer)(
        embed_dim=width, depths=list(depths), num_heads=list(heads), drop_path_rate=0.0
    )
    backbone.in_features = [f"p{stage}" for stage in range(len(depths))]
    backbone.norm, backbone.out_channels = keys["MODEL.PYRAMID.NORM"], keys["MODEL.PYRAMID.OUT_CHANNELS"]
    backbone.square_pad = keys["MODEL.PYRAMID.SIZE_DIVISIBILITY"]


def set_vit(backbone: Any, keys: dict[str, Any]) -> None:
    """Set the size of the encoder in the lazy config of Detectron2's ViTDet backbone, in place."""
    net = backbone.net
    encoder = {name.rpartition(".")[2]: value for name, value in keys.items() if name.startswith("MODEL.ENCODER.")}
    size = VITDET_SIZES[encoder["NAME"].partition(":")[2]]
    net.embed_dim, net.depth, net.num_heads = size
    net.img_size, net.patch_size, net.drop_path_rate = encoder["IMG_SIZE"], encoder["PATCH_SIZE"], 0.0
    net.use_abs_pos, net.window_size = encoder["POS_EMBED"], encoder["WINDOW"]
    count, depth = encoder["GLOBAL_BLOCKS"], size[1]
    across = evenly_spaced(count, depth)
    net.window_block_indexes = [index for index in range(depth) if index not in across]
    backbone.square_pad = encoder["IMG_SIZE"]
    backbone.out_channels = keys["MODEL.PYRAMID.OUT_CHANNELS"]


def _yaml(keys: dict[str, Any]) -> str:
    """Return the text of a config with the keys of the project's base config, overridden by ``keys``."""
    content = yaml.safe_load(find_config(_BASE).read_text(encoding="utf-8"))
    for name, value in keys.items():
        node = content
        *groups, last = name.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return "# Config keys of the checkpoint beside this file. Add DATASETS to train.\n" + yaml.safe_dump(content)
