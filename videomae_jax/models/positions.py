"""The fixed position table, as published and for clips of other sizes."""

import functools
import math

import numpy as np

from videomae_jax.models.tubelets import Grid

RESIZE = ("recompute", "interpolate")


@functools.lru_cache
def published(tokens: int, width: int) -> np.ndarray:
    """The published fixed table, float32 [tokens, width]: 1-D over the flat token index.

    Sine in even columns, cosine in odd ones, of n / 10000^(2 floor(j/2) / width), computed in float64.
    """
    columns = np.arange(width) // 2 * 2 / width
    angle = np.arange(tokens)[:, None] / np.power(10000.0, columns)
    return np.where(np.arange(width) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


def _resampling_matrix(size: int, new_size: int, cubic: bool) -> np.ndarray:
    """[new_size, size] weights of linear or bicubic (a = -0.75) resampling at half-pixel centres.

    Border samples repeat the edge, as in PyTorch's `interpolate` with `align_corners=False`.
    """
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((new_size, size))
    for tap in range(-1, 3) if cubic else range(2):
        x = np.abs(centre - (base + tap))
        if cubic:
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            weight = np.where(x <= 1, near, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4))
        else:
            weight = 1 - x
        np.add.at(matrix, (np.arange(new_size), np.clip(base + tap, 0, size - 1)), weight)
    return matrix


@functools.lru_cache
def table(grid: Grid, made_grid: Grid, width: int, resize: str) -> np.ndarray:
    """Position table for `grid`, float32 [N, width].

    For `made_grid`, the grid that the weights were made with, it is the published table, exactly. For
    another grid `resize` decides: "recompute" builds the table anew for the new N, as the published code
    does (positions are re-numbered); "interpolate" views the table as [T', H', W', D] and resamples it,
    bicubic in space and linear in time.
    """
    if grid == made_grid or resize == "recompute":
        return published(math.prod(grid), width)
    grown = published(math.prod(made_grid), width).reshape(*made_grid, width)
    for axis, (size, new_size) in enumerate(zip(made_grid, grid, strict=True)):
        matrix = _resampling_matrix(size, new_size, cubic=axis > 0)
        grown = np.moveaxis(np.tensordot(matrix, grown, (1, axis)), 0, axis)
    return grown.reshape(-1, width).astype(np.float32)
