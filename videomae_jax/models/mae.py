"""VideoMAE: an encoder on visible tubelets, a light decoder that predicts the pixels of hidden ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from videomae_jax.models import functional, layers, masking, tubelets, vit
from videomae_jax.models.layout import WHOLE, Layout
from videomae_jax.models.tubelets import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoMAEConfig(vit.BackboneConfig):
    """Everything that fixes a VideoMAE's shapes and arithmetic: the backbone's fields, and these.

    Attributes:
        decoder: its sizes; None: an encoder alone, which predicts nothing.
        encoder_norm: whether the encoder ends with a LayerNorm, as published.
        target_width: numbers that are predicted for each hidden tubelet; None: its voxels.
    """

    decoder: vit.Stack | None
    encoder_norm: bool = True
    target_width: int | None = None


class Encoder(vit.Trunk):
    """Tubelet embedding, blocks and the final LayerNorm."""

    def __init__(self, config: VideoMAEConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs, layers.XAVIER)
        if config.encoder_norm:
            self.norm = layers.LayerNorm(config.encoder.width, config.norm_epsilon, config.compute.dtype)


class Decoder(nnx.Module):
    """Projection to the decoder's width, mask token, blocks, final LayerNorm and pixel head."""

    def __init__(self, config: VideoMAEConfig, sizes: vit.Stack, rngs: nnx.Rngs):
        c, dtype, width = config, config.compute.dtype, sizes.width
        outputs = c.target_width or math.prod(c.tubelet) * c.channels
        # Not covered by the published Xavier pass: U(+-1/sqrt(D)), the framework's default.
        bound = 1 / math.sqrt(c.encoder.width)
        shape = (c.encoder.width, width)
        self.project = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        # Published as normal(0.02) cut at +-0.02, that is at one sigma.
        token = jax.random.truncated_normal(rngs.params(), -1.0, 1.0, (width,))
        self.mask_token = nnx.Param(0.02 * token)
        self.blocks = vit.make_blocks(sizes, c.norm_epsilon, c.layer_scale, c.compute, rngs, layers.XAVIER)
        self.norm = layers.LayerNorm(width, c.final_norm_epsilon or c.norm_epsilon, dtype)
        self.head = layers.Linear(width, outputs, dtype, rngs, layers.XAVIER)


