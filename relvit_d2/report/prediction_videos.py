"""Detection in videos and with cameras; needs PyAV (``pip install 'relvit_d2[video]'``)."""

import struct
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.detection.detections import AnyDetector
from relvit_d2.engine import signals
from relvit_d2.report.predictions import coco_results, draw_found
from relvit_d2.utils.files import appearing
from relvit_d2.utils.progress import Progress

TICK = Fraction(1, 60000)  # seconds; common frame intervals are multiples; MPEG-4 allows at most 65535 a second
MAX_INTERVAL = 3600  # seconds between two frames; a longer interval is taken as a damaged time stamp
CAMERAS: dict[str, tuple[str, str, dict[str, str]]] = {
    "linux": ("v4l2", "/dev/video{}", {}),
    # FFmpeg's default of 29.97 frames a second is refused by cameras of 30.
    "darwin": ("avfoundation", "{}", {"framerate": "30"}),
}
"""FFmpeg's input device, the name of the camera of a number, and options, by ``sys.platform``."""


def annotate_video(
    file: Path, output: Path, detector: AnyDetector, size: int, every: int = 1
) -> tuple[list[dict[str, Any]], str]:
    """Detect objects in the frames of a video or a camera and write an annotated copy.

    Args:
        file: a video, or the number of a camera, which is read until SIGINT or SIGTERM.
        output: the annotated copy.
        detector: takes 3 channels.
        size: frames per batch.
        every: only frames whose number is a multiple of it are annotated and written.

    Returns:
        COCO results with the time of their frame, and a sentence on the frame after which decoding failed, or empty.

    Raises:
        UnreadableImageError: if no frame can be decoded, or the detector does not take 3 channels.
    """
    live = not file.suffix
    title = f"camera {file}" if live else f"video '{file}'"
    if detector.pixels.channels != 3:
        raise UnreadableImageError(
            f"{title} has 3 channels, but INPUT.CHANNELS is {detector.pixels.channels}: give images"
        )
    results: list[dict[str, Any]] = []
    failure, last = "", 0
    try:
        with (
            _stopped_by_signals() if live else nullcontext(),
            _open_camera(file.name) if live else av.open(str(file)) as source,
            Progress(desc=file.name, total=source.streams.video[0].frames or None, unit="frame") as bar,
            appearing(output) as part,
            av.open(str(part), "w", format="mp4") as sink,
        ):
            stream = source.streams.video[0]
            rate = stream.average_rate or Fraction(25)
            written = None
            decoded = timed(_live(source, stream) if live else source.decode(stream), 1 / rate, every)
            while not failure:
                batch: list[tuple[int, Fraction, np.ndarray]] = []
                try:
                    batch.extend(islice(decoded, size))
                except av.error.FFmpegError as error:
                    failure = str(error)
                if not batch:
                    break
                found = detector.detect([image for *_, image in batch])
                for (number, seconds, image), detections in zip(batch, found, strict=True):
                    drawn = draw_found(detector, image, detections)
                    drawn = drawn.resize((drawn.width // 2 * 2, drawn.height // 2 * 2))  # the codec needs even sides
                    if written is None:
                        written = sink.add_stream("mpeg4", rate=max(rate / every, Fraction(1)).limit_denominator(1001))
                        written.width, written.height, written.pix_fmt = drawn.width, drawn.height, "yuv420p"
                        written.bit_rate = 8_000_000
                        written.codec_context.time_base = TICK
                    frame = av.VideoFrame.from_image(drawn)
                    frame.pts, frame.time_base = round(seconds / TICK), TICK
                    sink.mux(encoded(written, frame, title))
                    rows = coco_results(f"{file}#{number}", detections, detector, image.shape[1::-1])
                    results += [row | {"time": round(float(seconds), 6)} for row in rows]
                    last = number
                    bar.update(number + 1 - bar.n)
            if written is None:
                raise UnreadableImageError(f"{title} has no frame that can be decoded; give another")
            sink.mux(encoded(written, None, title))
    except (av.error.FFmpegError, IndexError) as error:
        raise UnreadableImageError(f"{title} cannot be decoded ({error}); give another") from error
    damage = f"{title} {'failed' if live else 'is damaged'} after frame {last} ({failure}); later frames are left out"
    return results, damage if failure else ""


def _open_camera(number: str) -> av.container.InputContainer:
    try:
        if sys.platform == "win32":
            from av.device import enumerate_input_devices

            names = [f"video={d.name}" for d in enumerate_input_devices("dshow") if "video" in d.media_types]
            return av.open(names[int(number)], format="dshow")
        device, name, options = CAMERAS[sys.platform]
        return av.open(name.format(number), format=device, options=options)
    except (av.error.FFmpegError, LookupError, ValueError) as error:  # no camera; or PyAV without the input device
        raise UnreadableImageError(
            f"camera {number} cannot be opened ({error}); connect it, give another number, or record a video"
        ) from error


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Record SIGINT and SIGTERM inside the block, so that they end the camera and not the process."""
    with signals.installed(), signals.deferred():
        yield


def _live(source: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yield the frames of a camera until it ends, or SIGINT or SIGTERM is received."""
    frames = source.decode(stream)
    while not signals.received():
        try:
            frame = next(frames, None)
        except (av.error.BlockingIOError, av.error.InterruptedError):  # no frame yet (macOS), or a signal
            time.sleep(0.01)
            frames = source.decode(stream)
            continue
        if frame is None:
            return
        yield frame


def encoded(stream: av.VideoStream, frame: av.VideoFrame | None, title: str) -> list[av.Packet]:
    """Encode a frame, or end the stream for None; an encoder error names the input by its ``title``."""
    try:
        return stream.encode(frame)
    except av.error.FFmpegError as error:
        raise UnreadableImageError(f"{title} cannot be encoded again ({error}); give another") from error


def timed(
    frames: Iterable[av.VideoFrame], step: Fraction, every: int = 1
) -> Iterator[tuple[int, Fraction, np.ndarray]]:
    """Yield the number, the time and the pixels of each frame whose number is a multiple of ``every``.

    The number is counted from 0, the time is in seconds since the first frame, the pixels are ``(H, W, 3)``, RGB,
    upright.

    Times rise by at least ``TICK``. A frame without a time follows the one before it after ``step``. So does one whose
    time is lower, or higher by more than ``MAX_INTERVAL``, and those after it keep their distance from it.
    """
    start: Fraction | None = None  # the time stamp that counts as 0
    last: Fraction | None = None
    for number, frame in enumerate(frames):
        stamp = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
        time = Fraction(0) if last is None else last + step
        if stamp is not None:
            if start is None or (last is not None and not 0 <= stamp - start - last <= MAX_INTERVAL):
                start = stamp - time
            time = stamp - start
        last = time if last is None else max(time, last + TICK)
        if number % every == 0:
            yield number, last, upright(frame)


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
