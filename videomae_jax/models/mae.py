"""VideoMAE: an encoder on visible tubelets, a light decoder that predicts the pixels of hidden ones."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from videomae_jax.models import masking, tubelets, vit
from videomae_jax.models.tubelets import Grid


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig:
    """Everything that fixes a VideoMAE's shapes and arithmetic.

    Attributes:
        clip_size: (T, H, W) that the weights are made with; other sizes run too, see `position_resize`.
        tubelet: (t, p, p) voxels; divides the clip.
        pixel_mean, pixel_std: per channel, of pixels scaled to 0..1; their length is the channel count.
        position_resize: table for another clip size, "recompute" (published) or "interpolate".
        layer_scale: initial layer-scale factor; 0 leaves layer scale out, as published.
        drop_path: largest stochastic-depth rate of encoder and of decoder.
    """

    clip_size: Grid
    tubelet: Grid
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    encoder: vit.Stack
    decoder: vit.Stack
    position_resize: str = "recompute"
    norm_epsilon: float = 1e-6
    layer_scale: float = 0.0
    drop_path: float = 0.0
    compute: vit.Compute = dataclasses.field(default_factory=vit.Compute)

    def __post_init__(self):
        if len(self.tubelet) != 3 or min(self.tubelet) < 1:
            raise ValueError(f"tubelet {self.tubelet} must be three positive sizes (t, p, p)")
        tubelets.grid_of(self.clip_size, self.tubelet)
        if self.position_resize not in vit.POSITION_RESIZE:
            raise ValueError(f"unknown position_resize {self.position_resize!r}: use {vit.POSITION_RESIZE}")
        if len(self.pixel_mean) != len(self.pixel_std):
            raise ValueError(
                f"pixel_mean has {len(self.pixel_mean)} channels and pixel_std {len(self.pixel_std)}"
            )
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if stack.num_heads < 1 or stack.width % stack.num_heads:
                raise ValueError(
                    f"{name}.num_heads {stack.num_heads} does not divide its width {stack.width}"
                )

    @property
    def channels(self) -> int:
        return len(self.pixel_mean)

    @property
    def grid(self) -> Grid:
        """The tubelet grid (T', H', W') of `clip_size`."""
        return tubelets.grid_of(self.clip_size, self.tubelet)

    def to_dict(self) -> dict:
        """Plain data, as stored beside the weights."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "VideoMAEConfig":
        """The inverse of `to_dict`, also after JSON has turned tuples into lists.

        Raises:
            TypeError: an unknown or a missing field.
        """
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in data.items()}
        for name, kind in (
            ("encoder", vit.Stack),
            ("decoder", vit.Stack),
            ("compute", vit.Compute),
        ):
            fields[name] = kind(**fields[name])
        return cls(**fields)


class Encoder(nnx.Module):
    """Tubelet embedding, blocks and the final LayerNorm."""

    def __init__(self, config: VideoMAEConfig, rngs: nnx.Rngs):
        c, dtype = config, config.compute.dtype
        self.embed = vit.TubeletEmbed(c.tubelet, c.pixel_mean, c.pixel_std, c.encoder.width, dtype, rngs)
        self.blocks = vit.make_blocks(c.encoder, c.norm_epsilon, c.layer_scale, dtype, rngs)
        self.norm = vit.layer_norm(c.encoder.width, c.norm_epsilon, dtype, rngs)


class Decoder(nnx.Module):
    """Projection to the decoder's width, mask token, blocks, final LayerNorm and pixel head."""

    def __init__(self, config: VideoMAEConfig, rngs: nnx.Rngs):
        c, dtype = config, config.compute.dtype
        width, voxels = c.decoder.width, math.prod(c.tubelet) * c.channels
        # Not covered by the published Xavier pass: U(+-1/sqrt(D)), the framework's default.
        bound = 1 / math.sqrt(c.encoder.width)
        shape = (c.encoder.width, width)
        self.project = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        # Published as normal(0.02) cut at +-0.02, that is at one sigma.
        token = jax.random.truncated_normal(rngs.params(), -1.0, 1.0, (width,))
        self.mask_token = nnx.Param(0.02 * token)
        self.blocks = vit.make_blocks(c.decoder, c.norm_epsilon, c.layer_scale, dtype, rngs)
        self.norm = vit.layer_norm(width, c.norm_epsilon, dtype, rngs)
        self.head = vit.linear(width, voxels, dtype, rngs)


class VideoMAE(nnx.Module):
    """A masked autoencoder for video (arXiv 2203.12602).

    `model(video, mask)`, `model.encode` and `model.loss` take boolean masks with known values and compile
    themselves; inside a larger jitted function use `encode_visible`, `predict` and `clip_losses` with the
    static-size index arrays of `masking.indices`.

    >>> import videomae_jax as vm
    >>> size = vm.SIZES["tiny"]
    >>> sizes = ((8, 32, 32), (2, 8, 8), (0.5,) * 3, (0.25,) * 3, size.encoder, size.decoder)
    >>> config = vm.VideoMAEConfig(*sizes)
    >>> model = vm.VideoMAE(config, rngs=nnx.Rngs(0))
    >>> mask = vm.tube_mask(jax.random.key(0), 2, config.grid, 0.75)
    >>> model(jnp.zeros((2, 8, 32, 32, 3), jnp.uint8), mask).shape
    (2, 48, 384)
    """

    def __init__(self, config: VideoMAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)

    def _check(self, video: jax.Array) -> Grid:
        tubelets.check_video(video, self.config.channels)
        _, t, h, w, _ = video.shape
        return tubelets.grid_of((t, h, w), self.config.tubelet)

    def _positions(self, grid: Grid, width: int) -> Float[Array, "N D"]:
        return jnp.asarray(vit.positions(grid, self.config.grid, width, self.config.position_resize))

    def encode_visible(
        self,
        video: UInt8[Array, "B T H W C"],
        visible: Int[Array, "B V"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B V D"]:
        """Tokens of the visible tubelets after the final LayerNorm, in the compute dtype.

        Hidden tubelets are never embedded: no bit of the result depends on them. With a `key` drop path
        is active.
        """
        grid = self._check(video)
        raw = tubelets.take(tubelets.patchify(video, self.config.tubelet), visible)
        x = self.encoder.embed(raw)
        x = x + self._positions(grid, self.config.encoder.width)[visible].astype(x.dtype)
        compute, rate = self.config.compute, self.config.drop_path
        return self.encoder.norm(vit.run_blocks(self.encoder.blocks, x, compute, rate, key))

    def decode(
        self,
        tokens: Float[Array, "B V D"],
        visible: Int[Array, "B V"],
        hidden: Int[Array, "B M"],
        grid: Grid,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B M P"]:
        """Predicts the hidden tubelets from encoded visible ones; float32, in the order of `hidden`."""
        x = tokens @ self.decoder.project[...].astype(tokens.dtype)
        table = self._positions(grid, self.config.decoder.width).astype(x.dtype)
        masks = self.decoder.mask_token[...].astype(x.dtype) + table[hidden]
        # Visible first, hidden after, as published; blocks do not care about the order of tokens.
        x = jnp.concatenate([x + table[visible], masks], axis=1)
        compute, rate = self.config.compute, self.config.drop_path
        x = vit.run_blocks(self.decoder.blocks, x, compute, rate, key)
        x = self.decoder.norm(x[:, visible.shape[1] :])
        return self.decoder.head(x).astype(jnp.float32)

    def predict(
        self,
        video: UInt8[Array, "B T H W C"],
        visible: Int[Array, "B V"],
        hidden: Int[Array, "B M"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B M P"]:
        """As `__call__`, with index arrays instead of a mask; for use inside `jax.jit`."""
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        tokens = self.encode_visible(video, visible, encoder_key)
        return self.decode(tokens, visible, hidden, self._check(video), decoder_key)

    def clip_losses(
        self,
        video: UInt8[Array, "B T H W C"],
        visible: Int[Array, "B V"],
        hidden: Int[Array, "B M"],
        normalize_target: bool,
        kind: str,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B"]:
        """Reconstruction loss of each clip, float32; the batch loss is its (weighted) mean."""
        prediction = self.predict(video, visible, hidden, key)
        raw = tubelets.take(tubelets.patchify(video, self.config.tubelet), hidden)
        target = tubelets.reconstruction_target(raw, self.config.channels, normalize_target)
        return tubelets.reconstruction_error(prediction, jax.lax.stop_gradient(target), kind)

    def _indices(self, video: jax.Array, mask: jax.Array) -> masking.Indices:
        tokens = math.prod(self._check(video))
        if not isinstance(mask, jax.Array | np.ndarray):
            raise ValueError(f"mask is a {type(mask).__name__}: pass a bool array, True = hidden")
        if mask.shape != (video.shape[0], tokens):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}: a video of shape {tuple(video.shape)} in tubelets of "
                f"{self.config.tubelet} needs [{video.shape[0]}, {tokens}]"
            )
        return masking.from_mask(mask)

    def __call__(self, video: UInt8[Array, "B T H W C"], mask: Bool[Array, "B N"]) -> Float[Array, "B M P"]:
        """Predicts the hidden tubelets, float32, in raster order.

        Args:
            video: raw 0..255 RGB pixels; the model normalises them.
            mask: True = hidden; every row hides the same number. Its values must be known (not traced).

        Raises:
            ValueError: another dtype or channel count, a size that the tubelet does not divide, a mask of
                another shape or with unequal counts.
        """
        visible, hidden = self._indices(video, mask)
        return _jitted("predict")(*nnx.split(self), video, visible, hidden)

    def encode(
        self, video: UInt8[Array, "B T H W C"], mask: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B V D"]:
        """Encoder output after the final LayerNorm, float32, visible tokens in raster order.

        Without a mask every tubelet is visible. Raises as `__call__`.
        """
        if mask is None:
            tokens = math.prod(self._check(video))
            visible = jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (video.shape[0], 1))
        else:
            visible, _ = self._indices(video, mask)
        return _jitted("encode_visible")(*nnx.split(self), video, visible).astype(jnp.float32)

    def loss(
        self,
        video: UInt8[Array, "B T H W C"],
        mask: Bool[Array, "B N"],
        normalize_target: bool = True,
        kind: str = "mse",
    ) -> Float[Array, ""]:
        """Mean reconstruction error over hidden voxels, float32. Raises as `__call__`.

        Args:
            normalize_target: per tubelet and channel, as published; False predicts pixels in 0..1.
            kind: "mse", "l1" or "smooth_l1".
        """
        visible, hidden = self._indices(video, mask)
        losses = _jitted("clip_losses", ("normalize_target", "kind"))(
            *nnx.split(self),
            video,
            visible,
            hidden,
            normalize_target=normalize_target,
            kind=kind,
        )
        return losses.mean()


@functools.lru_cache
def _jitted(method: str, static: tuple[str, ...] = ()):
    """The method as a compiled function of (graphdef, params, arrays...), shared by all models."""

    def call(graphdef, params, *arrays, **settings):
        return getattr(nnx.merge(graphdef, params), method)(*arrays, **settings)

    return jax.jit(call, static_argnums=0, static_argnames=static)
