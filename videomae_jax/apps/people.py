"""Where people are in a frame: finders of boxes for `detect`, the whole frame among them."""

import importlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float

from videomae_jax.config import UserError
from videomae_jax.evaluation import detection

Find = Callable[[np.ndarray], tuple[Float[np.ndarray, "R 4"], Float[np.ndarray, " R"]]]
"""uint8 RGB [H, W, 3] -> (boxes in parts of the frame, how sure of each)"""

_CHOSEN = 1000  # boxes at most of models that choose by themselves
_OVERLAP = 0.5  # of two boxes that are one person's


_WINDOW = (64, 128)  # width and height of what OpenCV's detector looks at


def whole(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frame as one box."""
    return np.array([[0.0, 0.0, 1.0, 1.0]], np.float32), np.ones(1, np.float32)


def opencv() -> Find:
    """OpenCV's people detector of 2005 (histograms of gradients): needs no download and is weak.

    It finds upright people of 96 pixels and more, seen whole.

    Raises:
        UserError: OpenCV is a version without it.
    """
    library: Any = cv2  # its types leave the detector out
    if not hasattr(library, "HOGDescriptor"):
        raise UserError("this OpenCV has no people detector: install a version below 5")
    finder = library.HOGDescriptor()
    finder.setSVMDetector(library.HOGDescriptor_getDefaultPeopleDetector())

    def find(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = frame.shape[:2]
        scale = min(max(480 / height, 1.0), 2.0)
        size = (round(width * scale), round(height * scale))
        # OpenCV reads beyond an image that is smaller than the detector's window, and crashes.
        lack = [max(side - have, 0) for side, have in zip(_WINDOW, size, strict=True)]
        padded = cv2.copyMakeBorder(
            cv2.resize(frame, size), 0, lack[1], 0, lack[0], cv2.BORDER_CONSTANT, value=(127, 127, 127)
        )
        found, sure = finder.detectMultiScale(padded, winStride=(8, 8), scale=1.05)
        corners = np.array(found, np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        # Its boxes have a wide margin around the person.
        wide, high = (corners[:, 2:] - corners[:, :2]).T
        corners += np.stack([0.15 * wide, 0.07 * high, -0.15 * wide, -0.07 * high], axis=1)
        corners = np.clip(corners / np.array([*size, *size], np.float32), 0, 1)
        sure = 1 / (1 + np.exp(-np.array(sure, np.float32).reshape(-1)))
        inside = (corners[:, 2:] > corners[:, :2]).all(1)
        return best(corners[inside], sure[inside])

    return find


def torchvision(threshold: float) -> Find:
    """Torchvision's Faster R-CNN of COCO, whose first class is people; downloads its weights once.

    Raises:
        UserError: torchvision is not installed.
    """
    torch, detectors = _module("torch", "torch"), _module("torchvision.models.detection", "torch")
    model = detectors.fasterrcnn_resnet50_fpn(weights="DEFAULT").eval()

    def find(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            pixels = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))).float() / 255
            found = {name: np.asarray(value) for name, value in model([pixels])[0].items()}
        kept = (found["labels"] == 1) & (found["scores"] >= threshold)
        height, width = frame.shape[:2]
        size = np.array([width, height, width, height], np.float32)
        return best(np.clip(found["boxes"][kept] / size, 0, 1), found["scores"][kept])

    return find


def onnx(path: str, threshold: float) -> Find:
    """A detector of one's own: an ONNX file that answers as YOLO models do, the first class being people.

    It takes RGB [1, 3, S, S] in 0..1, the frame in the upper left; it gives centre, width and height in those
    pixels and then scores of classes, [1, 4 + K, N] (YOLOv8 and later) or, with a score of being anything
    first, [1, N, 5 + K] (YOLOv5); or corners, score and class of the boxes it chose, [1, N, 6], N <= 1,000.

    Raises:
        UserError: onnxruntime is not installed, or a file that it does not take.
    """
    runtime = _module("onnxruntime", "onnx")
    try:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds
        raise UserError(
            f"--boxes=onnx:{path} cannot be read ({' '.join(str(error).split())[:160]})"
        ) from None
    source = session.get_inputs()[0]
    side = source.shape[-1] if isinstance(source.shape[-1], int) else 640

    def find(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = frame.shape[:2]
        scale = side / max(height, width)
        size = (round(width * scale), round(height * scale))
        canvas = np.full((side, side, 3), 114, np.uint8)
        canvas[: size[1], : size[0]] = cv2.resize(frame, size)
        pixels = canvas.transpose(2, 0, 1)[None].astype(np.float32) / 255
        answer = np.asarray(session.run(None, {source.name: pixels})[0])
        if answer.ndim != 3 or min(answer.shape[1:]) < 5:
            raise UserError(f"--boxes=onnx:{path} answers {list(answer.shape)}: not as YOLO models do")
        if answer.shape[2] == 6 and answer.shape[1] <= _CHOSEN:  # corners, score, class: chosen already
            rows = answer[0][(answer[0][:, 5] == 0) & (answer[0][:, 4] >= threshold)]
            return best(np.clip(rows[:, :4] / np.array([*size, *size], np.float32), 0, 1), rows[:, 4])
        rows = answer[0].T if answer.shape[1] < answer.shape[2] else answer[0]
        sure = rows[:, 4] if answer.shape[1] < answer.shape[2] else rows[:, 4] * rows[:, 5]
        rows, sure = rows[sure >= threshold], sure[sure >= threshold]
        middle, half = rows[:, :2], rows[:, 2:4] / 2
        corners = np.concatenate([middle - half, middle + half], axis=1)
        return best(np.clip(corners / np.array([*size, *size], np.float32), 0, 1), sure)

    return find


def best(corners: np.ndarray, sure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of boxes that overlap much the surest alone; none without area."""
    order = np.argsort(-sure, kind="stable")
    order = order[(corners[order, 2:] > corners[order, :2]).all(1)]
    overlap = detection.overlaps(corners[order], corners[order])
    kept: list[int] = []
    for place in range(len(order)):
        if not any(overlap[place, other] > _OVERLAP for other in kept):
            kept.append(place)
    chosen = order[kept]
    return corners[chosen].astype(np.float32), sure[chosen].astype(np.float32)


def _module(name: str, extra: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: EXTRAS={extra} launch/local.sh detect ...") from None
