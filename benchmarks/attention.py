"""Forward and backward pass of a ViT block in bfloat16 with the kind of attention that is chosen, and with the other.

``attention_N`` is the speed-up of :func:`relvit_d2.encoders.windowed.global_block` over the same block with torch's
fused attention at N tokens; on a GPU, and from :data:`relvit_d2.encoders.windowed.FUSED_FROM` tokens on, both are the
same.
"""

import torch
from timm.models.vision_transformer import Block

from benchmarks.harness import Row, arguments, in_turn, print_rows
from relvit_d2.encoders.windowed import global_block

# tokens: images
SIZES = {65: 64, 197: 16, 577: 4, 1025: 2}
WIDTH, HEADS = 192, 3  # of vit_tiny


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "attention")
    rows: list[Row] = []
    block = Block(WIDTH, HEADS, qkv_bias=True).to(args.device)
    for tokens, images in SIZES.items():
        x = torch.randn(images, tokens, WIDTH, device=args.device)

        def step(fused: bool, x: torch.Tensor = x) -> None:
            block.attn.fused_attn = True  # type: ignore[assignment]
            with torch.autocast(args.device, torch.bfloat16):
                loss = (block(x) if fused else global_block(block, x)).float().square().mean()
            loss.backward()

        pair = in_turn(lambda: step(False), lambda: step(True), args.device, budget=1 if args.quick else 10)
        rows.append(
            {
                "name": f"attention_{tokens}",
                "ratio": pair.ratio,
                "images": images,
                "ours_s": pair.ours,
                "fused_s": pair.theirs,
            }
        )
    print_rows(rows, args)


if __name__ == "__main__":
    main()
