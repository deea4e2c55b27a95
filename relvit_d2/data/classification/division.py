"""Division of labelled images into two parts, equal and nearly equal ones on one side."""

import hashlib
import logging

import numpy as np
import torch
from detectron2.utils import comm

from relvit_d2.data.cache import remembered
from relvit_d2.data.classification.image_folder import LabelledImages, places
from relvit_d2.data.detection.splits import hold_out, warn
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.data.images.seen import fingerprints_of
from relvit_d2.data.images.similarity import LIMIT, NEAR, VERSION, file_state
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.randomness import generator

logger = logging.getLogger(__name__)


def split(data: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Return what stays for training and what is held out: ``share``, 0..1, of all images, and so of each class.

    Equal and nearly equal images stay together, see :func:`relvit_d2.data.detection.splits.hold_out`; where there are
    none, or with more than ``LIMIT`` images, which are not compared, the shares are exact. In a run of several
    processes the first one compares the images, and the others read the result from the user's cache.

    Raises:
        UserError: if nothing would be held out, or nothing stay.
    """
    order = torch.from_numpy(generator(seed, "validation").permutation(len(data)))
    shuffled = data.labels[order]
    quantile = (places(shuffled) + 0.5) / shuffled.bincount()[shuffled]
    order, count = order[quantile.argsort(stable=True)], round(share * len(data))
    chosen: list[int] = []
    if 0 < count < len(data):
        chosen = order[:count].tolist() if len(data) > LIMIT else _hold_out_groups(data, order, count)
        if len(data) > LIMIT:
            logger.info(
                f"data set '{data.name}' has more than {LIMIT} images, which are not compared: equal ones may be "
                "both trained on and held out"
            )
    if not chosen:
        why = ", since equal images stay together" if 0 < count < len(data) else ""
        raise UserError(
            f"DATASETS.VALIDATION {share:.3%} holds out {count if not why else 0} of the {len(data)} images of "
            f"'{data.name}'{why}: give another share, or '' for none"
        )
    held = torch.zeros(len(data), dtype=torch.bool)
    held[chosen] = True
    return data.take((~held).nonzero()[:, 0]), data.take(held.nonzero()[:, 0])


def _hold_out_groups(data: LabelledImages, order: torch.Tensor, count: int) -> list[int]:
    """Return the numbers of about ``count`` images to hold out, the first of ``order``, copies all or none."""
    images = data.images
    total = hashlib.blake2b(f"{VERSION} {NEAR} {count}\0".encode(), digest_size=16)
    total.update(order.numpy().tobytes())
    if isinstance(images, ImageStack):
        pixels = images.pixels.cpu().numpy()
        total.update(f"{pixels.shape}".encode())
        total.update(np.ascontiguousarray(pixels).data.cast("B"))
    else:
        total.update("\n".join(map(file_state, images)).encode(errors="surrogateescape"))

    def make() -> tuple[list[int], str]:
        prints = fingerprints_of(images, data.name)
        ranks = order.argsort().tolist()
        held, warning = hold_out(prints, count, lambda group: min(ranks[i] for i in group), f"'{data.name}'")
        return sorted(held), warning

    if not comm.is_main_process():
        comm.synchronize()  # until the first process has filled the cache
    held, warning = remembered("held_out", total.hexdigest(), make)
    if comm.is_main_process():
        comm.synchronize()
    if warning:
        warn(warning)
    return held
