"""The runs of `configs/study.py` behind the rows of a study, each named once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from videomae_jax.study.questions import Row
from videomae_jax.study.runner import Run

CONFIG = "configs/study.py"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        seeds: of every row.
        steps: of the pretraining that the curve of labels starts from.
        more: steps of a second pretraining that starts from those weights; 0: none.
        short: of the pretraining of all other questions.
        contrast: of MoCo v3's.
        finetuning: of finetuning; thrice as many with all labels.
        labels: videos per class of the curve, 0 for all; and of all other questions, `few`.
        questions: keys of those that are asked; (): all.
        edits: of every run.
    """

    seeds: int
    steps: int
    short: int
    contrast: int
    finetuning: int
    labels: tuple[int, ...]
    few: int
    more: int = 0
    questions: tuple[str, ...] = ()
    edits: tuple[tuple[str, Any], ...] = ()


class Runs:
    """All runs of a scale, each after those that it needs."""

    def __init__(self, scale: Scale):
        self.scale = scale
        self.runs: list[Run] = []

    def run(
        self, name: str, arg: str, seed: int, *edits: tuple[str, Any], start: str = "", teacher: str = ""
    ) -> Run:
        """A run of `configs/study.py`; the same one for the same name.

        Raises:
            ValueError: another run has this name.
        """
        # Videos, and with them those that are labelled, are drawn anew for each seed.
        edits = (*self.scale.edits, ("data.generate.seed", seed), *edits)
        run = Run(f"{name}_{seed}", f"{CONFIG}:{arg}", edits, seed, start=start, teacher=teacher)
        before = next((other for other in self.runs if other.name == run.name), None)
        if before is None:
            self.runs.append(run)
        elif before != run:
            raise ValueError(f"two runs are called {run.name}")
        return run

    def pretrained(self, name: str, seed: int, *edits: tuple[str, Any], steps: int = 0, arg: str = "") -> Run:
        """A masked autoencoder, of `short` steps by default."""
        return self.run(name, f"stage=pretrain,steps={steps or self.scale.short}{arg}", seed, *edits)

    def budgets(self) -> dict[int, Callable[[int], Run]]:
        """Pretraining of a seed, by its steps in all, from little to much."""
        scale = self.scale
        names = {scale.short: "short", scale.steps: "long"}
        made: dict[int, Callable[[int], Run]] = {
            steps: functools.partial(self.pretrained, names.get(steps, f"steps_{steps}"), steps=steps)
            for steps in (scale.short // 4, scale.short // 2, scale.short, scale.steps)
            if steps
        }
        if scale.more:
            arg = f"stage=pretrain,steps={scale.more}"
            made[scale.steps + scale.more] = lambda seed: self.run(
                "longer", arg, seed, start=made[scale.steps](seed).name
            )
        return made

    def tested(self, start: Run | None, seed: int, labels: int, stage: str = "finetune") -> Run:
        """A classifier, from weights or from scratch."""
        source = start.name.removesuffix(f"_{seed}") if start else "scratch"
        amount = f"{labels}_per_class" if labels else "all_labels"
        steps = self.scale.finetuning * (3 if labels == 0 else 1)
        arg = f"stage={stage},labels={labels}" + (f",steps={steps}" if stage == "finetune" else "")
        return self.run(f"{source}_{stage}_{amount}", arg, seed, start=start.name if start else "")

    def probed(self, start: Run) -> Run:
        """How short pretraining is read out: by one attending query on frozen features, with all labels."""
        return self.tested(start, start.seed, 0, "attentive")

    def row(self, name: str, make: Callable[[int], Run], **place: Any) -> Row:
        """A row whose runs `make` gives for each seed."""
        return Row(name, tuple(make(seed) for seed in range(self.scale.seeds)), **place)

    def varied(self, name: str, folder: str, *edits: tuple[str, Any], paper: float | None = None) -> Row:
        """A row of short pretraining with edits, read out by `probed`."""
        return self.row(name, lambda seed: self.probed(self.pretrained(folder, seed, *edits)), paper=paper)

    def usual(self, name: str, paper: float | None = None) -> Row:
        """The row that the others of a question are compared with: short pretraining as it is."""
        return self.varied(name, "short", paper=paper)
