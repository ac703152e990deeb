"""What is trained: model, data, loss and final evaluation of each task."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from videomae_jax.apps import reconstruct
from videomae_jax.config import Config, UserError
from videomae_jax.data import moving_shapes, pipeline, prepared, processes, sources
from videomae_jax.evaluation import reconstruction
from videomae_jax.interop import export
from videomae_jax.models import masking, tubelets
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.training import report
from videomae_jax.training.step import Batch

_FINAL_CLIPS = 64  # held-out clips that the final PSNR is measured on, at most


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Masked autoencoding (arXiv 2203.12602).

    Attributes:
        mask: "tube", "random" or "frame"; `mask_ratio` of it is hidden.
        normalize_target: predict normalised tubelets (published) or pixels in 0..1.
        loss_kind: "mse" (published), "l1" or "smooth_l1".
        stride: frames of the file from one frame of a clip to the next.
        clips_per_video: crops, each with its own mask, of the same decoded frames.
    """

    model: VideoMAEConfig
    mask: str
    mask_ratio: float
    normalize_target: bool
    loss_kind: str
    stride: int
    clips_per_video: int = 1

    @functools.cached_property
    def graphdef(self) -> Any:
        """The module without its parameters."""
        return nnx.graphdef(nnx.eval_shape(lambda: VideoMAE(self.model, rngs=nnx.Rngs(0))))

    def init(self, key: Key[Array, ""]) -> dict:
        """Parameters at the start of training, a nested dict of float32 arrays."""
        model = VideoMAE(self.model, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def masks(self, batch: Batch, root: Key[Array, ""]) -> masking.Indices:
        """(visible, hidden) of each example; a function of (root key, global example index) only."""
        grid = self.model.grid
        keys = jax.vmap(jax.random.fold_in, (None, 0))(mask_key(root), batch["index"])
        return masking.indices(keys, self.mask, grid, self.mask_ratio)

    def loss(self, params: dict, batch: Batch, root: Key[Array, ""]) -> Float[Array, ""]:
        """Mean reconstruction loss over the clips of weight 1.

        Args:
            batch: `video` uint8 [B, T, H, W, C], `index` uint32 [B] (global example index), `weight`
                float32 [B] (0 for a clip that could not be decoded).
        """
        model = nnx.merge(self.graphdef, params)
        visible, hidden = self.masks(batch, root)
        key = None
        if self.model.drop_path > 0:
            key = jax.random.fold_in(drop_path_key(root), batch["index"][0])
        losses = model.clip_losses(
            batch["video"], visible, hidden, self.normalize_target, self.loss_kind, key
        )
        weight = batch["weight"]
        return jnp.sum(weight * losses) / jnp.maximum(weight.sum(), 1)

    @property
    def clip_transform(self) -> pipeline.PretrainClip:
        """Record -> training clip."""
        frames, *size = self.model.clip_size
        return pipeline.PretrainClip(frames, self.stride, (size[0], size[1]), self.clips_per_video)

    def metadata(self) -> dict[str, Any]:
        """What is stored beside the parameters."""
        recipe = {
            "mask": self.mask,
            "mask_ratio": self.mask_ratio,
            "normalize_target": self.normalize_target,
            "loss": self.loss_kind,
            "stride": self.stride,
        }
        return export.metadata(self.model, recipe)

    def describe(self) -> str:
        """The model in half a line."""
        encoder, decoder, grid = self.model.encoder, self.model.decoder, self.model.grid
        visible, hidden = masking.counts(self.mask, grid, self.mask_ratio)
        return (
            f"encoder {encoder.width}x{encoder.depth}, decoder {decoder.width}x{decoder.depth}, "
            f"{visible} visible and {hidden} hidden tubelets, {self.model.compute.dtype}"
        )

    def finish(
        self,
        params: dict,
        held_out: sources.Source,
        config: Config,
        workdir: pathlib.Path,
    ) -> dict[str, Any]:
        """Reconstructs held-out clips: PSNR into the summary, pictures into the work folder.

        Clips and masks are the same for every run: the middle of each video, cropped to its centre.
        """
        chosen = held_out.select(_spread(len(held_out), _FINAL_CLIPS))
        of = self.clip_transform
        middle = pipeline.MiddleClip(of.frames, of.stride, of.size)
        clips, ids, bad = pipeline.middle_clips(chosen, middle)
        if not ids:
            report.say(f"no pictures: none of the {len(chosen)} held-out videos can be decoded")
            return {"reconstruction": None, "bad_held_out_videos": bad}
        model = nnx.merge(self.graphdef, jax.device_get(params))
        batch = {"index": jnp.arange(len(ids), dtype=jnp.uint32)}
        visible, hidden = self.masks(batch, jax.random.key(config.seed))
        panels = reconstruct.reconstruct(
            model, clips, visible, hidden, self.normalize_target, config.log.statistics
        )
        drawn = _spread(len(ids), config.log.pictures)
        for suffix in (".gif", ".png"):
            names = [ids[i] for i in drawn]
            reconstruct.write(panels.select(drawn), names, workdir / f"reconstruction{suffix}")
        figures = panels.psnr()
        report.say(
            f"PSNR of hidden tubelets in {len(ids)} held-out clips ({config.log.statistics} statistics): "
            f"model {figures['psnr_hidden']:.2f} dB, mean {figures['psnr_mean']:.2f} dB, nearest visible "
            f"tubelet {figures['psnr_nearest_visible']:.2f} dB; see {workdir / 'reconstruction.gif'}"
        )
        return {
            "reconstruction": {
                **figures,
                "statistics": config.log.statistics,
                "clips": len(ids),
            },
            "bad_held_out_videos": bad,
        }


def _spread(total: int, count: int) -> list[int]:
    """At most `count` of `total` places, evenly spread, so that every class folder has its share."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def mask_key(root: Key[Array, ""]) -> Key[Array, ""]:
    """The stream that masks are drawn from."""
    return jax.random.fold_in(root, 0)


def drop_path_key(root: Key[Array, ""]) -> Key[Array, ""]:
    """The stream that drop path is drawn from."""
    return jax.random.fold_in(root, 1)


def make_task(config: Config) -> Pretrain:
    """The task that a config names.

    Raises:
        UserError: an unknown task, or sizes and settings that do not fit together.
    """
    if config.task != "pretrain":
        raise UserError(f"task={config.task!r} is unknown: use pretrain")
    model = config.model.to_dict()
    dtype, unroll, remat = (model.pop(name) for name in ("dtype", "unroll", "remat"))
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model |= {
        "clip_size": (config.data.frames, *config.data.size),
        "compute": {"dtype": dtype, "unroll": unroll, "remat": remat},
    }
    try:
        task = Pretrain(
            model=VideoMAEConfig.from_dict(model),
            mask=config.mask.kind,
            mask_ratio=config.mask.ratio,
            normalize_target=config.loss.normalize_target,
            loss_kind=config.loss.kind,
            stride=config.data.stride,
            clips_per_video=config.data.clips_per_video,
        )
        masking.counts(task.mask, task.model.grid, task.mask_ratio)
    except ValueError as error:
        raise UserError(str(error)) from None
    if task.loss_kind not in tubelets.LOSSES:
        raise UserError(f"loss.kind={task.loss_kind!r} is unknown: use {', '.join(tubelets.LOSSES)}")
    if config.log.statistics not in reconstruction.STATISTICS:
        modes = ", ".join(reconstruction.STATISTICS)
        raise UserError(f"log.statistics={config.log.statistics} is unknown: use {modes}")
    if config.log.statistics != "raw" and not task.normalize_target:
        raise UserError(
            f"log.statistics={config.log.statistics} is for normalised targets: with "
            f"loss.normalize_target=False set --config.log.statistics=raw"
        )
    return task


def open_data(
    config: Config,
) -> tuple[sources.Source, sources.Source]:
    """(training videos, held-out videos) of `data.path`; generates moving_shapes where it is named.

    Held-out videos are those of a validation folder; without one they are taken from the training videos,
    and a set too small for that shows training clips at the end.

    Raises:
        SourceError: nothing to read.
    """
    data = config.data
    path = data.path
    if not path:
        raise UserError(
            "data.path is empty: name a folder of videos, a CSV list, prepared data, or moving_shapes"
        )
    if path == "moving_shapes":
        path = str(_moving_shapes(data.generate))
    train = prepared.open_source(path, "train")
    if prepared.has_split(path, "validation"):
        return train, prepared.open_source(path, "validation")
    kept, held_out = sources.hold_out(train, data.held_out)
    if not len(held_out):
        report.say(f"{len(train)} videos are too few to hold any out: pictures show training clips")
        return train, train
    return kept, held_out


def _moving_shapes(generate: Config) -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(cache, "videomae_jax")
    report.say(f"moving_shapes: {generate.videos} training videos, cached in {folder}")
    spec = moving_shapes.MovingShapes(**generate)
    try:
        return moving_shapes.generate(spec, folder, processes=processes.usable_cores())
    except ValueError as error:
        raise UserError(f"data.generate: {error}") from None
