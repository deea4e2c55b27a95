"""Encoder files: safetensors files with the tensors and the config of an encoder."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relvit_d2 import __version__
from relvit_d2.conversion.checkpoint_file import damaged, is_damaged
from relvit_d2.conversion.converted import random_image, relative_difference
from relvit_d2.conversion.timm_hub import is_published, read_published
from relvit_d2.encoders.base import Encoder, build_encoder
from relvit_d2.utils.digest import content_digest
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing
from relvit_d2.utils.printing import printable

MAX_HEADER = 2**24  # bytes of names, shapes and metadata
MAX_GRID = 2**10  # patches along a side of the images that an encoder is built for

ENOUGH = 0.9  # minimum fraction of matching values

logger = logging.getLogger(__name__)


def save_encoder(encoder: Encoder, path: Path, info: dict[str, Any]) -> None:
    """Write ``encoder`` atomically.

    Args:
        path: the file, usually ``encoder.safetensors``.
        info: further metadata (pixel mean and std, image size, iteration, pretext settings): JSON values.
    """
    metadata = {"encoder": encoder.to_config(), "version": __version__, **info}
    tensors = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts["digest"] = json.dumps(content_digest([tensors, texts]))
    with appearing(path) as part:
        save_file(tensors, str(part), texts)


def read_encoder(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of an encoder file, or of the ``encoder.safetensors`` in a folder.

    Raises:
        UserError: if the file is missing or damaged, is not a safetensors file, or was not written by
            :func:`save_encoder`.
    """
    path = Path(path, "encoder.safetensors") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(
            f"weights file '{path}' does not exist; pre-train first, give the path of an encoder.safetensors, or '' "
            "for random weights"
        )
    try:
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if MAX_HEADER < header <= path.stat().st_size:
            raise UserError(
                f"'{path}' has {header:,} bytes of metadata, above the limit of {MAX_HEADER:,}: write it again"
            )
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        if is_damaged(path):
            raise UserError(damaged(path)) from error
        raise UserError(
            f"'{path}' is not a readable safetensors file ({error}); write it again with relvit-d2 pretrain"
        ) from error
    if "encoder" not in metadata:
        raise UserError(
            f"'{path}' contains tensors but no description of an encoder; "
            "give an encoder.safetensors of relvit-d2 pretrain"
        )
    digest = metadata.pop("digest", "")
    if not digest:
        logger.info(f"'{path}' has no digest, since an earlier version wrote it: changed values are not detected")
    elif digest != json.dumps(content_digest([tensors, metadata])):
        raise UserError(damaged(path))
    try:
        content = {key: json.loads(value) for key, value in metadata.items()}
        config = content["encoder"]
        valid = isinstance(config["name"], str) and config["img_size"] <= MAX_GRID * config["patch_size"]
    except (ValueError, RecursionError, LookupError, TypeError):
        valid = False
    if not valid:
        raise UserError(
            f"the metadata of '{path}' do not describe an encoder with a name and at most {MAX_GRID} patches per side: "
            f"{metadata['encoder'][:200]}; write it again with relvit-d2 pretrain"
        )
    return tensors, content


def read_weights(source: str | Path, encoder: Encoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of an encoder file, or of timm's pre-trained weights ``timm:NAME``."""
    return read_published(str(source), encoder) if is_published(str(source)) else read_encoder(Path(source))


def build_described(source: str | Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Encoder:
    """Build the encoder of a file from the metadata ``encoder`` and load the file's tensors.

    Raises:
        UserError: the tensors do not have the names and shapes of that encoder, whose size is thus bounded by the file.
    """
    try:
        with torch.device("meta"):  # takes no memory
            described = build_encoder(**config).state_dict()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"the metadata of '{source}' do not describe an encoder ({str(error)[:200]}); write it again"
        ) from error
    shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (described, tensors)]
    if odd := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise UserError(
            f"'{source}' does not contain the encoder of its metadata ({', '.join(odd[:3])}); write it again"
        )
    encoder = build_encoder(**config)
    encoder.load_state_dict(tensors)
    return encoder


@dataclass
class MatchReport:
    """The names of matching and other tensors of a file and of the encoder that loaded it."""

    path: str
    metadata: dict[str, Any]
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    share: float = 0.0

    def __str__(self) -> str:
        lines = [f"weights '{self.path}': {self.share:.1%} of the encoder's values matched"]
        for what in ("loaded", "resized", "fresh", "missing", "unexpected"):
            names = getattr(self, what)
            shown = "" if what == "loaded" or not names else ": " + printable(", ".join(names[:6]))
            lines.append(f"  {what:<10} {len(names):>4}{shown}{', ...' if shown and len(names) > 6 else ''}")
        return "\n".join(lines)


