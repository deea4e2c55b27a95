"""Encoders on disk: one safetensors file with the tensors and what they mean."""

import json
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
from relvit_d2.conversion.timm_hub import is_published, read_published
from relvit_d2.encoders.base import Encoder, build_encoder
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing
from relvit_d2.utils.printing import printable

MAX_HEADER = 2**24  # bytes of names, shapes and metadata
MAX_GRID = 2**10  # patches along a side of the images that an encoder is built for

# Below this share of matched values, something else was loaded than meant.
ENOUGH = 0.9


def save_encoder(encoder: Encoder, path: Path, info: dict[str, Any]) -> None:
    """Write ``encoder`` with its metadata; the file appears whole or not at all.

    Args:
        encoder: what to write; its tensors go under the encoder's own names.
        path: the file, usually ``encoder.safetensors``.
        info: further metadata (pixel mean and std, image size, iteration, pretext settings), JSON values.
    """
    metadata = {"encoder": encoder.to_config(), "version": __version__, **info}
    tensors = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    with appearing(path) as part:
        save_file(tensors, str(part), {key: json.dumps(value) for key, value in metadata.items()})


def read_encoder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of an encoder file.

    Raises:
        UserError: if the file is missing, is no safetensors file, or is not one of :func:`save_encoder`.
    """
    if not path.is_file():
        raise UserError(
            f"weights file '{path}' does not exist; pre-train first, or give the path of an encoder.safetensors, or '' "
            "for none"
        )
    try:
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if MAX_HEADER < header <= path.stat().st_size:
            raise UserError(
                f"'{path}' has {header:,} bytes of metadata, above the limit of {MAX_HEADER:,}: write it anew"
            )
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        if is_damaged(path):
            raise UserError(damaged(path)) from error
        raise UserError(
            f"'{path}' is not a readable safetensors file ({error}); write it anew with relvit-d2 pretrain"
        ) from error
    if "encoder" not in metadata:
        raise UserError(
            f"'{path}' holds tensors but no description of an encoder; "
            "use the encoder.safetensors that relvit-d2 pretrain writes"
        )
    try:
        content = {key: json.loads(value) for key, value in metadata.items()}
        config = content["encoder"]
        valid = isinstance(config["name"], str) and config["img_size"] <= MAX_GRID * config["patch_size"]
    except (ValueError, RecursionError, LookupError, TypeError):
        valid = False
    if not valid:
        raise UserError(
            f"the metadata of '{path}' do not describe an encoder with a name and at most {MAX_GRID} patches per side: "
            f"{metadata['encoder'][:200]}; write it anew with relvit-d2 pretrain"
        )
    return tensors, content


def read_weights(source: str | Path, encoder: Encoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of a file of :func:`save_encoder`, or of timm's published weights ``timm:NAME``.

    Raises:
        UserError: see :func:`read_encoder` and :func:`relvit_d2.conversion.timm_hub.read_published`.
    """
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
            f"the metadata of '{source}' do not describe an encoder ({str(error)[:200]}); write it anew"
        ) from error
    shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (described, tensors)]
    if odd := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise UserError(
            f"'{source}' does not hold the encoder that its metadata describes ({', '.join(odd[:3])}); write it anew"
        )
    encoder = build_encoder(**config)
    encoder.load_state_dict(tensors)
    return encoder


@dataclass
class MatchReport:
    """What became of every tensor of a file and of every parameter of the encoder it went into."""

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


