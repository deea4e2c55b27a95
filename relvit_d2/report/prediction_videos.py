"""Detections in videos; needs PyAV (``pip install 'relvit_d2[video]'``)."""

from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.detection.predictor import Detector
from relvit_d2.report.predictions import coco_results, draw_instances
from relvit_d2.utils.files import appearing

LARGEST = 65535  # denominator of a time base that the codec takes


def annotate_video(
    file: Path, output: Path, detector: Detector, threshold: float, size: int
) -> tuple[list[dict[str, Any]], str]:
    """Detect in every frame of a video and write it anew with what was found.

    Returns:
        the results, and a sentence on where decoding broke off, empty if it did not.

    Raises:
        UnreadableImageError: if not one frame can be decoded.
    """
    results: list[dict[str, Any]] = []
    fault, count = "", 0
    try:
        with av.open(str(file)) as source, appearing(output) as part, av.open(str(part), "w", format="mp4") as sink:
            stream = source.streams.video[0]
            written = None
            bar = tqdm(desc=file.name, total=stream.frames or None, unit="frame")
            decoded = source.decode(stream)
            while not fault:
                batch: list[np.ndarray] = []
                try:
                    batch.extend(frame.to_ndarray(format="rgb24") for frame in islice(decoded, size))
                except av.error.FFmpegError as error:
                    fault = str(error)
                if not batch:
                    break
                for image, instances in zip(batch, detector.batch(batch), strict=True):
                    kept = instances[instances.scores >= threshold]
                    drawn = draw_instances(detector, image, kept)
                    drawn = drawn.resize((drawn.width // 2 * 2, drawn.height // 2 * 2))  # the codec needs even sides
                    if written is None:
                        written = sink.add_stream("mpeg4", rate=written_rate(stream.average_rate))
                        written.width, written.height, written.pix_fmt = drawn.width, drawn.height, "yuv420p"
                        written.bit_rate = 8_000_000
                    sink.mux(written.encode(av.VideoFrame.from_image(drawn)))
                    results += coco_results(f"{file}#{count}", kept, detector)
                    count += 1
                    bar.update()
            if written is None:
                raise UnreadableImageError(f"video '{file}' has no frame that can be decoded; give another")
            sink.mux(written.encode(None))
    except (av.error.FFmpegError, IndexError) as error:
        raise UnreadableImageError(f"video '{file}' cannot be decoded ({error}); give another") from error
    return results, fault and f"video '{file}' is damaged after frame {count - 1} ({fault}); what follows is left out"


def written_rate(rate: Fraction | None) -> Fraction:
    """Return the frame rate that the codec takes and that is nearest to ``rate``, or to 25 if that is unknown."""
    seconds = max(1 / (rate or Fraction(25)), Fraction(1, LARGEST))
    return 1 / seconds.limit_denominator(LARGEST)
