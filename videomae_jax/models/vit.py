"""The plain video ViT: size table, tubelet embedding, pre-norm blocks, scanned stack.

Blocks are stacked on a leading depth axis and run by `lax.scan`, so compile time does not grow with depth.
Modules own parameters only; randomness arrives as one key per example (None: evaluation).
"""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from videomae_jax.models import positions, tubelets
from videomae_jax.models.attention import KINDS, attend
from videomae_jax.models.layers import Initializer, LayerNorm, Linear, add_bias, gelu, matmul
from videomae_jax.models.layout import WHOLE, Layout
from videomae_jax.models.tubelets import Grid


@dataclasses.dataclass(frozen=True)
class Stack:
    """Sizes of a stack of transformer blocks; `num_heads` divides `width`."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int


@dataclasses.dataclass(frozen=True)
class Size:
    """A published model: patch side, encoder, and the decoder of its pretraining."""

    patch: int
    encoder: Stack
    decoder: Stack


SIZES = {
    "tiny": Size(8, Stack(128, 4, 4, 512), Stack(64, 2, 2, 256)),  # ours, for laptops and tests
    "small": Size(16, Stack(384, 12, 6, 1536), Stack(192, 4, 3, 768)),
    "base": Size(16, Stack(768, 12, 12, 3072), Stack(384, 4, 6, 1536)),
    "large": Size(16, Stack(1024, 24, 16, 4096), Stack(512, 12, 8, 2048)),
    "huge": Size(16, Stack(1280, 32, 16, 5120), Stack(640, 12, 8, 2560)),
    "giant": Size(14, Stack(1408, 40, 16, 6144), Stack(512, 4, 8, 2234)),  # VideoMAE V2
}


_REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


_REARRANGES = ("all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "split")


def _all_but_parameters(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps all that is computed, but for gathered parameters and what merely rearranges or casts them.

    Without it the backward pass would keep the whole parameters of every block at once.
    """
    return primitive.name not in _REARRANGES


