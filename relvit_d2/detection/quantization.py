"""Static int8 quantisation of an exported detector with ONNX Runtime."""

import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from relvit_d2.data.images.folder import list_images
from relvit_d2.detection.comparison import matched
from relvit_d2.detection.onnx_detector import OnnxDetector
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing

FEWEST = 8  # images
MOST = 64  # images that calibrate, and that are compared
SCORE = 0.5  # of detections that are compared
OVERLAP = 0.5  # IoU of equal detections


def calibration_files(folder: Path) -> list[Path]:
    """Return the images of a folder; raise a :class:`UserError` if there are too few."""
    files = list_images(folder)
    if len(files) < FEWEST:
        raise UserError(f"--int8 '{folder}' has {len(files)} images, at least {FEWEST} are needed: add images")
    return files[:: -(-len(files) // (2 * MOST))]


def quantize(path: Path, output: Path, files: Sequence[Path], min_agreement: float) -> str:
    """Quantise a detector to int8: the weights of convolutions and linear layers, and their inputs.

    Args:
        path: file that :func:`relvit_d2.detection.export.export` wrote.
        output: the file to write.
        files: images; every second one calibrates, the others are compared.
        min_agreement: minimum F1 of the detections above a score of 0.5, those of ``path`` being the truth, 0..1.

    Returns:
        The file, the agreement and the speed, as text.

    Raises:
        UserError: the agreement is lower, or the detector finds nothing.
    """
    detector = OnnxDetector(path, SCORE)
    images = [detector.read(file) for file in files]
    # Layers that see no box have no range of values.
    calibrating = [image for image in images[::2] if len(detector(image).scores)]
    if not calibrating:
        raise UserError(f"the detector finds nothing above {SCORE} in the images of --int8: give images with objects")
    with appearing(output) as part:
        quantize_file(path, part, calibrating)
        quantized = OnnxDetector(part, SCORE)
        f1 = agreement(detector, quantized, images[1::2])
        if f1 < min_agreement:
            raise UserError(
                f"the int8 model agrees with the float32 model by an F1 of {f1:.3f}, below --min-agreement "
                f"{min_agreement}: '{output}' was not written; give more images, or a lower --min-agreement"
            )
        ratio = speed_up(detector, quantized, images[:FEWEST])
    size = output.stat().st_size
    return (
        f"written: {output} ({size / 2**20:.1f} MiB, {size / path.stat().st_size:.0%} of float32)\n"
        f"agreement with float32 in {len(images[1::2])} other images: F1 {f1:.3f}; speed: {ratio:.2f} times float32"
    )


def quantize_file(path: Path, output: Path, images: Sequence[np.ndarray]) -> None:
    """Quantise the layers with weights of ``path`` by the values that they take in ``images``; write ``output``."""

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"image": image}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        level = logging.getLogger().level
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(output),
            Reader(),
            op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul"],
            nodes_to_quantize=weighted_nodes(prepared),
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            per_channel=True,
        )
        logging.getLogger().setLevel(level)
    quantized, original = onnx.load(output), onnx.load(path)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(original.metadata_props)
    onnx.save(quantized, output)


def weighted_nodes(path: Path) -> list[str]:
    """Return the names of the nodes that multiply by weights, other than the products of attention."""
    graph = onnx.load(path).graph
    weights = {value.name for value in graph.initializer}
    return [node.name for node in graph.node if len(node.input) > 1 and node.input[1] in weights]


def agreement(expected: OnnxDetector, found: OnnxDetector, images: Sequence[np.ndarray]) -> float:
    """Return the F1 of the detections of ``found``, with those of ``expected`` as truth, 0..1."""
    pairs = total = 0
    for image in images:
        a, b = expected(image), found(image)
        pairs += len(matched(a, b, OVERLAP))
        total += len(a.scores) + len(b.scores)
    return 2 * pairs / total if total else 1.0


def speed_up(one: OnnxDetector, other: OnnxDetector, images: Sequence[np.ndarray]) -> float:
    """Return how many times as fast the second detector is as the first, the median of alternating runs."""
    ratios = []
    for image in images:
        seconds = []
        for detector in (one, other):
            detector(image)
            start = time.perf_counter()
            detector(image)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
