"""Detect objects in images and videos; write annotated pictures and one COCO-results JSON.

For `street/1.jpg` the picture is `OUTPUT/1.png`, for a video `OUTPUT/NAME.mp4`; where several inputs would have one
name, the folders or a number make them differ. `OUTPUT/detections.json` lists dicts of
`image_id` (the path as given; of a video's frames with `#` and the frame's number), `category_id` (the class's index),
`category`, `bbox` (x, y, width, height in pixels), `score`, where the detector has masks `segmentation` (RLE), and of a
video's frame `time` (seconds since the first frame). Videos are turned upright, and their frames keep their times.
Of an animated image the first frame is taken.
An image that cannot be read is left out, a video is written up to where it is damaged; both are named at the end, and
the exit status is 1.
"""

import argparse
import json
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detectron2.evaluation.coco_evaluation import instances_to_coco_json  # noqa: E402
from detectron2.structures import Instances  # noqa: E402
from PIL import Image  # noqa: E402

from relvit_d2.data.images.decode import UnreadableImageError  # noqa: E402
from relvit_d2.data.images.folder import (  # noqa: E402
    EXTENSIONS,
    list_images,
    matching_files,
)
from relvit_d2.detection.predictor import Detector, load_detector  # noqa: E402
from relvit_d2.engine.cli import silence  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.report.predictions import annotated, in_rgb  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402
from relvit_d2.utils.files import appearing, make_folder, write_text  # noqa: E402

TICK = Fraction(1, 60000)  # seconds: common frame rates are whole multiples; MPEG-4 takes at most 65535 a second
LEAP = 3600  # seconds from frame to frame that can be meant; the codec takes a day
NAMED = 10  # faults that are told in full
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


def main() -> int:
    """Parse the command line and detect."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/predict.py --weights output/demo/finetune/model_final.pth "
        "--input datasets/streets/test --output predictions",
    )
    parser.add_argument("--weights", required=True, help="model_*.pth of train_net.py, or the folder of a run")
    parser.add_argument("--config-file", default="", help="default: the config.yaml beside the weights")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders, patterns, videos")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score that counts, 0..1 (default 0.5)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default 4)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    return guard(lambda: predict(args))


def predict(args: argparse.Namespace) -> None:
    """Detect and write.

    Raises:
        UserError: for an input that is missing, a detector that is none, or a number out of range; for inputs that
            cannot be read, when all others are done.
    """
    if not 0 <= args.threshold <= 1 or args.batch < 1:
        raise UserError(f"--threshold {args.threshold} --batch {args.batch}: give 0 to 1, and at least 1")
    silence()
    files = list(dict.fromkeys(file for word in args.input for file in found(word)))
    detector = load_detector(args.weights, args.config_file, args.opts)
    make_folder(args.output)
    results: list[dict[str, Any]] = []
    made: Counter[str] = Counter()
    faults: list[str] = []
    images = [file for file in files if file.suffix.lower() not in VIDEOS]
    outputs = dict(zip(files, named(files), strict=True))
    for start in tqdm(range(0, len(images), args.batch), desc="images", unit="batch", disable=not images):
        batch = {}
        for file in images[start : start + args.batch]:
            try:
                batch[file] = detector.read(file)
            except UserError as error:
                faults.append(str(error))
        for (file, image), instances in zip(batch.items(), detector.batch([*batch.values()]), strict=True):
            kept = instances[instances.scores >= args.threshold]
            with appearing(args.output / outputs[file]) as part:
                picture(detector, image, kept).save(part, format="PNG")
            results += told(str(file), kept, detector)
            made["picture"] += 1
    for file in files:
        if file.suffix.lower() in VIDEOS:
            try:
                rows, fault = video(file, args.output / outputs[file], detector, args.threshold, args.batch)
            except UnreadableImageError as error:
                faults.append(str(error))
                continue
            results += rows
            made["video"] += 1
            faults += [fault] if fault else []
    if made:
        write_text(args.output / "detections.json", json.dumps(results))
        counts = " and ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in made.items())
        print(f"written: {args.output}/detections.json, {counts}; {len(results)} detections")
    if faults:
        more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise UserError(f"{len(faults)} of {len(files)} inputs could not be read: {'; '.join(faults[:NAMED])}{more}")


def found(word: str) -> list[Path]:
    """Return the images and videos that a word of the command line stands for.

    Raises:
        UserError: if it stands for none.
    """
    path = Path(word)
    if path.is_dir():
        return list_images(path, EXTENSIONS | VIDEOS)
    files = matching_files(path, EXTENSIONS | VIDEOS)
    if not files:
        raise UserError(f"--input '{word}' is no image, folder, pattern or video that exists; correct the path")
    return files


def named(files: Sequence[Path]) -> list[str]:
    """Return the name of each file's picture or video, all of them different."""
    stems = Counter(file.stem for file in files)
    names: dict[str, None] = {}
    for file in files:
        stem = file.stem if stems[file.stem] == 1 else "_".join(file.with_suffix("").parts).strip("/_.")
        ending = "mp4" if file.suffix.lower() in VIDEOS else "png"
        name, number = f"{stem}.{ending}", 1
        while name in names:
            number += 1
            name = f"{stem}_{number}.{ending}"
        names[name] = None
    return list(names)


