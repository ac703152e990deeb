"""RoIAlign as two small matrix products a box, exact.

A box is (left, top, right, bottom). As sampling is bilinear, what a bin of a box sees is (weights of rows) x
(features) x (weights of columns): no gather, and the number of samples may depend on the box.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _weights(
    start: Float[Array, " R"], end: Float[Array, " R"], cells: int, bins: int, aligned: bool, samples: int
) -> Float[Array, "R K C"]:
    """How much of each of `cells` a bin of [start, end], in cells, takes along one axis."""
    if aligned:
        start, end = start - 0.5, end - 0.5
    size = (end - start) if aligned else jnp.maximum(end - start, 1.0)
    count = jnp.clip(jnp.ceil(size / bins), 0, samples)[:, None, None]  # none, if aligned and empty
    bin_size = (size / bins)[:, None, None]
    place = jnp.arange(bins)[:, None], jnp.arange(samples)[None]
    at = start[:, None, None] + bin_size * (
        place[0] + (place[1] + 0.5) / jnp.maximum(count, 1)
    )  # [R, K, samples]
    counts = (place[1] < count) & (at >= -1) & (at <= cells)
    near = jnp.clip(at, 0, cells - 1)[..., None]
    share = jnp.maximum(1 - jnp.abs(near - jnp.arange(cells)), 0)
    return (share * counts[..., None]).sum(2) / jnp.maximum(count, 1)


def roi_align(
    features: Float[Array, "B H W D"],
    boxes: Float[Array, "B R 4"],
    bins: int,
    aligned: bool,
    samples: int,
) -> Float[Array, "B R K K D"]:
    """Mean of bilinear samples in each of `bins` x `bins` parts of each box (arXiv 1703.06870).

    Detectron's kernel with sampling ratio 0: ceil(size / bins) samples along each axis of a bin, those more
    than a cell outside count as 0.

    Args:
        boxes: in cells of the features, from 0 to W and H.
        aligned: cell i has its centre at i + 0.5; else, as the published code, at i, and a box is at least
            a cell wide and high.
        samples: of a bin along an axis, at most: ceil(cells / bins) takes boxes of any size within.
    """

    def of_clip(features: Float[Array, "H W D"], boxes: Float[Array, "R 4"]) -> Float[Array, "R K K D"]:
        height, width, _ = features.shape
        rows = _weights(boxes[:, 1], boxes[:, 3], height, bins, aligned, samples)
        columns = _weights(boxes[:, 0], boxes[:, 2], width, bins, aligned, samples)
        wide = jnp.einsum("rkh,hwd->rkwd", rows, features, precision="highest")
        return jnp.einsum("rlw,rkwd->rkld", columns, wide, precision="highest")

    return jax.vmap(of_clip)(features.astype(jnp.float32), boxes.astype(jnp.float32))


def samples_of(grid: tuple[int, int], bins: int) -> int:
    """Samples of a bin along an axis that boxes within a grid (H, W) need.

    >>> samples_of((14, 14), 7), samples_of((16, 29), 7)
    (2, 5)
    """
    return -(-max(grid) // bins)
