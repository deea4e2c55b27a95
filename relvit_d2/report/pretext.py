"""One picture of what pre-training asks and what a model answers."""

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from relvit_d2.data.detection.custom import register_custom
from relvit_d2.data.detection.mapper import ImageReader, pad_images
from relvit_d2.data.images.batches import Images
from relvit_d2.engine.weights import load_trained, run_config
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.targets import RELATIONS, all_pairs, pair_relation, positions
from relvit_d2.pretext.task import PositionTask, RelationTask
from relvit_d2.pretext.views import Views, permute_patches
from relvit_d2.pretraining.config import PRETRAINING
from relvit_d2.pretraining.model import PretrainingModel, build_pretraining_model
from relvit_d2.pretraining.run import image_files
from relvit_d2.utils.files import appearing
from relvit_d2.utils.randomness import image_keys

WORDS = ("above left", "above", "above right", "left", "itself", "right", "below left", "below", "below right")
CELL = 2.1  # inches of a panel's side


class PretextRow(NamedTuple):
    """One image; pictures are ``(h, w, 3)`` uint8 RGB, maps ``(rows, cols)`` relation classes."""

    image: np.ndarray  # the whole image, its largest centred crop
    view: np.ndarray  # what the encoder was given
    rebuilt: np.ndarray | None  # the view's patches where the position head puts them; None without that head
    placed: float  # share of the patches that it puts where they belong, 0..1
    truth: np.ndarray  # where every patch lies, seen from the one in the middle, each at its own place
    answer: np.ndarray | None  # what the relation head says; None without that head
    right: float  # share of the answers that are right, 0..1


@torch.no_grad()
def pretext_rows(model: PretrainingModel, images: Tensor, sizes: Tensor, keys: Tensor) -> list[PretextRow]:
    """Make random training views of a batch of images and compare the model's answers with the targets.

    Args:
        model: in evaluation mode.
        images, sizes: as of :func:`relvit_d2.data.detection.mapper.pad_images`, on the model's device.
        keys: ``(B,)`` int64, see :meth:`relvit_d2.pretext.views.Views.train`.
    """
    config = model.views.config
    plain, _ = Views(config.plain()).evaluate(images, sizes, torch.zeros(len(images), dtype=torch.int64))
    pixels, layout = model.views.train(images, sizes, keys)
    tokens = model.tokens(pixels)
    tasks = dict(model.task.named_tasks())
    relations = all_pairs(pair_relation, layout)
    cells = positions(layout)
    middle = (cells == positions(PatchLayout.full(1, layout.grid)).flatten()[_middle(layout.grid)]).long().argmax(1)
    rows = []
    for b in range(len(images)):
        truth = relations[b, :, middle[b]]
        answer, right = None, 0.0
        if isinstance(task := tasks.get("relation"), RelationTask):
            q, k = task.head(tokens[b : b + 1])
            said = torch.einsum("mnd,md->mn", q[0].float(), k[0, :, middle[b]].float()).argmax(0)
            answer, right = _at_their_places(said, cells[b], layout.grid), (said == truth).float().mean().item()
        rebuilt, placed = None, 0.0
        if isinstance(task := tasks.get("position"), PositionTask):
            cell = assign(task.head(tokens[b]).float().log_softmax(1))
            placed = (cell == cells[b].cpu()).float().mean().item()
            rebuilt = _picture(_moved(pixels[b], cell, config.patch_size), config.mean, config.std)
        rows.append(
            PretextRow(
                _picture(plain[b], config.mean, config.std),
                _picture(pixels[b], config.mean, config.std),
                rebuilt,
                placed,
                _at_their_places(truth, cells[b], layout.grid),
                answer,
                right,
            )
        )
    return rows


def sheet_of_run(folder: Path, count: int = 4) -> Image.Image:
    """Return the sheet of a pre-training's last checkpoint and ``count`` of its images, held out ones where it has any.

    Raises:
        UserError: if the checkpoint or the images are gone.
    """
    cfg = run_config(folder, "", [], PRETRAINING)
    model = build_pretraining_model(cfg)
    load_trained(cfg, model, folder)
    register_custom(cfg.DATASETS, labels=False)
    part = "TEST" if cfg.DATASETS.TEST else "TRAIN"
    how = {"skip_missing": cfg.DATASETS.SKIP_MISSING, "synset_file": cfg.DATASETS.SYNSETS}
    files = image_files(f"DATASETS.{part}", cfg.DATASETS[part], **how)
    rows = rows_of_files(cfg, model, files, count)
    return pretext_sheet(rows, "what pre-training asks and what it answers")


