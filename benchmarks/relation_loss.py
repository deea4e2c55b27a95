"""The blockwise relation loss compared with the plain one, which has all scores in memory: forward and backward.

``relation_loss_time_N`` is the speed-up at N tokens. ``relation_loss_memory_N`` is the memory of the plain loss over
ours, without inputs and gradients. ``relation_loss_growth`` is the time at 4,096 tokens over that at 1,024 (16 for
quadratic cost).
"""

import argparse

import torch

from benchmarks.harness import Row, arguments, in_turn, peak_bytes, print_rows
from benchmarks.plain import pair_loss_plain
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.pair_loss import Relation, pair_loss

# tokens: images, for at least a few million pairs
SIZES = {64: 64, 196: 16, 1024: 4, 4096: 1}
WIDTH = 42  # width of each query and key of ViT-S
SMALL = 1024  # with fewer tokens, the memory of the plain loss is too small to measure


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "relation_loss")
    rows: list[Row] = []
    took = {}
    for tokens, images in SIZES.items():
        more, took[tokens] = measure(tokens, images, args)
        rows += more
    growth = took[4096] / SIZES[4096] / (took[1024] / SIZES[1024])
    rows.append({"name": "relation_loss_growth", "ratio": growth})
    print_rows(rows, args)


def measure(tokens: int, images: int, args: argparse.Namespace) -> tuple[list[Row], float]:
    """Measure ``images`` images of ``tokens`` tokens; return the rows and our seconds."""
    side = int(tokens**0.5)
    layout = PatchLayout.full(images, (side, side), args.device)
    q, k = torch.randn(2, images, 9, tokens, WIDTH, device=args.device).unbind()
    q.requires_grad_(), k.requires_grad_()

    def ours() -> None:
        torch.autograd.grad(pair_loss(q, k, layout, Relation())[0], (q, k))

    def plain() -> None:
        torch.autograd.grad(pair_loss_plain(q, k, layout, Relation())[0], (q, k))

    pair = in_turn(ours, plain, args.device, budget=1 if args.quick else 10)
    rows: list[Row] = [
        {
            "name": f"relation_loss_time_{tokens}",
            "ratio": pair.ratio,
            "images": images,
            "ours_s": pair.ours,
            "plain_s": pair.theirs,
        }
    ]
    if tokens >= SMALL or args.device != "cpu":
        gradients = 2 * q.numel() * q.element_size()  # returned by both
        mine, theirs = (max(peak_bytes(f, args.device) - gradients, 1) for f in (ours, plain))
        rows.append(
            {
                "name": f"relation_loss_memory_{tokens}",
                "ratio": theirs / mine,
                "images": images,
                "ours_MiB": mine / 2**20,
                "plain_MiB": theirs / 2**20,
            }
        )
    return rows, pair.ours


if __name__ == "__main__":
    main()
