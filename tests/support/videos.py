"""Short videos, and the times of their frames."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def video(
    path: Path,
    frames: list[np.ndarray],
    steps: list[int] | None = None,
    turn: tuple[int, bool, bool] = (0, False, False),
    rate: int = 10,
    bits: int = 0,
) -> Path:
    """Write frames ``(H, W, 3)`` of uint8 as a video.

    Args:
        path: of the video.
        frames: its frames.
        steps: times from frame to frame, in 1/60000 s; default: ``rate`` frames a second.
        turn: of the display matrix: degrees counter-clockwise, then whether it mirrors left and right, up and down.
        rate: frames a second.
        bits: bits a second; 0: PyAV's default.
    """
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if bits:
            stream.bit_rate = bits
        if any(turn):
            stream.set_display_rotation(turn[0], hflip=turn[1], vflip=turn[2])
        if steps:
            stream.codec_context.time_base = Fraction(1, 60000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels[:height, :width].copy(), format="rgb24")
            if steps:
                frame.pts, frame.time_base = sum(steps[:index]), Fraction(1, 60000)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    return path


def times(path: Path) -> list[float]:
    with av.open(str(path)) as source:
        return [float(frame.pts * frame.time_base) for frame in source.decode(video=0) if frame.time_base]
