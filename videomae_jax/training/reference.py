"""Curves of an earlier run to hold a new one against: is this loss normal?"""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from videomae_jax import storage
from videomae_jax.config import UserError

_SHOWN = ("loss", "validation", "knn")  # how the names of figures begin that have curves


@dataclasses.dataclass(frozen=True)
class Reference:
    """Figures of a run by name, each with the steps that it was logged at, ascending."""

    curves: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def at(self, name: str, step: int) -> float | None:
        """The curve between its points; None where it has none."""
        steps, values = self.curves.get(name, (np.zeros(0), np.zeros(0)))
        if not len(steps) or not steps[0] <= step <= steps[-1]:
            return None
        return float(np.interp(step, steps, values))


def read(path: str) -> Reference | None:
    """The curves of a log.jsonl, whole or thinned; None for no path.

    Raises:
        UserError: no such file, nothing in it, or no plotting library for the picture.
    """
    if not path:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("log.reference draws with matplotlib: EXTRAS=study launch/local.sh ...")
    file = storage.at(path)
    if not file.is_file():
        raise UserError(f"log.reference={path}: no such file; curves of our configs are in docs/reference")
    try:
        reference = _curves(file.read_text().splitlines())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"log.reference={path} is no log of a run: name its log.jsonl") from None
    if not reference.curves:
        raise UserError(f"log.reference={path} has no loss: name the log.jsonl of a run")
    return reference


def _curves(lines: Iterable[str]) -> Reference:
    points: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, lines):
        for name, value in line.items():
            if name.startswith(_SHOWN) and value is not None:
                points.setdefault(name, []).append((line["step"], float(value)))
    return Reference({name: (np.array(found).T[0], np.array(found).T[1]) for name, found in points.items()})


def thinned(log: str, lines: int = 60) -> str:
    """The curves of a log with about so many points of the loss, each a mean of those around it."""
    found = []
    for name, (steps, values) in _curves(log.splitlines()).curves.items():
        size = max(len(steps) // lines, 1) if name == "loss" else 1
        for first in range(0, len(steps), size):
            chunk = slice(first, first + size)
            found.append((round(float(steps[chunk].mean())), name, float(values[chunk].mean())))
    return "".join(json.dumps({"step": s, name: float(f"{v:.5g}")}) + "\n" for s, name, v in sorted(found))


def draw(log: str, reference: Reference, path: pathlib.Path) -> None:
    """A picture of a log's curves over those of the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    own = _curves(log.splitlines()).curves
    names = sorted(own.keys() | reference.curves.keys())
    figure, every = pyplot.subplots(
        len(names), 1, figsize=(7, 2.6 * len(names)), layout="constrained", squeeze=False
    )
    for name, axes in zip(names, every[:, 0], strict=True):
        for label, curves, style in (("reference", reference.curves, "k--"), ("this run", own, "C0")):
            if name in curves:
                axes.plot(*curves[name], style, linewidth=1, label=label)
        if name == "loss":
            axes.set_yscale("log")
        axes.set_ylabel(name.replace("_", " "))
        axes.legend(frameon=False)
    every[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
