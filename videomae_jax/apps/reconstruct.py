"""Pictures of what a masked autoencoder reconstructs: original | masked | reconstructed."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from videomae_jax import storage
from videomae_jax.apps import videos
from videomae_jax.config import UserError
from videomae_jax.data import augment, decode, reading, sampling
from videomae_jax.evaluation import classification, reconstruction
from videomae_jax.interop import weights
from videomae_jax.models import masking, tubelets
from videomae_jax.models.detector import ActionDetector
from videomae_jax.models.mae import VideoMAE
from videomae_jax.storage import Place

SUFFIXES = (".gif", ".mp4", ".png")
_CLIPS_AT_ONCE = 8  # on the device; more would need memory for attention over all tokens of each
_LABELS = {
    "true": "reconstructed (true statistics)",
    "visible": "reconstructed (visible statistics)",
    "raw": "reconstructed (raw prediction)",
}


@dataclasses.dataclass(frozen=True)
class Panels:
    """Clips before and after, uint8 [B, T, H, W, 3], and mean squared errors per clip over hidden voxels.

    Attributes:
        errors: "hidden" (the model), "mean" and "nearest_visible" (needing no learning), each [B], of
            pixels in 0..1 shown in the same statistics mode.
    """

    original: np.ndarray
    masked: np.ndarray
    reconstructed: np.ndarray
    statistics: str
    errors: dict[str, np.ndarray]

    def psnr(self) -> dict[str, float]:
        """PSNR in dB over the hidden voxels of all clips: psnr_hidden, psnr_mean, psnr_nearest_visible."""
        return {f"psnr_{name}": reconstruction.psnr(float(e.mean())) for name, e in self.errors.items()}

    def select(self, clips: list[int]) -> "Panels":
        """Those clips only."""
        return Panels(
            self.original[clips],
            self.masked[clips],
            self.reconstructed[clips],
            self.statistics,
            {name: error[clips] for name, error in self.errors.items()},
        )


def reconstruct(
    model: VideoMAE,
    video: np.ndarray,
    names: list[str],
    visible: jax.Array,
    hidden: jax.Array,
    normalize_target: bool,
    statistics: str,
) -> Panels:
    """Reconstructs uint8 clips [B, T, H, W, 3] from their visible tubelets.

    Args:
        names: of the clips, in errors.
        normalize_target: what the model was trained to predict.
        statistics: where mean and contrast of hidden tubelets come from, see `evaluation.reconstruction`.

    Raises:
        ValueError: a statistics mode that does not fit the target, or a video that does not fit the model.
        OutputError: a prediction that is not finite.
    """
    graphdef, params = nnx.split(model)
    parts = []
    for start in range(0, len(video), _CLIPS_AT_ONCE):
        rows = slice(start, start + _CLIPS_AT_ONCE)
        clips = (jnp.asarray(video[rows]), visible[rows], hidden[rows])
        parts.append(jax.device_get(_reconstruct(graphdef, params, *clips, normalize_target, statistics)))
    masked, filled, errors = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    classification.check_finite(filled, names, "reconstruction")
    masked, filled = (np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8) for x in (masked, filled))
    return Panels(np.asarray(video), masked, filled, statistics, errors)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _reconstruct(graphdef, params, video, visible, hidden, normalize_target, statistics):
    model: VideoMAE = nnx.merge(graphdef, params)
    tubelet, channels = model.config.tubelet, model.config.channels
    _, t, h, w, _ = video.shape
    grid = tubelets.grid_of((t, h, w), tubelet)
    raw = tubelets.patchify(video, tubelet)
    raw_visible, raw_hidden = tubelets.take(raw, visible), tubelets.take(raw, hidden)
    nearest = reconstruction.nearest_visible(visible, hidden, grid)

    def show(values):
        return reconstruction.to_pixels(
            values, raw_hidden, raw_visible, nearest, channels, normalize_target, statistics
        )

    truth = show(tubelets.reconstruction_target(raw_hidden, channels, normalize_target))
    guesses = {"hidden": model.predict(video, visible, hidden)}
    guesses |= reconstruction.trivial_predictions(raw_visible, nearest, channels, normalize_target)
    pixels = {name: show(values) for name, values in guesses.items()}
    errors = {n: reconstruction.squared_errors(p, truth) for n, p in pixels.items()}
    back = jnp.argsort(jnp.concatenate([visible, hidden], axis=1), axis=1)

    def picture(filling):
        tokens = jnp.concatenate([raw_visible / 255, filling], axis=1)
        return tubelets.unpatchify(tubelets.take(tokens, back), grid, tubelet)

    return picture(jnp.full_like(truth, 0.5)), picture(pixels["hidden"]), errors


def draw(panels: Panels, names: list[str], png: bool) -> np.ndarray:
    """Lays clips out for the eye: uint8 [T, height, width, 3]; with `png` one sheet of up to 8 frames.

    Moving pictures have a row per clip and a column per kind; the sheet a row per clip and kind and a
    column per frame. Small clips are enlarged by a whole factor.
    """
    kinds = (panels.original, panels.masked, panels.reconstructed)
    labels = ("original", "masked", _LABELS[panels.statistics])
    _, frames, height, _, _ = panels.original.shape
    scale = max(1, round((96 if png else 224) / height))
    kinds = tuple(k.repeat(scale, axis=2).repeat(scale, axis=3) for k in kinds)
    gap, text = 4, 18
    if png:
        chosen = np.unique(np.linspace(0, frames - 1, min(frames, 8)).round().astype(int))
        sheets = [
            _stack([_stack(list(kind[clip][chosen]), axis=1, gap=gap)[None] for kind in kinds], gap)
            for clip in range(len(panels.original))
        ]
        return _titled(sheets, names, [f"rows: {', '.join(labels)}"], text, gap)
    rows = [_stack([kind[clip] for kind in kinds], gap, axis=2) for clip in range(len(panels.original))]
    return _titled(rows, names, list(labels), text, gap)


def _stack(images: list[np.ndarray], gap: int, axis: int = 1) -> np.ndarray:
    """Joins images along an axis with white gaps."""
    shape = list(images[0].shape)
    shape[axis] = gap
    blank = np.full(shape, 255, np.uint8)
    joined = [part for image in images for part in (image, blank)][:-1]
    return np.concatenate(joined, axis=axis)


def _titled(rows: list[np.ndarray], names: list[str], labels: list[str], text: int, gap: int) -> np.ndarray:
    """Puts column labels above and each clip's name above its row; all frames alike."""
    frames, _, width, _ = rows[0].shape
    parts = [_caption(labels, width, text)]
    for name, row in zip(names, rows, strict=True):
        parts += [_caption([name], width, text), row]
    parts = [np.broadcast_to(p, (frames, *p.shape[-3:])) for p in parts]
    out = _stack(parts, gap)
    return np.pad(out, ((0, 0), (0, out.shape[1] % 2), (0, out.shape[2] % 2), (0, 0)))