_COMPUTE = {"dtype": ("float32", "bfloat16"), "remat": tuple(_REMAT), "attention": KINDS}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How blocks are computed; none of it changes what they compute.

    Attributes:
        dtype: of the matmuls, "float32" or "bfloat16"; parameters, softmax and statistics stay float32.
        unroll: scan steps per loop iteration; the depth unrolls everything (faster step, slower compile).
        remat: what of a block the backward pass computes again: "none" (fastest), "dots" (all but the
            products of matrices), "full" (all: least memory).
        attention: how it is computed: see `attention.attend`.
    """

    dtype: str = "float32"
    unroll: int = 1
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self):
        for name, known in _COMPUTE.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use {', '.join(known)}")


AnyConfig = TypeVar("AnyConfig", bound="BackboneConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What fixes an encoder's shapes and arithmetic; each model adds its own fields.

    Attributes:
        clip_size: (T, H, W) that the model is used with; other sizes run too, see `position_resize`.
        tubelet: (t, p, p) voxels; divides the clip.
        pixel_mean, pixel_std: per channel, of pixels scaled to 0..1; their length is the channel count.
        position_grid: tubelet grid that the weights were first made with; None: that of `clip_size`.
        position_resize: table for another grid, "recompute" (published) or "interpolate".
        norm_epsilon: of every LayerNorm; `final_norm_epsilon` of the one before a head, where it differs.
        layer_scale: initial layer-scale factor; 0 leaves layer scale out, as published.
        drop_path: largest stochastic-depth rate of every stack of blocks.
    """

    clip_size: Grid
    tubelet: Grid
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    encoder: Stack
    position_grid: Grid | None = None
    position_resize: str = "recompute"
    norm_epsilon: float = 1e-6
    final_norm_epsilon: float | None = None
    layer_scale: float = 0.0
    drop_path: float = 0.0
    compute: Compute = dataclasses.field(default_factory=Compute)

    def __post_init__(self):
        if len(self.tubelet) != 3 or min(self.tubelet) < 1:
            raise ValueError(f"tubelet {self.tubelet} must be three positive sizes (t, p, p)")
        tubelets.grid_of(self.clip_size, self.tubelet)
        if self.position_resize not in positions.RESIZE:
            raise ValueError(f"unknown position_resize {self.position_resize!r}: use {positions.RESIZE}")
        if len(self.pixel_mean) != len(self.pixel_std):
            raise ValueError(
                f"pixel_mean has {len(self.pixel_mean)} channels and pixel_std {len(self.pixel_std)}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path} must be at least 0 and below 1")
        for name, stack in vars(self).items():
            if isinstance(stack, Stack) and (stack.num_heads < 1 or stack.width % stack.num_heads):
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

    def positions(self, grid: Grid, width: int) -> np.ndarray:
        """The position table of a clip of `grid`, float32 [N, width]; see `positions.table`."""
        return positions.table(grid, self.position_grid or self.grid, width, self.position_resize)

    def to_dict(self) -> dict:
        """Plain data, as stored beside the weights."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[AnyConfig], data: dict) -> AnyConfig:
        """The inverse of `to_dict`, also after JSON has turned tuples into lists.

        Raises:
            TypeError: an unknown or a missing field.
        """
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in data.items()}
        compute = dict(fields.get("compute") or {})
        if isinstance(compute.get("remat"), bool):  # of files written before it had names
            fields["compute"] = compute | {"remat": "full" if compute["remat"] else "none"}
        for name, kind in (("encoder", Stack), ("decoder", Stack), ("compute", Compute)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        return cls(**fields)


class Attention(nnx.Module):
    """Joint space-time self-attention with learned query and value biases and no key bias."""

    def __init__(self, sizes: Stack, compute: Compute, rngs: nnx.Rngs, kernel_init: Initializer):
        d = sizes.width
        self.num_heads = sizes.num_heads
        self.dtype = jnp.dtype(compute.dtype)
        self.kind = compute.attention
        # Begun as the fused D -> 3D matrix that it is, as published.
        self.qkv = nnx.Param(kernel_init(rngs.params(), (d, 3 * d), jnp.float32).reshape(d, 3, d))
        self.q_bias = nnx.Param(jnp.zeros(d))
        self.v_bias = nnx.Param(jnp.zeros(d))
        self.out = Linear(d, d, compute.dtype, rngs, kernel_init)

    def __call__(self, x: Float[Array, "B N D"], layout: Layout) -> Float[Array, "B N D"]:
        b, n, d = x.shape
        # Flat tokens: see `matmul`.
        flat = layout.enter(x.reshape(b * n, d))
        # Three products: the parts of one would have to be copied out of it, and their gradients into it.
        kernels = jnp.split(self.qkv[...].astype(self.dtype).reshape(d, -1), 3, axis=1)
        q, k, v = (flat @ kernel for kernel in kernels)
        q = add_bias(q, self.q_bias[...])
        # All heads, or those of this device.
        q, k, v = (x.reshape(b, n, -1, d // self.num_heads).transpose(0, 2, 1, 3) for x in (q, k, v))
        out = attend(q, k, v, self.kind).transpose(0, 2, 1, 3).reshape(b * n, -1)
        # Attention's weights sum to 1, so the bias of the values comes through it as it is: added to the
        # projected output, it takes no pass over the values.
        shift = self.v_bias[...].astype(self.dtype) @ self.out.kernel[...].astype(self.dtype)
        return self.out(out, lambda x: layout.leave(add_bias(x, shift))).reshape(b, n, d)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then a GELU MLP, each with optional layer scale and drop path."""

    def __init__(
        self,
        sizes: Stack,
        epsilon: float,
        layer_scale: float,
        compute: Compute,
        rngs: nnx.Rngs,
        kernel_init: Initializer,
    ):
        d, dtype = sizes.width, compute.dtype
        self.norm1 = LayerNorm(d, epsilon, dtype)
        self.attention = Attention(sizes, compute, rngs, kernel_init)
        self.norm2 = LayerNorm(d, epsilon, dtype)
        self.fc1 = Linear(d, sizes.mlp_dim, dtype, rngs, kernel_init)
        self.fc2 = Linear(sizes.mlp_dim, d, dtype, rngs, kernel_init)
        self.has_layer_scale = layer_scale > 0
        if self.has_layer_scale:
            self.gamma1 = nnx.Param(jnp.full(d, layer_scale))
            self.gamma2 = nnx.Param(jnp.full(d, layer_scale))

    def __call__(
        self, x: Float[Array, "B N D"], branch_scales: Float[Array, "2 B"] | None, layout: Layout
    ) -> Float[Array, "B N D"]:
        """`branch_scales` multiply the two branches of each example (see `drop_path_scales`)."""
        y = self.attention(self.norm1(x), layout)
        if self.has_layer_scale:
            y = _scaled(y, self.gamma1[...])
        if branch_scales is not None:
            y = y * branch_scales[0, :, None, None].astype(y.dtype)
        x = x + y
        y = self.fc2(gelu(self.fc1(layout.enter(self.norm2(x)))), layout.leave)
        if self.has_layer_scale:
            y = _scaled(y, self.gamma2[...])
        if branch_scales is not None:
            y = y * branch_scales[1, :, None, None].astype(y.dtype)
        return x + y