def load_encoder_weights(encoder: Encoder, source: str | Path) -> MatchReport:
    """Load weights into ``encoder``.

    Positions and patch embeddings of another size are resized. Parameters that the source does not have by its config
    count as fresh, not as missing.

    Args:
        encoder: the encoder; unchanged if an error is raised.
        source: an encoder file, or ``timm:NAME``.

    Raises:
        UserError: if the weights are of another encoder, or less than 90 % of the values match.
    """
    tensors, metadata = read_weights(source, encoder)
    config = metadata["encoder"]
    if config["name"] != encoder.name:
        raise UserError(
            f"'{source}' contains weights of encoder {config['name']}, but the config has {encoder.name}; "
            f"set MODEL.ENCODER.NAME {config['name']} or give other weights"
        )
    for key, fix in (
        ("patch_size", f"set MODEL.ENCODER.PATCH_SIZE {config.get('patch_size')}"),
        ("in_chans", f"build it with in_chans={config.get('in_chans')}"),
    ):
        if key in config and not encoder.accepts(key, config[key]):
            raise UserError(
                f"'{source}' contains weights for {key} {config[key]}, this encoder has {encoder.arguments[key]}: "
                f"{fix} or give other weights"
            )
    if config.get("rel_pos"):
        for key in ("window", "global_blocks"):
            if encoder.arguments[key] != config[key] and (key == "window" or config["window"]):
                raise UserError(
                    f"'{source}' contains relative positions for {key} {config[key]}, this encoder has "
                    f"{encoder.arguments[key]}: set MODEL.ENCODER.{key.upper()} {config[key]} or give other weights"
                )
    fresh = encoder.fresh(config)
    report = MatchReport(str(source), metadata, fresh=sorted(fresh))
    expected = {name: value for name, value in encoder.state_dict().items() if name not in fresh}
    found: dict[str, Tensor] = {}
    for name, value in expected.items():
        if name not in tensors:
            report.missing.append(name)
        elif tensors[name].shape == value.shape:
            found[name] = tensors[name]
            report.loaded.append(name)
        elif (adapted := encoder.adapt(name, tensors[name], config)) is not None:
            found[name] = adapted
            report.resized.append(name)
        else:
            report.missing.append(name)
    report.unexpected = [name for name in tensors if name not in encoder.state_dict()]
    total = sum(value.numel() for value in expected.values())
    report.share = sum(value.numel() for value in found.values()) / max(total, 1)
    if report.share < ENOUGH:
        raise UserError(
            f"only {report.share:.1%} of the encoder's values match '{source}' ({ENOUGH:.0%} are needed; "
            f"first missing: {', '.join(report.missing[:3])}); give weights of the same encoder"
        )
    encoder.load_state_dict(found, strict=False)
    return report


@torch.no_grad()
def feature_difference(encoder: Encoder, source: str | Path) -> float:
    """Compare ``encoder``, after loading ``source``, with the original encoder, on one image.

    The original encoder is built from the metadata of the source, with the attention windows of ``encoder``, on which
    no weights depend but those of relative positions. Parameters that only one of the two encoders has are set to zero.
    If the patches of ``encoder`` are larger, it gets the image with enlarged patches; if only ``encoder`` is grayscale,
    so is the image.

    Returns:
        The largest absolute difference of a feature, relative to the largest absolute feature.
    """
    tensors, metadata = read_weights(source, encoder)
    config = metadata["encoder"]
    windows = {key: value for key, value in encoder.arguments.items() if key in ("window", "global_blocks")}
    original = build_described(source, tensors, config | windows)
    device = next(encoder.parameters()).device
    original = original.to(device).eval()
    size, patch = encoder.arguments["img_size"], encoder.arguments["patch_size"]
    old_patch = original.arguments["patch_size"]
    image = random_image(size if patch == old_patch else size // patch * old_patch, encoder.arguments["in_chans"])
    was_training = encoder.training
    encoder.eval()
    with encoder.without(encoder.fresh(config)):
        maps = encoder(enlarge_patches(image, old_patch, patch).to(device))
    encoder.train(was_training)
    with original.without(encoder.lacks(config)):
        expected = original(image.expand(-1, original.arguments["in_chans"], -1, -1).to(device))
    return max(relative_difference(maps.get(name, maps[encoder.last]), value) for name, value in expected.items())


def enlarge_patches(images: Tensor, old: int, new: int) -> Tensor:
    """Resize (bicubic) each patch of ``old`` pixels of images ``(B, C, H, W)``, whole patches, to ``new`` pixels."""
    if old == new:
        return images
    rows, cols = images.shape[-2] // old, images.shape[-1] // old
    patches = images.unflatten(3, (cols, old)).unflatten(2, (rows, old)).transpose(3, 4)  # B, C, rows, cols, y, x
    shape = patches.shape[:4]
    patches = F.interpolate(patches.flatten(0, 3)[:, None], size=(new, new), mode="bicubic", antialias=True)
    return patches.view(*shape, new, new).transpose(3, 4).flatten(4, 5).flatten(2, 3)
