"""Does a data set ask for motion? A masked autoencoder against the same one that sees one time slice.

    .venv/bin/python benchmarks/one_slice.py --workdir=runs/one_slice
    .venv/bin/python benchmarks/one_slice.py --config=small --workdir=runs/one_slice

The second model is trained on clips of a single tubelet's frames, as many times more of them from each video:
as many tokens, predicted as often, and none can look at another time. Where it fills in hidden places as well
as the full model, nothing about motion need be learnt.

Of held-out videos, at the same hidden places for both: PSNR, and how much of what changes with time is
explained (100: all, 0: as much as nothing would, if it changed nothing). What stands still is most of the
PSNR, and one slice tells it as well as all. Prints one table and one JSON line. The same command goes on
after an interruption.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from methods import settings, show, train

from videomae_jax.config import Config
from videomae_jax.data import pipeline
from videomae_jax.evaluation import reconstruction
from videomae_jax.interop import export
from videomae_jax.models import masking, tubelets
from videomae_jax.models.mae import VideoMAE
from videomae_jax.training import splits

_CLIPS = 256  # held-out ones, at most


def full(name: str, steps: int, seed: int) -> Config:
    """The settings of the full model."""
    config = settings(name, "stage=pretrain" if name == "study" else "", seed)
    if config.mask.kind != "tube" or config.loss.normalize_target:
        raise SystemExit(f"{name}: tube masking of pixels is compared")
    config.optim.update(unit="steps", duration=steps, warmup=steps // 20)
    config.checkpoint.every = steps
    return config


def one_slice(name: str, steps: int, seed: int) -> Config:
    """Those of the model that sees one slice."""
    config = full(name, steps, seed)
    times = config.data.frames // config.model.tubelet[0]
    config.data.frames = config.model.tubelet[0]
    config.data.batch_size *= times
    config.data.clips_per_video *= times  # so the rate, which follows the videos, stays
    return config


def held_out(config: Config) -> tuple[np.ndarray, masking.Indices]:
    """Clips of the validation part, uint8 [B, T, H, W, 3], and (visible, hidden) places of one slice."""
    validation = splits.open_splits(config).validation
    frames, stride, size = config.data.frames, config.data.stride, config.data.size
    chosen = validation.select(splits.spread(len(validation), _CLIPS))
    clips, ids, bad = pipeline.middle_clips(chosen, pipeline.MiddleClip(frames, stride, size))
    assert not bad
    grid = tubelets.grid_of((config.model.tubelet[0], *size), config.model.tubelet)
    keys = jax.random.split(jax.random.key(0), len(ids))
    return clips, masking.indices(keys, "tube", grid, config.mask.ratio)


def predicted(
    folder: pathlib.Path, clips: np.ndarray, places: masking.Indices
) -> tuple[jax.Array, jax.Array]:
    """(prediction, truth) of hidden places in pixels, [B, T/t, M, t, voxels], of a model's best guess."""
    model = export.load(folder)
    assert isinstance(model, VideoMAE)
    frames, (t, *_) = model.config.clip_size[0], model.config.tubelet
    parts = clips.shape[1] // frames  # clips of this model in one of these
    video = jnp.asarray(clips.reshape(-1, frames, *clips.shape[2:]))
    per_slice = np.prod(model.config.grid[1:])

    def everywhere(chosen: jax.Array) -> jax.Array:
        """Tokens [B * parts, K] of places in a slice."""
        shifts = jnp.arange(frames // t)[:, None] * per_slice
        return jnp.repeat((chosen[:, None] + shifts).reshape(len(chosen), -1), parts, axis=0)

    visible, hidden = (everywhere(chosen) for chosen in places)
    truth = tubelets.take(tubelets.patchify(video, model.config.tubelet), hidden) / 255
    shape = (len(clips), clips.shape[1] // t, places[1].shape[1], t, -1)
    guess = jnp.clip(model.predict(video, visible, hidden), 0, 1)
    return guess.reshape(shape), truth.reshape(shape)


def score(guess: jax.Array, truth: jax.Array) -> dict[str, float]:
    """PSNR, and how much of the change with time is explained, in per cent."""
    change, found = (x - x.mean((1, 3), keepdims=True) for x in (truth, guess))
    explained = 1 - jnp.square(found - change).sum() / jnp.square(change).sum()
    error = float(jnp.square(guess - truth).mean())
    return {"dB": reconstruction.psnr(error), "change, %": 100 * float(explained)}


def compare(name: str, steps: int, seed: int, workdir: pathlib.Path) -> dict[str, float]:
    """The figures of both models."""
    clips, places = held_out(full(name, steps, seed))
    figures = {}
    for kind in (full, one_slice):
        config, folder = kind(name, steps, seed), workdir / f"{name}_{kind.__name__}_{steps}_{seed}"
        train(config, folder)
        title = kind.__name__.replace("_", " ")
        found = score(*predicted(folder, clips, places))
        figures |= {f"{title}, {figure}": value for figure, value in found.items()}
    return figures


def main() -> None:
    """Both models with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", choices=("study", "small"), default="study")
    parser.add_argument("--workdir", default="runs/one_slice")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    started, workdir = time.time(), pathlib.Path(arguments.workdir).absolute()
    runs = [compare(arguments.config, arguments.steps, seed, workdir) for seed in range(arguments.seeds)]
    show(runs, arguments, started)


if __name__ == "__main__":
    main()