def _caption(texts: list[str], width: int, height: int) -> np.ndarray:
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for column, text in enumerate(texts):
        place = (column * width // len(texts) + 2, 1)
        pen.text(place, text, "black", font=ImageFont.load_default(height - 6))
    return np.asarray(image)[None]


def write(panels: Panels, names: list[str], place: Place, fps: float = 8.0) -> None:
    """Draws panels into a .gif, .mp4 or .png file.

    Raises:
        UserError: another suffix.
    """
    suffix = place.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{place} has an unknown suffix: use {', '.join(SUFFIXES)}")
    with storage.output(place) as path:
        _write_frames(draw(panels, names, png=suffix == ".png"), path, fps)


def _write_frames(frames: np.ndarray, path: pathlib.Path, fps: float) -> None:
    if path.suffix.lower() == ".mp4":
        decode.write_video(path, frames, fps=round(fps))
        return
    images = [Image.fromarray(frame) for frame in frames]
    if path.suffix.lower() == ".png":
        images[0].save(path)
    else:
        later = {"save_all": True, "append_images": images[1:], "loop": 0}
        images[0].save(path, duration=round(1000 / fps), **later)


def run(
    video: str,
    checkpoint: str,
    out: str,
    *,
    statistics: str,
    mask: str,
    mask_ratio: float,
    start: float,
    seed: int,
    hints: weights.Hints,
) -> Panels:
    """Draws one clip of a video file as a model reconstructs it; beside OUT, figures and settings as .json.

    Args:
        statistics: "" takes "true" for a model trained on normalised tubelets and "raw" for one on pixels.
        mask, mask_ratio: "" or 0 takes what the model was trained with.
        start: seconds into the video at which the clip begins; negative: the clip is the middle of the video.
        seed: of the mask.
        hints: what a file of weights does not tell; the stride counts for any.

    Raises:
        UserError: an unknown file type, or a setting that the model's recipe does not give.
        DecodeError: the video cannot be decoded.
        ExportError: `checkpoint` holds no model.
    """
    path = storage.at(out)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out={out} has an unknown suffix: use {', '.join(SUFFIXES)}")
    if hints.stride == 0 or mask_ratio < 0 or not mask_ratio < 1:
        raise UserError("--stride must be at least 1 and --mask_ratio between 0 and 1")
    videos.make_room(path, [video])
    model = weights.read(checkpoint, hints)
    if not isinstance(model, VideoMAE):
        kind = "detector" if isinstance(model, ActionDetector) else "classifier"
        raise UserError(f"{checkpoint} holds a {kind}, which reconstructs nothing: pass a pretraining model")
    recipe = {"normalize_target": True, **weights.read_recipe(checkpoint, hints)}
    given = {"mask": mask, "mask_ratio": mask_ratio}
    recipe |= {name: value for name, value in given.items() if value}
    missing = [name for name in (*given, "stride") if name not in recipe]
    if missing:
        raise UserError(f"{checkpoint} does not say how it was trained: give --{missing[0]}")
    frames, height, width = model.config.clip_size
    with reading.open_video(video, video) as opened:
        first, left = 0, opened.num_frames
        if start >= 0:
            if opened.fps and start > opened.num_frames / opened.fps:
                seconds = opened.num_frames / opened.fps
                raise UserError(f"--start={start:g}: {video} ends after {seconds:.1f} s")
            first = opened.index_at(start)
            left = min(opened.num_frames - first, frames * recipe["stride"])
        wanted = first + sampling.pretrain_clip(left, frames, recipe["stride"], None)
        clip = augment.centre_crop(opened.read(wanted), (height, width))
        fps = opened.fps / recipe["stride"] or 8.0
    keys = jax.random.split(jax.random.key(seed), 1)
    normalized = recipe["normalize_target"]
    statistics = statistics or ("true" if normalized else "raw")
    try:
        indices = masking.indices(keys, recipe["mask"], model.config.grid, recipe["mask_ratio"])
        panels = reconstruct(model, clip[None], [video], *indices, normalized, statistics)
    except ValueError as error:
        raise UserError(str(error)) from None
    write(panels, [pathlib.Path(video).name], path, fps=min(max(fps, 2.0), 30.0))
    told = {"video": video, "frames": wanted.tolist(), "checkpoint": checkpoint, "seed": seed}
    told |= {name: recipe[name] for name in given} | {"statistics": statistics, "psnr": panels.psnr()}
    storage.write_text(path.with_suffix(".json"), json.dumps(told, indent=1) + "\n")
    return panels
