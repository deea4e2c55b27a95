"""Turn weights of other projects into an encoder.safetensors, which both scripts load by MODEL.WEIGHTS.

Says what it found and dropped. Runs the source's own definition of the model and the encoder on one random image, and
writes nothing unless their features agree to 1e-4. Nothing in a file is executed.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from relvit_d2.conversion.checkpoint_file import find_encoder  # noqa: E402
from relvit_d2.conversion.convert import CONVERTERS, convert  # noqa: E402
from relvit_d2.conversion.encoder_file import save_encoder  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402


def main() -> int:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/convert_weights.py dinov2_vits14_pretrain.pth --to encoder.safetensors",
    )
    parser.add_argument("source", type=Path, help="a .safetensors, .pth, .pt, .bin or .ckpt file")
    parser.add_argument("--to", required=True, type=Path, help="the encoder.safetensors to write")
    parser.add_argument("--from", dest="kind", choices=list(CONVERTERS), help="default: told by the names of tensors")
    args = parser.parse_args()
    return guard(lambda: write(args.source, args.to, args.kind))


def write(source: Path, target: Path, kind: str | None) -> None:
    """Convert ``source`` into ``target``.

    Raises:
        UserError: if it is no encoder that exists here, or the proof fails.
    """
    check_target(target, ".safetensors")
    converted = convert(find_encoder(source), kind)
    info = {"source": f"{converted.kind}: {source.name}", **converted.pixels}
    save_encoder(converted.encoder, target, info)
    print(converted)
    print(f"written: {target}")


def check_target(target: Path, *suffixes: str) -> None:
    """Refuse, before anything is computed, a name or a place that cannot be written to.

    Raises:
        UserError: if the folder is missing or the name does not end in one of ``suffixes``.
    """
    if target.suffix not in suffixes:
        raise UserError(f"'{target}' is written as {' or '.join(suffixes)}: name it so")
    if not target.parent.is_dir():
        raise UserError(f"the folder '{target.parent}' of '{target.name}' does not exist; make it first")


if __name__ == "__main__":
    sys.exit(main())
