"""Detect objects with a file of ``relvit-d2 export-model``; needs onnxruntime, NumPy and Pillow only.

python onnx_detect.py detector.onnx photo.jpg detections.png [minimum score]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the pixels (height, width) of an object from the probabilities (M, M) that cover its box."""
    weights = []
    for start, end, size in ((box[1], box[3], height), (box[0], box[2], width)):
        places = (np.arange(size) + 0.5 - start) / (end - start) * len(mask) - 0.5  # in cells of the mask
        weights.append(np.maximum(1 - np.abs(places[:, None] - np.arange(len(mask))), 0))  # bilinear
    return weights[0] @ mask @ weights[1].T >= 0.5


def main(model: str, source: str, target: str, threshold: float = 0.5) -> None:
    """Print the detections in an image and draw them."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    image = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    boxes, scores, classes, *masks = session.run(None, {"image": np.asarray(image)})
    draw = ImageDraw.Draw(image)
    for index in np.flatnonzero(scores >= float(threshold)):
        name, box = class_names[classes[index]], boxes[index]
        print(f"{name} {scores[index]:.3f}", *(f"{value:.1f}" for value in box))
        if masks:
            shape = Image.fromarray(paste(masks[0][index], box, image.height, image.width))
            draw.bitmap((0, 0), shape, "orange")
        draw.rectangle(box.tolist(), outline="blue", width=2)
        draw.text(box[:2].tolist(), name, "blue")
    image.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
