"""Detection in videos; needs PyAV (``pip install 'relvit_d2[video]'``)."""

import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.detection.detections import AnyDetector
from relvit_d2.report.predictions import coco_results, draw_found
from relvit_d2.utils.files import appearing
from relvit_d2.utils.progress import Progress

TICK = Fraction(1, 60000)  # seconds; common frame intervals are multiples; MPEG-4 allows at most 65535 a second
MAX_INTERVAL = 3600  # seconds between two frames; a longer interval is taken as a damaged time stamp


def annotate_video(file: Path, output: Path, detector: AnyDetector, size: int) -> tuple[list[dict[str, Any]], str]:
    """Detect objects in every frame of a video and write an annotated copy.

    Returns:
        COCO results with the time of their frame, and a sentence on the frame after which decoding failed, or empty.

    Raises:
        UnreadableImageError: if no frame can be decoded, or the detector does not take 3 channels.
    """
    if detector.pixels.channels != 3:
        raise UnreadableImageError(
            f"'{file}' is a video, but INPUT.CHANNELS is {detector.pixels.channels}, not 3: give images"
        )
    results: list[dict[str, Any]] = []
    failure, count = "", 0
    try:
        with (
            av.open(str(file)) as source,
            Progress(desc=file.name, total=source.streams.video[0].frames or None, unit="frame") as bar,
            appearing(output) as part,
            av.open(str(part), "w", format="mp4") as sink,
        ):
            stream = source.streams.video[0]
            rate = stream.average_rate or Fraction(25)
            written = None
            decoded = timed(source.decode(stream), 1 / rate)
            while not failure:
                batch: list[tuple[Fraction, np.ndarray]] = []
                try:
                    batch.extend(islice(decoded, size))
                except av.error.FFmpegError as error:
                    failure = str(error)
                if not batch:
                    break
                found = detector.detect([image for _, image in batch])
                for (seconds, image), detections in zip(batch, found, strict=True):
                    drawn = draw_found(detector, image, detections)
                    drawn = drawn.resize((drawn.width // 2 * 2, drawn.height // 2 * 2))  # the codec needs even sides
                    if written is None:
                        written = sink.add_stream("mpeg4", rate=max(rate, Fraction(1)).limit_denominator(1001))
                        written.width, written.height, written.pix_fmt = drawn.width, drawn.height, "yuv420p"
                        written.bit_rate = 8_000_000
                        written.codec_context.time_base = TICK
                    frame = av.VideoFrame.from_image(drawn)
                    frame.pts, frame.time_base = round(seconds / TICK), TICK
                    sink.mux(encoded(written, frame, file))
                    time = {"time": round(float(seconds), 6)}
                    results += [
                        row | time for row in coco_results(f"{file}#{count}", detections, detector, image.shape[1::-1])
                    ]
                    count += 1
                    bar.update()
            if written is None:
                raise UnreadableImageError(f"video '{file}' has no frame that can be decoded; give another video")
            sink.mux(encoded(written, None, file))
    except (av.error.FFmpegError, IndexError) as error:
        raise UnreadableImageError(f"video '{file}' cannot be decoded ({error}); give another") from error
    damage = f"video '{file}' is damaged after frame {count - 1} ({failure}); later frames are left out"
    return results, damage if failure else ""


def encoded(stream: av.VideoStream, frame: av.VideoFrame | None, file: Path) -> list[av.Packet]:
    """Encode a frame, or end the stream for None; an encoder error names the input ``file``."""
    try:
        return stream.encode(frame)
    except av.error.FFmpegError as error:
        raise UnreadableImageError(f"video '{file}' cannot be encoded again ({error}); give another") from error


def timed(frames: Iterable[av.VideoFrame], step: Fraction) -> Iterator[tuple[Fraction, np.ndarray]]:
    """Yield each frame's time in seconds since the first one, and its upright pixels ``(H, W, 3)``, RGB.

    Times rise by at least ``TICK``. A frame without a time follows the one before it after ``step``. So does one whose
    time is lower, or higher by more than ``MAX_INTERVAL``, and those after it keep their distance from it.
    """
    start: Fraction | None = None  # the time stamp that counts as 0
    last: Fraction | None = None
    for frame in frames:
        stamp = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
        time = Fraction(0) if last is None else last + step
        if stamp is not None:
            if start is None or (last is not None and not 0 <= stamp - start - last <= MAX_INTERVAL):
                start = stamp - time
            time = stamp - start
        last = time if last is None else max(time, last + TICK)
        yield last, upright(frame)


def upright(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame's pixels rotated to the nearest quarter turn and flipped as its display matrix states.

    The matrix ``a b u c d v x y w`` moves the pixel (p, q) to (a p + c q + x, b p + d q + y): ISO/IEC 14496-12, 6.2.2.
    """
    pixels = frame.to_ndarray(format="rgb24")
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
