"""What the methods that hide tubelets have in common: clips, masks, and k-NN on features meanwhile."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.models import functional, masking, tubelets
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.tasks import backbone, knn
from videomae_jax.training.step import Batch, clip_keys
from videomae_jax.training.task import Run, Task, Validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(Task[VideoMAEConfig]):
    """A method whose encoder sees the visible tubelets, and whose decoder predicts at hidden places.

    Attributes:
        mask: kind of it, see `masking.indices`; `mask_ratio` of it is hidden.
        loss_kind: "mse" (published), "l1" or "smooth_l1".
        stride: frames of the file from one frame of a clip to the next.
        clips_per_video: crops, each with its own mask, of the same decoded frames.
        short_side: of the videos' frames, at most: crops are resized on the device; 0: by the loader.
    """

    model: VideoMAEConfig
    mask: str
    mask_ratio: float
    loss_kind: str
    stride: int
    clips_per_video: int = 1
    short_side: int = 0

    @property
    def graphdef(self) -> Any:
        """The module that is trained, without its parameters."""
        return functional.abstract(VideoMAE, self.model)[0]

    def init(self, key: Key[Array, ""]) -> dict:
        """Parameters at the start of training, a nested dict of float32 arrays."""
        return functional.init(VideoMAE, self.model, key)

    def masks(self, batch: Batch, root: Key[Array, ""]) -> masking.Indices:
        """(visible, hidden) of each example; a function of (root key, global example index) only."""
        keys = clip_keys(root, "mask", batch["index"])
        return masking.indices(keys, self.mask, self.model.grid, self.mask_ratio)

    def pooled(self, params: dict, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """Mean of all tokens of whole clips: what k-NN looks at."""
        return nnx.merge(self.graphdef, params).raw_features(video)

    @property
    def clip_transform(self) -> pipeline.PretrainClip:
        """Record -> training clip."""
        frames, *size = self.model.clip_size
        how = (self.clips_per_video, self.short_side)
        return pipeline.PretrainClip(frames, self.stride, (size[0], size[1]), *how)

    def validator(self, run: Run) -> Validate:
        """k-NN on pooled tokens; see `knn.validator`."""
        return knn.validator(self.pooled, self.stride, run)


def fields(config: Config, train: Source | None) -> dict[str, Any]:
    """What the settings say of a `Masked`, but for its model.

    Raises:
        UserError: settings that make no sense.
    """
    if config.loss.kind not in tubelets.LOSSES:
        raise UserError(f"loss.kind={config.loss.kind!r} is unknown: use {', '.join(tubelets.LOSSES)}")
    return {
        "mask": config.mask.kind,
        "mask_ratio": config.mask.ratio,
        "loss_kind": config.loss.kind,
        "stride": backbone.stride(config),
        "clips_per_video": config.data.clips_per_video,
        "short_side": train.short_side if train is not None and config.data.resize == "device" else 0,
    }
