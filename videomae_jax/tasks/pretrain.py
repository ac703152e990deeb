"""Pretraining: a masked autoencoder, k-NN on its features meanwhile, pictures at the end."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from videomae_jax import hosts, sharding
from videomae_jax.apps import reconstruct
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.evaluation import reconstruction
from videomae_jax.interop import export
from videomae_jax.models import masking, resizing, vit
from videomae_jax.models.layout import Layout
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.tasks import backbone, masked
from videomae_jax.tasks.masked import Masked
from videomae_jax.training import report
from videomae_jax.training.splits import spread
from videomae_jax.training.step import Batch, Terms, TrainState, clip_keys
from videomae_jax.training.task import Run

_FINAL_CLIPS = 64  # held-out clips that the final PSNR is measured on, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(Masked):
    """Masked autoencoding (arXiv 2203.12602).

    Attributes:
        normalize_target: predict normalised tubelets (published) or pixels in 0..1.
        decoder_mask: "running_cell": the decoder sees mask tokens at the places that it keeps only, without
            `decoder_ratio` of all, and the loss is over those of them that are hidden (VideoMAE V2, arXiv
            2303.16727). "none": at all hidden places, as in V1.
    """

    normalize_target: bool
    decoder_mask: str = "none"
    decoder_ratio: float = 0.5
    last_phase: ClassVar[str] = "pictures"

    def start(self, config: Config, names: list[str]) -> dict[str, np.ndarray]:
        """The encoder of `init_from`, and its decoder where it has the same sizes; see `transfer.read`."""
        return backbone.start(config, self.model, names)

    def decoded(
        self, batch: Batch, root: Key[Array, ""], hidden: Int[Array, "B M"]
    ) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
        """(where the decoder has mask tokens, which of them count in the loss), of each example.

        As published, the running cell keeps places that the encoder sees too: they are decoded, and do not
        count.
        """
        if self.decoder_mask == "none":
            return hidden, jnp.ones(hidden.shape)
        keys = clip_keys(root, "decoder_mask", batch["index"])
        kept = masking.running_cell(keys, self.model.grid, self.decoder_ratio)
        is_hidden = masking.to_mask(hidden, math.prod(self.model.grid))
        return kept, jnp.take_along_axis(is_hidden, kept, axis=1).astype(jnp.float32)

    def terms(
        self,
        params: dict,
        others: None,
        batch: Batch,
        root: Key[Array, ""],
        step: Int[Array, ""],
        layout: Layout,
    ) -> Terms:
        """Reconstruction loss, a mean over the tubelets that count; see `Task.terms`."""
        model = nnx.merge(self.graphdef, params)
        visible, hidden = self.masks(batch, root)
        places, counts = self.decoded(batch, root, hidden)
        keys = clip_keys(root, "drop_path", batch["index"]) if self.model.drop_path > 0 else None
        how = (self.normalize_target, self.loss_kind)
        video = resizing.clips(batch, self.model.clip_size[1:])
        losses = model.token_losses(video, visible, places, *how, keys, layout)
        counts = batch["weight"][:, None] * counts
        return Terms((counts * losses).sum(), counts.sum(), {})

    def flops_per_clip(self) -> float:
        """Floating-point operations of a clip's forward and backward pass; see `vit.block_flops`."""
        c, decoder = self.model, self.model.decoder
        assert decoder is not None
        visible, hidden = self._counts()
        voxels, width = math.prod(c.tubelet) * c.channels, c.encoder.width
        forward = 2 * visible * width * (voxels + decoder.width) + 2 * hidden * decoder.width * voxels
        forward += vit.block_flops(c.encoder, visible) + vit.block_flops(decoder, visible + hidden)
        return 3.0 * forward

    def _counts(self) -> tuple[int, int]:
        """How many tokens the encoder sees, and at how many places the decoder predicts."""
        visible, hidden = masking.counts(self.mask, self.model.grid, self.mask_ratio)
        if self.decoder_mask == "none":
            return visible, hidden
        return visible, masking.running_cell_count(self.model.grid, self.decoder_ratio)

    def metadata(self) -> dict[str, Any]:
        """What is stored beside the parameters."""
        recipe = {
            "mask": self.mask,
            "mask_ratio": self.mask_ratio,
            "normalize_target": self.normalize_target,
            "loss": self.loss_kind,
            "stride": self.stride,
        }
        if self.decoder_mask != "none":
            recipe |= {"decoder_mask": self.decoder_mask, "decoder_ratio": self.decoder_ratio}
        return export.metadata(VideoMAE, self.model, recipe)

    def describe(self) -> str:
        """The model in half a line."""
        encoder, decoder = self.model.encoder, self.model.decoder
        assert decoder is not None
        visible, decoded = self._counts()
        return (
            f"encoder {encoder.width}x{encoder.depth}, decoder {decoder.width}x{decoder.depth}, "
            f"{visible} visible and {decoded} predicted tubelets, {self.model.compute.dtype}"
        )

    def finish(self, run: Run, state: TrainState) -> dict[str, Any]:
        """Reconstructs held-out clips: PSNR into the summary, pictures into the work folder; on one host."""
        params = jax.device_get(sharding.replicate(state.params, run.mesh))
        if not hosts.is_writer():
            return {}
        panels, ids, bad = self._reconstruct(run, params)
        if panels is None:
            return {"reconstruction": None, "bad_held_out_videos": bad}
        statistics = run.config.log.statistics
        drawn = spread(len(ids), run.config.log.pictures)
        for suffix in (".gif", ".png"):
            names = [ids[i] for i in drawn]
            reconstruct.write(panels.select(drawn), names, run.workdir / f"reconstruction{suffix}")
        figures = panels.psnr()
        whose = "training" if run.videos.validation is run.videos.train else "held-out"
        report.say(
            f"PSNR of hidden tubelets in {len(ids)} {whose} clips ({statistics} statistics): model "
            f"{figures['psnr_hidden']:.2f} dB, mean {figures['psnr_mean']:.2f} dB, nearest visible tubelet "
            f"{figures['psnr_nearest_visible']:.2f} dB; see {run.workdir / 'reconstruction.gif'}"
        )
        found = {**figures, "statistics": statistics, "clips": len(ids)}
        return {"reconstruction": found, "bad_held_out_videos": bad}

    def _reconstruct(
        self, run: Run, params: dict
    ) -> tuple[reconstruct.Panels | None, list[str], dict[str, str]]:
        """(panels, ids, videos that cannot be decoded) of held-out clips, the same for every run.

        The middle of each video, cropped to its centre, with the mask that its place gives it.
        """
        held_out = run.videos.validation
        chosen = held_out.select(spread(len(held_out), _FINAL_CLIPS))
        clip = self.clip_transform
        middle = pipeline.MiddleClip(clip.frames, clip.stride, clip.size)
        clips, ids, bad = pipeline.middle_clips(chosen, middle)
        if not ids:
            report.say(f"no pictures: none of the {len(chosen)} held-out videos can be decoded")
            return None, [], bad
        model = nnx.merge(self.graphdef, params)
        batch = {"index": jnp.arange(len(ids), dtype=jnp.uint32)}
        visible, hidden = self.masks(batch, jax.random.key(run.config.seed))
        how = (self.normalize_target, run.config.log.statistics)
        return reconstruct.reconstruct(model, clips, ids, visible, hidden, *how), ids, bad