def _scaled(x: Float[Array, "B N D"], gamma: Float[Array, " D"]) -> Float[Array, "B N D"]:
    return (x.astype(jnp.float32) * gamma).astype(x.dtype)  # as in `add_bias`


def drop_path_scales(
    keys: Key[Array, " B"] | None, largest_rate: float, depth: int
) -> Float[Array, "L 2 B"] | None:
    """Stochastic depth as factors of each layer's branches: 0 with the layer's rate, else 1 / (1 - rate).

    Layer i of L has the rate `largest_rate * i / (L - 1)`. An example's draws depend on its own key only.
    Without keys (evaluation) or rate there are no factors.
    """
    if keys is None or largest_rate == 0:
        return None
    rates = jnp.linspace(0.0, largest_rate, depth)[:, None, None]
    draw = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)), out_axes=-1)
    return (draw(keys) >= rates) / (1 - rates)


def make_blocks(
    sizes: Stack,
    epsilon: float,
    layer_scale: float,
    compute: Compute,
    rngs: nnx.Rngs,
    kernel_init: Initializer,
) -> Block:
    """A `Block` whose every parameter has a leading depth axis; each layer has its own random draw."""

    @nnx.vmap
    def make(key: Key[Array, ""]) -> Block:
        return Block(sizes, epsilon, layer_scale, compute, nnx.Rngs(params=key), kernel_init)

    return make(jax.random.split(rngs.params(), sizes.depth))


def run_blocks(
    blocks: Block,
    x: Float[Array, "B N D"],
    compute: Compute,
    drop_path_rate: float,
    keys: Key[Array, " B"] | None,
    layout: Layout = WHOLE,
    frozen: int = 0,
) -> Float[Array, "B N D"]:
    """Applies stacked blocks in order, with drop path (see `drop_path_scales`) where there are keys.

    Args:
        frozen: no gradient is computed for this many blocks from the first, nor for what is below them.
    """
    return _scan_blocks(blocks, x, compute, drop_path_rate, keys, layout, frozen, with_means=False)[0]


