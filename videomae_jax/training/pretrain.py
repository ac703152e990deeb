"""Pretraining: a masked autoencoder, k-NN on its features meanwhile, pictures at the end."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from videomae_jax import hosts, sharding
from videomae_jax.apps import reconstruct
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline, sources
from videomae_jax.evaluation import classification, neighbours
from videomae_jax.interop import export
from videomae_jax.models import masking, vit
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.storage import Place
from videomae_jax.training import report, testing
from videomae_jax.training.splits import Splits, spread
from videomae_jax.training.step import Batch, TrainState, clip_keys

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
        keys = clip_keys(root, "mask", batch["index"])
        return masking.indices(keys, self.mask, self.model.grid, self.mask_ratio)

    def clip_losses(
        self, params: dict, batch: Batch, root: Key[Array, ""], _step: Int[Array, ""]
    ) -> Float[Array, " B"]:
        """Reconstruction loss of each clip.

        Args:
            batch: `video` uint8 [B, T, H, W, C], `index` uint32 [B] (global example index).
        """
        model = nnx.merge(self.graphdef, params)
        visible, hidden = self.masks(batch, root)
        keys = clip_keys(root, "drop_path", batch["index"]) if self.model.drop_path > 0 else None
        return model.clip_losses(batch["video"], visible, hidden, self.normalize_target, self.loss_kind, keys)

    def pooled(self, params: dict, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """Mean of all tokens of whole clips: what k-NN looks at."""
        return nnx.merge(self.graphdef, params).raw_features(video)

    def flops_per_clip(self) -> float:
        """Floating-point operations of a clip's forward and backward pass; see `vit.block_flops`."""
        c, decoder = self.model, self.model.decoder
        assert decoder is not None
        visible, hidden = masking.counts(self.mask, c.grid, self.mask_ratio)
        voxels, width = math.prod(c.tubelet) * c.channels, c.encoder.width
        forward = 2 * visible * width * (voxels + decoder.width) + 2 * hidden * decoder.width * voxels
        forward += vit.block_flops(c.encoder, visible) + vit.block_flops(decoder, visible + hidden)
        return 3.0 * forward

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
        return export.metadata(VideoMAE, self.model, recipe)

    def describe(self) -> str:
        """The model in half a line."""
        encoder, decoder, grid = self.model.encoder, self.model.decoder, self.model.grid
        assert decoder is not None
        visible, hidden = masking.counts(self.mask, grid, self.mask_ratio)
        return (
            f"encoder {encoder.width}x{encoder.depth}, decoder {decoder.width}x{decoder.depth}, "
            f"{visible} visible and {hidden} hidden tubelets, {self.model.compute.dtype}"
        )

    def validator(
        self, train: sources.Source, held_out: sources.Source, config: Config, mesh: Mesh
    ) -> Callable[[Any], dict[str, float]]:
        """(params) -> knn_top1 of held-out videos among the training videos; needs labels.

        Raises:
            UserError: the videos have no classes, or there are none to hold out.
        """
        if len(train.classes) < 2 or train is held_out or min(train.labels + held_out.labels) < 0:
            raise UserError(
                f"evaluate.every={config.evaluate.every}: k-NN while pretraining needs labelled videos, some "
                f"of them held out; set --config.evaluate.every=0"
            )
        train = train.select(spread(len(train), config.evaluate.knn_videos))
        held_out = sources.relabel(held_out, train.classes)
        of = self.clip_transform
        clip = pipeline.ValidationClip(of.frames, of.stride, of.size)
        sides = [testing.Evaluator(self.pooled, side, clip, config, mesh) for side in (train, held_out)]

        def validate(params: Any) -> dict[str, float]:
            known, asked = (
                (outputs.values[:, 0], np.asarray(side.source.labels)[outputs.records])
                for side in sides
                for outputs in [side.run(params)]
            )
            settings = (config.evaluate.neighbours, config.evaluate.temperature)
            lost = sum(int((~np.isfinite(values).all(axis=1)).sum()) for values, _ in (known, asked))
            if lost:
                report.say(
                    f"warning: the features of {lost} videos are not finite: k-NN counts them as wrong"
                )
            if not np.isfinite(known[0]).all(axis=1).any():
                return {"knn_top1": 0.0}
            scores = neighbours.votes(*known, asked[0], len(train.classes), *settings)
            return {"knn_top1": float((classification.label_ranks(scores, asked[1]) == 0).mean())}

        return validate

    def finish(
        self, state: TrainState, splits: Splits, config: Config, workdir: Place, mesh: Mesh
    ) -> dict[str, Any]:
        """Reconstructs held-out clips: PSNR into the summary, pictures into the work folder; on one host.

        Clips and masks are the same for every run: the middle of each video, cropped to its centre.
        """
        params = jax.device_get(sharding.replicate(state.params, mesh))
        if not hosts.is_writer():
            return {}
        held_out = splits.validation
        chosen = held_out.select(spread(len(held_out), _FINAL_CLIPS))
        of = self.clip_transform
        middle = pipeline.MiddleClip(of.frames, of.stride, of.size)
        clips, ids, bad = pipeline.middle_clips(chosen, middle)
        if not ids:
            report.say(f"no pictures: none of the {len(chosen)} held-out videos can be decoded")
            return {"reconstruction": None, "bad_held_out_videos": bad}
        model = nnx.merge(self.graphdef, params)
        batch = {"index": jnp.arange(len(ids), dtype=jnp.uint32)}
        visible, hidden = self.masks(batch, jax.random.key(config.seed))
        panels = reconstruct.reconstruct(
            model, clips, ids, visible, hidden, self.normalize_target, config.log.statistics
        )
        drawn = spread(len(ids), config.log.pictures)
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