def picture(detector: Detector, image: np.ndarray, instances: Instances) -> Image.Image:
    """Draw detections on an image."""
    fields = instances.pred_boxes.tensor.numpy(), instances.pred_classes.numpy(), instances.scores.numpy()
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    return annotated(in_rgb(image), *fields, detector.class_names, masks)


def told(name: str, instances: Instances, detector: Detector) -> list[dict[str, Any]]:
    """Return detections as COCO results, with the name of the class beside its index."""
    results = instances_to_coco_json(instances, name)
    return [result | {"category": detector.class_names[result["category_id"]]} for result in results]


def video(
    file: Path, output: Path, detector: Detector, threshold: float, size: int
) -> tuple[list[dict[str, Any]], str]:
    """Detect in every frame of a video and write it anew with what was found.

    Returns:
        the results, and a sentence on where decoding broke off, empty if it did not.

    Raises:
        UnreadableImageError: if not one frame can be decoded.
    """
    if detector.channels != 3:
        raise UnreadableImageError(
            f"'{file}' is a video, but INPUT.CHANNELS is {detector.channels}, not 3: give images"
        )
    results: list[dict[str, Any]] = []
    fault, count = "", 0
    try:
        with (
            av.open(str(file)) as source,
            tqdm(desc=file.name, total=source.streams.video[0].frames or None, unit="frame") as bar,
            appearing(output) as part,
            av.open(str(part), "w", format="mp4") as sink,
        ):
            stream = source.streams.video[0]
            rate = stream.average_rate or Fraction(25)
            written = None
            decoded = timed(source.decode(stream), 1 / rate)
            while not fault:
                batch: list[tuple[Fraction, np.ndarray]] = []
                try:
                    batch.extend(islice(decoded, size))
                except av.error.FFmpegError as error:
                    fault = str(error)
                if not batch:
                    break
                found = detector.batch([image for _, image in batch])
                for (seconds, image), instances in zip(batch, found, strict=True):
                    kept = instances[instances.scores >= threshold]
                    drawn = picture(detector, image, kept)
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
                    results += [row | time for row in told(f"{file}#{count}", kept, detector)]
                    count += 1
                    bar.update()
            if written is None:
                raise UnreadableImageError(f"video '{file}' has no frame that can be decoded; give another")
            sink.mux(encoded(written, None, file))
    except (av.error.FFmpegError, IndexError) as error:
        raise UnreadableImageError(f"video '{file}' cannot be decoded ({error}); give another") from error
    return results, fault and f"video '{file}' is damaged after frame {count - 1} ({fault}); what follows is left out"


def encoded(stream: av.VideoStream, frame: av.VideoFrame | None, file: Path) -> list[av.Packet]:
    """Encode a frame; None ends the stream. An error here, unlike one of writing, belongs to the video ``file``."""
    try:
        return stream.encode(frame)
    except av.error.FFmpegError as error:
        raise UnreadableImageError(f"video '{file}' cannot be encoded again ({error}); give another") from error


def timed(frames: Iterable[av.VideoFrame], step: Fraction) -> Iterator[tuple[Fraction, np.ndarray]]:
    """Give each frame's time in seconds since the first one, and its upright pixels ``(H, W, 3)``, RGB.

    Times rise by at least ``TICK``. A frame without a time comes ``step`` after the frame before it. So does one whose
    time goes back or leaps by more than ``LEAP``, and those after it keep their distance from it.
    """
    start: Fraction | None = None  # the time stamp that counts as 0
    last: Fraction | None = None
    for frame in frames:
        stamp = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
        time = Fraction(0) if last is None else last + step
        if stamp is not None:
            if start is None or (last is not None and not 0 <= stamp - start - last <= LEAP):
                start = stamp - time
            time = stamp - start
        last = time if last is None else max(time, last + TICK)
        yield last, upright(frame)


def upright(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame's pixels turned as its display matrix demands, to the nearest quarter turn, flips included.

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


if __name__ == "__main__":
    sys.exit(main())