def _scan_blocks(
    blocks: Block,
    x: Float[Array, "B N D"],
    compute: Compute,
    drop_path_rate: float,
    keys: Key[Array, " B"] | None,
    layout: Layout,
    frozen: int,
    with_means: bool,
) -> tuple[Float[Array, "B N D"], Float[Array, "L B D"] | None]:
    """What leaves the last block, and `with_means` the mean token that leaves each."""
    graphdef, params = nnx.split(blocks)
    depth, gather = blocks.fc1.kernel.shape[0], layout.gather_block
    layers = (nnx.to_pure_dict(params), drop_path_scales(keys, drop_path_rate, depth))

    def layer(x, xs):
        block_params, scales = xs
        if gather:
            block_params = gather(block_params)
        x = nnx.merge(graphdef, block_params)(x, scales, layout)
        return x, x.mean(axis=1) if with_means else None

    policy = _REMAT[compute.remat]
    if gather and compute.remat == "none":
        policy = _all_but_parameters
    if policy:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    means = []
    for first, last in ((0, frozen), (frozen, depth)):
        if first == last:
            continue
        part = jax.tree.map(lambda leaf, part=slice(first, last): leaf[part], layers) if frozen else layers
        x, found = jax.lax.scan(layer, x, part, unroll=min(compute.unroll, last - first))
        means.append(found)
        if last == frozen:
            x = jax.lax.stop_gradient(x)
    return x, jnp.concatenate(means) if with_means else None


def block_flops(sizes: Stack, tokens: int) -> float:
    """Floating-point operations of a stack's forward pass on one clip: matmuls, two per multiply-add."""
    per_token = 4 * sizes.width**2 + 2 * sizes.width * sizes.mlp_dim + 2 * tokens * sizes.width
    return 2.0 * sizes.depth * tokens * per_token


class TubeletEmbed(nnx.Module):
    """Projects normalised tubelets to tokens: a 3-D convolution written as one matmul."""

    def __init__(self, voxels: int, width: int, dtype: str, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(dtype)
        # The published convolution keeps its framework's default: U(+-1/sqrt(fan_in)), bias too.
        bound = 1 / math.sqrt(voxels)
        draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        self.kernel = nnx.Param(draw(rngs.params(), (voxels, width)))
        self.bias = nnx.Param(draw(rngs.params(), (width,)))

    def __call__(
        self, pixels: Float[Array, "B K P"], positions: Float[Array, "#B K D"]
    ) -> Float[Array, "B K D"]:
        tokens = matmul(pixels, self.kernel[...], self.dtype)
        return (tokens.astype(jnp.float32) + self.bias[...] + positions).astype(self.dtype)


class Trunk(nnx.Module):
    """Tubelet embedding and blocks: what every model of a size shares, whatever it is trained for."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs, kernel_init: Initializer):
        c = config
        self.config = config
        self.embed = TubeletEmbed(math.prod(c.tubelet) * c.channels, c.encoder.width, c.compute.dtype, rngs)
        self.blocks = make_blocks(c.encoder, c.norm_epsilon, c.layer_scale, c.compute, rngs, kernel_init)

    def __call__(
        self,
        pixels: Float[Array, "B K P"],
        positions: Float[Array, "#B K D"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
        frozen: int = 0,
    ) -> Float[Array, "B K D"]:
        """Tokens of normalised tubelets at their positions, before any final norm; see `run_blocks`."""
        x = self.embed(pixels, positions)
        return run_blocks(self.blocks, x, self.config.compute, self.config.drop_path, keys, layout, frozen)

    def cut(self, pixels: Float[Array, "B T H W C"]) -> tuple[Float[Array, "B N P"], Float[Array, "1 N D"]]:
        """Every tubelet of normalised clips, and their positions."""
        c, (_, t, h, w, _) = self.config, pixels.shape
        positions = jnp.asarray(c.positions(tubelets.grid_of((t, h, w), c.tubelet), c.encoder.width))
        return tubelets.patchify(pixels, c.tubelet), positions[None]

    def with_layers(
        self,
        pixels: Float[Array, "B K P"],
        positions: Float[Array, "#B K D"],
        keys: Key[Array, " B"] | None,
        layout: Layout,
        frozen: int = 0,
    ) -> tuple[Float[Array, "B K D"], Float[Array, "L B D"]]:
        """As the module itself, and the mean token that leaves each block."""
        x, c = self.embed(pixels, positions), self.config
        x, means = _scan_blocks(self.blocks, x, c.compute, c.drop_path, keys, layout, frozen, with_means=True)
        assert means is not None
        return x, means