class VideoMAE(nnx.Module):
    """A masked autoencoder for video (arXiv 2203.12602).

    `model(video, mask)`, `model.encode` and `model.loss` take boolean masks with known values and compile
    themselves; inside a larger jitted function use `encode_visible`, `predict` and `token_losses` with the
    static-size index arrays of `masking.indices`.

    >>> import videomae_jax as vm
    >>> size = vm.SIZES["tiny"]
    >>> config = vm.VideoMAEConfig(
    ...     clip_size=(8, 32, 32), tubelet=(2, 8, 8), pixel_mean=(0.5,) * 3, pixel_std=(0.25,) * 3,
    ...     encoder=size.encoder, decoder=size.decoder)
    >>> model = vm.VideoMAE(config, rngs=nnx.Rngs(0))
    >>> mask = vm.tube_mask(jax.random.key(0), 2, config.grid, 0.75)
    >>> model(jnp.zeros((2, 8, 32, 32, 3), jnp.uint8), mask).shape
    (2, 48, 384)
    """

    def __init__(self, config: VideoMAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        if config.decoder is not None:
            self.decoder = Decoder(config, config.decoder, rngs)

    def _check(self, video: jax.Array) -> Grid:
        tubelets.check_video(video, self.config.channels)
        _, t, h, w, _ = video.shape
        return tubelets.grid_of((t, h, w), self.config.tubelet)

    def _positions(self, grid: Grid, width: int) -> Float[Array, "N D"]:
        return jnp.asarray(self.config.positions(grid, width))

    def encode_visible(
        self,
        video: UInt8[Array, "B T H W C"],
        visible: Int[Array, "B V"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
    ) -> Float[Array, "B V D"]:
        """Tokens of the visible tubelets after the final LayerNorm, in the compute dtype.

        Hidden tubelets are never embedded: no bit of the result depends on them. With `keys` drop path
        is active.
        """
        grid, c = self._check(video), self.config
        raw = tubelets.take(tubelets.patchify(video, c.tubelet), visible)
        pixels = tubelets.normalize_pixels(raw, c.pixel_mean, c.pixel_std)
        positions = self._positions(grid, c.encoder.width)[visible]
        tokens = self.encoder(pixels, positions, keys, layout)
        return self.encoder.norm(tokens) if c.encoder_norm else tokens

    def encode_pixels(
        self,
        pixels: Float[Array, "B T H W C"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
    ) -> Float[Array, "B N D"]:
        """As `encode_visible` with every tubelet of normalised clips visible."""
        tokens = self.encoder(*self.encoder.cut(pixels), keys, layout)
        return self.encoder.norm(tokens) if self.config.encoder_norm else tokens

    def tokens(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B N D"]:
        """As `encode_visible` with every tubelet visible, float32."""
        every = jnp.arange(math.prod(self._check(video)), dtype=jnp.int32)
        every = jnp.broadcast_to(every, (video.shape[0], len(every)))
        return self.encode_visible(video, every).astype(jnp.float32)

    def raw_features(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """Mean of all tokens, float32; for use inside `jax.jit`."""
        return self.tokens(video).mean(axis=1)

    def decode(
        self,
        tokens: Float[Array, "B V D"],
        visible: Int[Array, "B V"],
        hidden: Int[Array, "B M"],
        grid: Grid,
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
    ) -> Float[Array, "B M P"]:
        """Predicts the hidden tubelets from encoded visible ones; float32, in the order of `hidden`."""
        if self.config.decoder is None:
            raise ValueError(
                "this model is an encoder alone: it can encode, but has no decoder to predict with"
            )
        x = tokens @ self.decoder.project[...].astype(tokens.dtype)
        table = self._positions(grid, self.config.decoder.width)
        # Visible first, hidden after, as published; blocks do not care about the order of tokens. Added in
        # float32, see `layers.add_bias`.
        shown, masks = x.astype(jnp.float32) + table[visible], self.decoder.mask_token[...] + table[hidden]
        x = jnp.concatenate([shown.astype(x.dtype), masks.astype(x.dtype)], axis=1)
        compute, rate = self.config.compute, self.config.drop_path
        x = vit.run_blocks(self.decoder.blocks, x, compute, rate, keys, layout)
        x = self.decoder.norm(x[:, visible.shape[1] :])
        return self.decoder.head(x).astype(jnp.float32)

    def predict(
        self,
        video: UInt8[Array, "B T H W C"],
        visible: Int[Array, "B V"],
        hidden: Int[Array, "B M"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
    ) -> Float[Array, "B M P"]:
        """As `__call__`, with index arrays instead of a mask; for use inside `jax.jit`."""
        encoder_keys, decoder_keys = (None, None) if keys is None else jax.vmap(jax.random.split, 0, 1)(keys)
        tokens = self.encode_visible(video, visible, encoder_keys, layout)
        return self.decode(tokens, visible, hidden, self._check(video), decoder_keys, layout)

    def token_losses(
        self,
        video: UInt8[Array, "B T H W C"],
        visible: Int[Array, "B V"],
        hidden: Int[Array, "B M"],
        normalize_target: bool,
        kind: str,
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
    ) -> Float[Array, "B M"]:
        """Reconstruction loss of each tubelet of `hidden`, float32; the batch loss is their mean."""
        prediction = self.predict(video, visible, hidden, keys, layout)
        target = tubelets.reconstruction_targets(video, hidden, self.config.tubelet, normalize_target)
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
        return functional.jitted("predict")(*nnx.split(self), video, visible, hidden)

    def encode(
        self, video: UInt8[Array, "B T H W C"], mask: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B V D"]:
        """Encoder output after the final LayerNorm, float32, visible tokens in raster order.

        Without a mask every tubelet is visible. Raises as `__call__`.
        """
        if mask is None:
            self._check(video)
            return functional.jitted("tokens")(*nnx.split(self), video)
        visible, _ = self._indices(video, mask)
        return functional.jitted("encode_visible")(*nnx.split(self), video, visible).astype(jnp.float32)

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
        losses = functional.jitted("token_losses", ("normalize_target", "kind"))(
            *nnx.split(self),
            video,
            visible,
            hidden,
            normalize_target=normalize_target,
            kind=kind,
        )
        return losses.mean()