def load_encoder(encoder: Encoder, source: str | Path) -> MatchReport:
    """Load weights into ``encoder`` and say what matched.

    Tensors of another size are resized where the encoder knows how (position and patch embeddings).
    Parameters that the file cannot hold by design count as fresh, not as missing.

    Args:
        encoder: what the weights go into.
        source: an encoder file, or ``timm:NAME`` (see :func:`read_weights`).

    Raises:
        UserError: if the weights are of another encoder, or fewer than 90 % of the values match. The encoder
            is left untouched then.
    """
    tensors, metadata = read_weights(source, encoder)
    config = metadata["encoder"]
    if config["name"] != encoder.name:
        raise UserError(
            f"'{source}' holds weights of encoder {config['name']}, the config asks for {encoder.name}; "
            f"set MODEL.ENCODER.NAME {config['name']} or give other weights"
        )
    for key, mend in (
        ("patch_size", f"set MODEL.ENCODER.PATCH_SIZE {config.get('patch_size')}"),
        ("in_chans", f"build it with in_chans={config.get('in_chans')}"),
    ):
        if key in config and not encoder.accepts(key, config[key]):
            raise UserError(
                f"'{source}' holds weights for {key} {config[key]}, this encoder has {encoder.arguments[key]}: "
                f"{mend} or give other weights"
            )
    fresh = encoder.fresh(config)
    report = MatchReport(str(source), metadata, fresh=sorted(fresh))
    own = encoder.state_dict()
    found: dict[str, Tensor] = {}
    for name, value in own.items():
        if name in fresh:
            continue
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
    report.unexpected = [name for name in tensors if name not in own]
    wanted = sum(value.numel() for name, value in own.items() if name not in fresh)
    report.share = sum(value.numel() for value in found.values()) / max(wanted, 1)
    if report.share < ENOUGH:
        raise UserError(
            f"only {report.share:.1%} of the encoder's values match '{source}' ({ENOUGH:.0%} are needed; "
            f"first missing: {', '.join(report.missing[:3])}); give weights of this very encoder"
        )
    encoder.load_state_dict(found, strict=False)
    return report


@torch.no_grad()
def feature_difference(encoder: Encoder, source: str | Path) -> float:
    """Compare ``encoder`` with the encoder that ``source`` describes, on one image.

    The encoder of the source is built anew from its own metadata, with attention in the windows of ``encoder``, which
    no weight knows of. Parameters that are fresh in ``encoder`` are zero during the comparison, since the source's
    encoder lacks them; so are those of the source that ``encoder`` leaves out. Where the patches of ``encoder`` are
    larger, it sees the image with every patch enlarged; where it sees gray and the source colour, the image is gray.

    Returns:
        The largest absolute difference of a feature, relative to the features' largest absolute value.
    """
    tensors, metadata = read_weights(source, encoder)
    config = metadata["encoder"]
    windows = {key: value for key, value in encoder.arguments.items() if key in ("window", "global_blocks")}
    theirs = build_described(source, tensors, config | windows)
    device = next(encoder.parameters()).device
    theirs = theirs.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    size, patch = encoder.arguments["img_size"], encoder.arguments["patch_size"]
    if patch != theirs.arguments["patch_size"]:
        size = size // patch * theirs.arguments["patch_size"]
    image = torch.randn(1, encoder.arguments["in_chans"], size, size, generator=generator)
    was_training = encoder.training
    encoder.eval()
    with encoder.without(encoder.fresh(config)):
        ours = encoder(enlarge_patches(image, theirs.arguments["patch_size"], patch).to(device))
    encoder.train(was_training)
    with theirs.without(encoder.lacks(config)):
        expected = theirs(image.expand(-1, theirs.arguments["in_chans"], -1, -1).to(device))
    pairs = [(ours[name if name in ours else encoder.last], value) for name, value in expected.items()]
    return max(((value - wanted).abs().max() / wanted.abs().max()).item() for value, wanted in pairs)


def enlarge_patches(images: Tensor, old: int, new: int) -> Tensor:
    """Resize (bicubic) each patch of ``old`` pixels of images ``(B, C, H, W)``, whole patches, to ``new`` pixels."""
    if old == new:
        return images
    rows, cols = images.shape[-2] // old, images.shape[-1] // old
    patches = images.unflatten(3, (cols, old)).unflatten(2, (rows, old)).transpose(3, 4)  # B, C, rows, cols, y, x
    shape = patches.shape[:4]
    patches = F.interpolate(patches.flatten(0, 3)[:, None], size=(new, new), mode="bicubic", antialias=True)
    return patches.view(*shape, new, new).transpose(3, 4).flatten(4, 5).flatten(2, 3)
