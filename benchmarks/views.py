"""Views of a whole batch compared with a loop over images and patches with torchvision, one thread each.

Both have the same crops, windows, colours and permutations; the ratio is the speed-up.
"""

import torch
import torchvision.transforms.functional as F

from benchmarks.harness import arguments, in_turn, print_rows
from benchmarks.plain import plain_patches, plain_view
from relvit_d2.pretext.resampling import random_boxes, random_flips
from relvit_d2.pretext.views import PatchDraws, ViewConfig, Views, draw_patches

# name: (image size, view size, patch size, batch size), sizes in pixels
SETTINGS = {"views_32_p4": ((32, 32), 32, 4, 64), "views_224_p16": ((375, 500), 224, 16, 16)}


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "views")
    torch.set_num_threads(1)
    rows = []
    for name, (size, side, patch, batch) in SETTINGS.items():
        config = ViewConfig(side, patch, permute=True)
        images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        sizes = torch.tensor([size]).repeat(batch, 1)
        on_device = images.to(args.device)
        views = Views(config)

        def ours(views: Views = views, images: torch.Tensor = on_device, sizes: torch.Tensor = sizes) -> None:
            views.train(images, sizes, torch.arange(len(images)))

        def theirs(images: torch.Tensor = images, sizes: torch.Tensor = sizes, config: ViewConfig = config) -> None:
            plain_train(images, sizes, config, torch.arange(len(images)))

        pair = in_turn(ours, theirs, args.device, budget=2 if args.quick else 20)
        rows.append({"name": name, "ratio": pair.ratio, "images": batch, "ours_s": pair.ours, "loop_s": pair.theirs})
    print_rows(rows, args)


def plain_train(images: torch.Tensor, sizes: torch.Tensor, config: ViewConfig, keys: torch.Tensor) -> torch.Tensor:
    """Compute the views of :meth:`relvit_d2.pretext.views.Views.train` one patch at a time, with the same draws."""
    boxes = random_boxes(sizes, config.crop_scale, config.crop_ratio, keys).tolist()
    flip = random_flips(keys, config.flip).tolist()
    draws = draw_patches(config, keys)
    views = []
    for b, image in enumerate(images):
        view = plain_view(image, boxes[b], flip[b], config)
        patches = plain_patches(view, config, PatchDraws(*(x[b] for x in draws)))
        views.append(F.normalize(patches, list(config.mean), list(config.std)))
    return torch.stack(views)


if __name__ == "__main__":
    main()
