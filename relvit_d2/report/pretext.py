"""Contact sheet of pre-training views with the targets and a model's predictions."""

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
from relvit_d2.report.predictions import in_rgb
from relvit_d2.utils.files import appearing
from relvit_d2.utils.randomness import image_keys

LABELS = ("above left", "above", "above right", "left", "same patch", "right", "below left", "below", "below right")
PANEL = 2.1  # inches of a panel's side


class PretextRow(NamedTuple):
    """One image; pictures are ``(h, w, 3)`` uint8 RGB, maps ``(rows, columns)`` relation classes."""

    image: np.ndarray  # the largest centred crop of the image
    view: np.ndarray  # the encoder's input
    rebuilt: np.ndarray | None  # the patches at the positions that the position head predicts; None without that head
    placed: float  # fraction of correct positions, 0..1
    truth: np.ndarray  # relation of each patch to the one in the middle, at the position of the patch
    answer: np.ndarray | None  # the relation head's prediction of it; None without that head
    right: float  # fraction of correct predictions, 0..1


@torch.no_grad()
def pretext_rows(model: PretrainingModel, images: Tensor, sizes: Tensor, keys: Tensor) -> list[PretextRow]:
    """Make random training views of a batch of images and compare the model's predictions with the targets.

    Args:
        model: in evaluation mode.
        images, sizes: as from :func:`relvit_d2.data.detection.mapper.pad_images`, on the model's device.
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
            predicted = torch.einsum("mnd,md->mn", q[0].float(), k[0, :, middle[b]].float()).argmax(0)
            answer, right = _on_grid(predicted, cells[b], layout.grid), (predicted == truth).float().mean().item()
        rebuilt, placed = None, 0.0
        if isinstance(task := tasks.get("position"), PositionTask):
            cell = assign(task.head(tokens[b]).float().log_softmax(1))
            placed = (cell == cells[b].cpu()).float().mean().item()
            rebuilt = _picture(_rearranged(pixels[b], cell, config.patch_size), config.mean, config.std)
        image, view = (_picture(values, config.mean, config.std) for values in (plain[b], pixels[b]))
        rows.append(PretextRow(image, view, rebuilt, placed, _on_grid(truth, cells[b], layout.grid), answer, right))
    return rows


def sheet_of_run(folder: Path, count: int = 4) -> Image.Image:
    """Return the sheet of a run's last checkpoint on ``count`` images of its evaluation set, or else its training set.

    Raises:
        UserError: if the checkpoint or an image is missing.
    """
    cfg = run_config(folder, "", [], PRETRAINING)
    model = build_pretraining_model(cfg)
    load_trained(cfg, model, folder)
    register_custom(cfg.DATASETS, labels=False)
    part = "TEST" if cfg.DATASETS.TEST else "TRAIN"
    how = {"skip_missing": cfg.DATASETS.SKIP_MISSING, "synset_file": cfg.DATASETS.SYNSETS}
    files = image_files(f"DATASETS.{part}", cfg.DATASETS[part], **how)
    rows = rows_of_files(cfg, model, files, count)
    return pretext_sheet(rows, "pre-training targets and predictions")


def rows_of_files(cfg: CfgNode, model: PretrainingModel, files: Images, count: int) -> list[PretextRow]:
    """Return :func:`pretext_rows` of ``count`` of ``files`` at equal intervals."""
    reader = ImageReader.of(cfg)
    chosen = files[:: max(len(files) // count, 1)][:count]
    batch = pad_images([file if isinstance(file, Tensor) else reader(file) for file in chosen])
    images = batch["images"].to(next(model.parameters()).device)
    keys = image_keys(cfg.SEED, "picture", torch.arange(len(images)))
    return pretext_rows(model.eval(), images, batch["sizes"], keys)


def assign(scores: Tensor) -> Tensor:
    """Assign every token a different cell, greedily by the highest score.

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
    """Write :func:`pretext_sheet` as a PNG, which appears whole or not at all."""
    sheet = pretext_sheet(rows, title)
    with appearing(Path(path)) as part:
        sheet.save(part, format="PNG")


def pretext_sheet(rows: Sequence[PretextRow], title: str) -> Image.Image:
    """Draw a line for each image: image, view, patches at predicted positions, true and predicted relations.

    Args:
        rows: 1 to about 12 images, or ``ValueError``.
        title: a line above the sheet.
    """
    if not rows:
        raise ValueError("pretext_sheet needs at least one image")
    figure = Figure(figsize=(5 * (PANEL + 0.25) + 1.6, len(rows) * (PANEL + 0.45) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(len(rows), 5, squeeze=False)
    colors = [_color(index) for index in range(len(RELATIONS))]
    for line, row in zip(panels, rows, strict=True):
        middle = _middle(row.truth.shape)
        rebuilt = "no position head" if row.rebuilt is None else f"predicted positions: {row.placed:.0%} correct"
        answer = "no relation head" if row.answer is None else f"predicted: {row.right:.0%} correct"
        captions = ("image", "view (encoder input)", rebuilt, "relation to ▣", answer)
        for panel, caption, content in zip(
            line, captions, (row.image, row.view, row.rebuilt, row.truth, row.answer), strict=True
        ):
            panel.set_title(caption, fontsize=9)
            panel.set_axis_off()
            if content is not None and content.ndim == 3:
                panel.imshow(content, interpolation="nearest")
            elif content is not None:
                panel.imshow(
                    content, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(RELATIONS) - 0.5, interpolation="nearest"
                )
                top, left = divmod(middle, content.shape[1])
                panel.add_patch(Rectangle((left - 0.5, top - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.6))
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="gray", linewidth=0.5) for color in colors]
    figure.legend(handles, LABELS, loc="outside right center", fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)


def _middle(grid: tuple[int, ...]) -> int:
    return grid[0] // 2 * grid[1] + grid[1] // 2


def _color(relation: int) -> tuple[float, float, float]:
    """Return the colour of a relation: opposite hues for opposite directions, white for the same patch."""
    row, col = divmod(relation, 3)
    if row == col == 1:
        return (1.0, 1.0, 1.0)
    return colorsys.hsv_to_rgb((np.arctan2(row - 1, col - 1) / (2 * np.pi)) % 1, 0.55, 0.92)


def _on_grid(values: Tensor, cells: Tensor, grid: tuple[int, int]) -> np.ndarray:
    placed = torch.empty_like(values)
    placed[cells] = values
    return placed.view(grid).cpu().numpy()


def _rearranged(view: Tensor, cell: Tensor, patch: int) -> Tensor:
    """Move the patch of token i of the ``(3, h, w)`` view to the cell ``cell[i]``."""
    return permute_patches(view[None], patch, cell.argsort()[None].to(view.device))[0]


def _picture(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return normalised ``(C, h, w)`` pixels as RGB, of other than 3 channels the first one in gray."""
    scale, shift = (pixels.new_tensor(x)[:, None, None] for x in (std, mean))
    values = ((pixels * scale + shift).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return in_rgb(values)