def make(config: Config, train: Source | None, path: str) -> Pretrain:
    """The task that the settings name; see `task.Make`.

    Raises:
        UserError, ValueError: sizes and settings that do not fit together.
    """
    task = Pretrain(
        **masked.fields(config, train),
        model=VideoMAEConfig.from_dict(
            backbone.fields(config)
            | {"decoder": config.model.decoder.to_dict()}
            | backbone.kept(config, path)
        ),
        normalize_target=config.loss.normalize_target,
        decoder_mask=config.mask.decoder,
        decoder_ratio=config.mask.decoder_ratio,
    )
    if task.decoder_mask not in masking.DECODER_KINDS:
        known = " or ".join(masking.DECODER_KINDS)
        raise UserError(f"mask.decoder={task.decoder_mask!r} is unknown: use {known}")
    task._counts()  # refuses what does not fit the grid
    if config.log.statistics not in reconstruction.STATISTICS:
        modes = ", ".join(reconstruction.STATISTICS)
        raise UserError(f"log.statistics={config.log.statistics} is unknown: use {modes}")
    if config.log.statistics != "raw" and not task.normalize_target:
        raise UserError(
            f"log.statistics={config.log.statistics} is for normalised targets: with "
            f"loss.normalize_target=False set --config.log.statistics=raw"
        )
    return task
