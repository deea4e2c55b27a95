"""Division of labelled images into two parts, with duplicates and near-duplicates in the same part."""

import hashlib
import logging

import numpy as np
import torch

from relvit_d2.data.classification.image_folder import LabelledImages, rank_in_class
from relvit_d2.data.detection.splits import hold_out, warn_once
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.data.images.file_cache import file_state
from relvit_d2.data.images.seen import fingerprints_of
from relvit_d2.data.images.similarity import MAX_COMPARED, NEAR, VERSION
from relvit_d2.data.user_cache import cache_root, load, store
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.processes import first_process_first
from relvit_d2.utils.randomness import generator

logger = logging.getLogger(__name__)


def split(data: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split a data set into training and validation images; ``share``, 0..1, of each class is held out.

    Duplicates and near-duplicates stay together (:func:`relvit_d2.data.detection.splits.hold_out`), so that the share
    can differ, except in data sets of more than ``MAX_COMPARED`` images, which are not compared. In distributed runs
    the first process compares the images, and the others read the result from the user's cache.

    Raises:
        UserError: if one of the two parts would be empty.
    """
    order = torch.from_numpy(generator(seed, "validation").permutation(len(data)))
    shuffled = data.labels[order]
    quantile = (rank_in_class(shuffled) + 0.5) / shuffled.bincount()[shuffled]
    order, count = order[quantile.argsort(stable=True)], round(share * len(data))
    chosen: list[int] = []
    if 0 < count < len(data):
        chosen = order[:count].tolist() if len(data) > MAX_COMPARED else _hold_out_groups(data, order, count)
        if len(data) > MAX_COMPARED:
            logger.info(
                f"data set '{data.name}' has more than {MAX_COMPARED} images, which are not compared: duplicates may "
                "be both in the training and in the validation set"
            )
    if not chosen:
        reason = ", because duplicates stay together" if 0 < count < len(data) else ""
        raise UserError(
            f"DATASETS.VALIDATION {share:.3%} holds out {count if not reason else 0} of the {len(data)} images of "
            f"'{data.name}'{reason}: give another percentage, or '' for none"
        )
    held = torch.zeros(len(data), dtype=torch.bool)
    held[chosen] = True
    return data.take((~held).nonzero()[:, 0]), data.take(held.nonzero()[:, 0])


def _hold_out_groups(data: LabelledImages, order: torch.Tensor, count: int) -> list[int]:
    """Return the indices of about ``count`` images to hold out, in ``order``; groups of duplicates stay together."""
    images = data.images
    digest = hashlib.blake2b(f"{VERSION} {NEAR} {count}\0".encode(), digest_size=16)
    digest.update(order.numpy().tobytes())
    if isinstance(images, ImageStack):
        pixels = images.pixels.cpu().numpy()
        digest.update(f"{pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels).data.cast("B"))
    else:
        digest.update("\n".join(map(file_state, images)).encode(errors="surrogateescape"))

    path = cache_root() / "held_out" / f"{digest.hexdigest()}.json"
    with first_process_first():  # it fills the cache
        match load(path):
            case [list(held), str(warning)] if all(type(index) is int for index in held):
                pass
            case _:
                ranks = order.argsort().tolist()
                prints = fingerprints_of(images)
                found, warning = hold_out(prints, count, lambda group: min(ranks[i] for i in group), f"'{data.name}'")
                held = sorted(found)
                store(path, [held, warning], f"the duplicates in '{data.name}'")
    if warning:
        warn_once(warning)
    return held
