"""Small real video files that tests make for themselves, each frame telling its own number."""

import pathlib

import av
import numpy as np


def numbered_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [count, height, width, 3]: frame k is grey with value 4 + 6 k, so it survives coding."""
    values = (4 + 6 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()


def frame_numbers(frames: np.ndarray) -> list[int]:
    """The inverse of `numbered_frames`, after lossy coding."""
    return np.rint((frames.mean(axis=(1, 2, 3)) - 4) / 6).astype(int).tolist()


def write(path: pathlib.Path, frames: np.ndarray, codec: str = "libx264", fps: int = 10, **options) -> str:
    """Encodes frames into a file whose container its suffix names; options are the encoder's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, height, width, _ = frames.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)
