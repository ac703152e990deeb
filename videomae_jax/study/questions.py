"""The form of a study: questions, the rows that answer them, and the runs behind each row."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from videomae_jax.study.claims import Claim
from videomae_jax.study.runner import Run


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting, run with several seeds.

    Attributes:
        name: of the row, in its question.
        runs: one for each seed; their accuracy is the row's figure.
        x: where it stands on the axis of a curve, and `series` of which curve; None: a bar, or a level
            beside curves.
        paper: the paper's figure for it, in per cent.
    """

    name: str
    runs: tuple[Run, ...]
    x: float | None = None
    series: str = ""
    paper: float | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and the rows that answer it.

    Attributes:
        key: a word, also of its pictures' file names.
        title, text: for the reader; `text` ends with what limits the answer.
        axis: label of the curve's axis; "": bars.
        source: of the paper's figures.
        baseline: name of the row that all others are compared with in the table; "": none.
    """

    key: str
    title: str
    text: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    axis: str = ""
    source: str = ""
    baseline: str = ""


def figures(row: Row, lines: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
    """Accuracy in per cent by seed, of the runs that have a result."""
    found = {run.seed: lines[run.name]["figures"] for run in row.runs if run.name in lines}
    return {seed: 100 * of_run["top1"] for seed, of_run in found.items()}


def by_row(
    questions: Sequence[Question], lines: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[int, float]]:
    """`figures` of all rows, by their names."""
    return {row.name: figures(row, lines) for question in questions for row in question.rows}
