"""The relation loss block by block against the plain form with all scores in memory: forward and backward.

``relation_loss_time_N`` is how many times faster ours is at N tokens, ``relation_loss_memory_N`` how many times less
memory it needs beyond inputs and gradients, ``relation_loss_growth`` the seconds at 4,096 tokens over those at 1,024
(16 where cost grows with the square).
"""

import argparse

import torch

from benchmarks.harness import Row, arguments, in_turn, peak_bytes, print_rows
from benchmarks.plain import pair_loss_plain
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.pair_loss import Relation, pair_loss

# tokens: images, for a few million pairs at least
SIZES = {64: 64, 196: 16, 1024: 4, 4096: 1}
WIDTH = 42  # of a score map of ViT-S
SMALL = 1024  # below this many tokens the plain form's memory is too little to be seen


def main() -> None:
    """Measure and print_rows."""
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
    """Return the rows of ``images`` images of ``tokens`` tokens, and the seconds of ours."""
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
        gradients = 2 * q.numel() * q.element_size()  # what both must return
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