def rows_of_files(cfg: CfgNode, model: PretrainingModel, files: Images, count: int) -> list[PretextRow]:
    """Return :func:`pretext_rows` of ``count`` of ``files``, spread over them."""
    reader = ImageReader.of(cfg)
    chosen = files[:: max(len(files) // count, 1)][:count]
    batch = pad_images([file if isinstance(file, Tensor) else reader(file) for file in chosen])
    images = batch["images"].to(next(model.parameters()).device)
    was_training = model.training
    keys = image_keys(cfg.SEED, "picture", torch.arange(len(images)))
    rows = pretext_rows(model.eval(), images, batch["sizes"], keys)
    model.train(was_training)
    return rows


def assign(scores: Tensor) -> Tensor:
    """Give every token a cell of its own, the surest first.

    Args:
        scores: ``(N, N)``, tokens by cells.

    Returns:
        ``(N,)`` int64 on the CPU, a permutation.
    """
    free = scores.detach().cpu().clone()
    cells = torch.empty(len(free), dtype=torch.int64)
    for _ in range(len(free)):
        token, cell = divmod(int(free.argmax()), free.shape[1])
        cells[token] = cell
        free[token], free[:, cell] = -torch.inf, -torch.inf
    return cells


def draw_pretext(rows: Sequence[PretextRow], path: str | Path, title: str) -> None:
    """Write the sheet of :func:`pretext_sheet` as a PNG, which appears whole or not at all."""
    sheet = pretext_sheet(rows, title)
    with appearing(Path(path)) as part:
        sheet.save(part, format="PNG")


def pretext_sheet(rows: Sequence[PretextRow], title: str) -> Image.Image:
    """Return a picture, a line an image: the image, its view, the view put together again, true and answered relations.

    Args:
        rows: 1 to about 12 images.
        title: a line above the sheet.

    Raises:
        ValueError: ``rows`` is empty.
    """
    if not rows:
        raise ValueError("pretext_sheet needs at least one image")
    figure = Figure(figsize=(5 * (CELL + 0.25) + 1.6, len(rows) * (CELL + 0.45) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(len(rows), 5, squeeze=False)
    colors = ListedColormap([_color(index) for index in range(len(RELATIONS))])
    for line, row in zip(panels, rows, strict=True):
        middle = _middle(row.truth.shape)
        rebuilt = "no position head" if row.rebuilt is None else f"put together again: {row.placed:.0%} in place"
        answer = "no relation head" if row.answer is None else f"its answer: {row.right:.0%} right"
        captions = ("image", "what the encoder sees", rebuilt, "where patches lie from ▣", answer)
        for panel, caption, content in zip(
            line, captions, (row.image, row.view, row.rebuilt, row.truth, row.answer), strict=True
        ):
            panel.set_title(caption, fontsize=9)
            panel.set_axis_off()
            if content is not None and content.ndim == 3:
                panel.imshow(content, interpolation="nearest")
            elif content is not None:
                panel.imshow(content, cmap=colors, vmin=-0.5, vmax=len(RELATIONS) - 0.5, interpolation="nearest")
                top, left = divmod(middle, content.shape[1])
                panel.add_patch(Rectangle((left - 0.5, top - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.6))
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=_color(index), edgecolor="gray", linewidth=0.5)
        for index in range(len(RELATIONS))
    ]
    figure.legend(handles, WORDS, loc="outside right center", fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)


def _middle(grid: tuple[int, ...]) -> int:
    return grid[0] // 2 * grid[1] + grid[1] // 2


def _color(relation: int) -> tuple[float, float, float]:
    """Colours of opposite directions are opposite; the patch itself is white."""
    row, col = divmod(relation, 3)
    if row == col == 1:
        return (1.0, 1.0, 1.0)
    return colorsys.hsv_to_rgb((np.arctan2(row - 1, col - 1) / (2 * np.pi)) % 1, 0.55, 0.92)


def _at_their_places(values: Tensor, cells: Tensor, grid: tuple[int, int]) -> np.ndarray:
    placed = torch.empty_like(values)
    placed[cells] = values
    return placed.view(grid).cpu().numpy()


def _moved(view: Tensor, cell: Tensor, patch: int) -> Tensor:
    """Put the patch of slot i into the cell ``cell[i]`` of the ``(3, h, w)`` view."""
    return permute_patches(view[None], patch, cell.argsort()[None].to(view.device))[0]


def _picture(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Turn normalised ``(C, h, w)`` pixels into a picture: RGB, or the first channel in gray."""
    by, plus = (pixels.new_tensor(x)[:, None, None] for x in (std, mean))
    values = pixels * by + plus
    return (
        (values if len(values) == 3 else values[:1].expand(3, -1, -1))
        .clamp(0, 1)
        .mul(255)
        .round()
        .byte()
        .permute(1, 2, 0)
        .cpu()
        .numpy()
    )
