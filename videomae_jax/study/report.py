"""The report of a study: tables, pictures and verdicts, from nothing but its results file."""

import importlib.util
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from videomae_jax import storage
from videomae_jax.config import UserError
from videomae_jax.data import moving_digits
from videomae_jax.study import claims, questions
from videomae_jax.study.claims import Claim, Interval, Verdict
from videomae_jax.study.plan import Plan
from videomae_jax.study.questions import Question, Row
from videomae_jax.study.runner import Results, trouble

Lines = Mapping[str, Mapping[str, Any]]
_CHANCE = 100 / len(moving_digits.CLASSES)


def write(plan: Plan, results: pathlib.Path, out: pathlib.Path, command: str) -> list[Verdict]:
    """Writes OUT/evidence.md, its pictures in OUT/images, and the results beside it; returns the verdicts.

    Args:
        command: that carries out the plan.

    Raises:
        UserError: no results, or no plotting library.
    """
    check_plotting()
    every = Results(results).lines
    places = {name: number for number, name in enumerate(every, 1)}
    by_name = {run.name: run for run in plan.runs}
    lines = {
        name: line
        for name, line in every.items()
        if name in by_name and not trouble(line, by_name[name], by_name)
    }
    if len(lines) < len(every):
        print(f"{len(every) - len(lines)} results of another plan are left out")
    if not lines:
        raise UserError(f"{results} has no result yet: run the study first")
    (out / "images").mkdir(parents=True, exist_ok=True)
    copy = out / "evidence.jsonl"
    if results.resolve() != copy.resolve():
        storage.write_text(copy, results.read_text())
    rows = questions.by_row(plan.questions, lines)
    verdicts = [claims.judge(claim, rows) for question in plan.questions for claim in question.claims]
    text = [*_opening(lines, plan, command), *_verdicts(verdicts)]
    for question in plan.questions:
        is_run = any(rows[row.name] for row in question.rows)
        if is_run:
            draw(question, rows, out / "images" / f"evidence_{question.key}")
        text += _section(question, rows, places, is_run)
    storage.write_text(out / "evidence.md", "\n".join([*text, *_LIMITS]) + "\n")
    return verdicts


_LIMITS = (
    "## Limits",
    "",
    "A model of 0.9 million parameters and clips of 8 x 32 x 32 pixels stand for ViT-B and 16 x 224 x 224, "
    "generated digits for videos of people: what is found here says how the method behaves where motion must "
    "be understood and little time is given, not how well it does on Kinetics. Few seeds make wide "
    "intervals: a difference of a few points is not seen, and verdicts are each at 95 %, not corrected for "
    "their number; those on masks, decoder, target, quantity and domain share a row, short pretraining as "
    "it is, and its luck. Seeds draw the videos, the labelled ones among them, the initialisation and the "
    "order. Everything is tested on 256 videos of the same generator, so an accuracy is a multiple of 0.4 "
    "points. Frozen features are read out after as many epochs for all, with no look at the validation part.",
)


def _opening(lines: Lines, plan: Plan, command: str) -> Iterator[str]:
    each = list(lines.values())
    hours = sum(line["seconds"] for line in each) / 3600
    code = ", ".join(sorted({line["code"] for line in each}))
    machines = ", ".join(sorted({line["machine"] for line in each}))
    yield "# Evidence"
    yield ""
    yield (
        f"Made by `{command}` from [{len(each)} of {len(plan.runs)} runs](evidence.jsonl) on {machines}, "
        f"{hours:.1f} hours of runs in all, at least, code {code}."
    )
    yield ""
    yield (
        f"Figures are top-1 accuracies in per cent on the test part ({len(moving_digits.CLASSES)} classes); "
        "of finetuning, with the weights that were best on the validation part. "
        f"Chance is {_CHANCE:.2f}, dotted in the pictures; a row that is not above it at 95 % has a *. "
        "Settings were chosen on the validation part alone. "
        f"{plan.scale.seeds} seeds are planned for each row; ± is half of the 95 % interval over those there "
        "are (Student's t), which two seeds make very wide. Each figure links to its line in the results, "
        "which has the command that makes it again."
    )
    yield ""


def _verdicts(verdicts: Sequence[Verdict]) -> Iterator[str]:
    told = [verdict for verdict in verdicts if verdict.is_tried]
    agree = sum(verdict.word == "agrees" for verdict in told)
    yield "## What the paper says, and what was found"
    yield ""
    alike = sum(verdict.gain is not None and verdict.gain.mean > 0 for verdict in told)
    yield (
        f"Of {len(told)} findings that were tried {alike} point as in the paper, or what is cited, {agree} "
        f"of them at 95 %."
    )
    yield ""
    yield "| | the paper | here, points | verdict |"
    yield "|---|---|---|---|"
    for verdict in verdicts:
        gain = verdict.gain or ""
        yield f"| {verdict.claim.text} | {verdict.claim.paper} | {gain} | {verdict.word} |"
    yield ""
    against = [verdict for verdict in told if verdict.gain and verdict.gain.mean < 0]
    if against:
        yield "What points the other way, and why that may be (not tried):"
        yield ""
        yield from (f"* {verdict.claim.text}: {_reason(verdict)}" for verdict in against)
        yield ""


def _reason(verdict: Verdict) -> str:
    return f"{verdict.gain}. {verdict.claim.otherwise}".strip()


def _section(
    question: Question, rows: Mapping[str, Mapping[int, float]], places: Mapping[str, int], is_run: bool
) -> Iterator[str]:
    yield f"## {question.title}"
    yield ""
    yield question.text
    yield ""
    if not is_run:
        yield "Not run yet."
        yield ""
        return
    yield f"![{question.title}](images/evidence_{question.key}.png)"
    yield ""
    has_paper = any(row.paper is not None for row in question.rows)
    more = [f"the paper ({question.source})"] if has_paper else []
    more += [f"against {question.baseline}"] if question.baseline else []
    yield f"| {' | '.join(['', 'mean', 'seeds', *more])} |"
    yield "|" + "---|" * (3 + len(more))
    series = list(dict.fromkeys(row.series for row in question.rows))
    for row in sorted(question.rows, key=lambda row: (series.index(row.series), row.x or 0)):
        cells = [row.name, _mean(rows[row.name]), _each(row, rows[row.name], places)]
        if has_paper:
            cells.append("" if row.paper is None else f"{row.paper:.1f}")
        if question.baseline:
            gain = claims.judge(Claim("", row.name, question.baseline, ""), rows).gain
            cells.append(str(gain) if gain and row.name != question.baseline else "")
        yield f"| {' | '.join(cells)} |"
    yield ""


def _mean(found: Mapping[int, float]) -> str:
    if not found:
        return "not run"
    of_row = claims.interval(list(found.values()))
    half = f" ± {of_row.half:.1f}" if math.isfinite(of_row.half) else ""
    return f"{of_row.mean:.1f}{half}" + (" *" if of_row.low <= _CHANCE else "")


def _each(row: Row, found: Mapping[int, float], places: Mapping[str, int]) -> str:
    return ", ".join(
        f"[{found[run.seed]:.1f}](evidence.jsonl#L{places[run.name]})"
        for run in row.runs
        if run.seed in found
    )


def check_plotting() -> None:
    """Refuses to begin what could not be drawn.

    Raises:
        UserError: no plotting library.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib: EXTRAS=study launch/local.sh study ...")


def draw(question: Question, rows: Mapping[str, Mapping[int, float]], path: pathlib.Path) -> None:
    """Writes PATH.png and PATH.svg: bars with intervals, or curves with bands."""
    import matplotlib

    matplotlib.use("Agg")
    # The same bytes each time, and letters that can be searched.
    matplotlib.rcParams.update({"svg.hashsalt": "videomae_jax", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    shown = [row for row in question.rows if rows[row.name]]
    means = {row.name: claims.interval(list(rows[row.name].values())) for row in shown}
    if question.axis:
        _curves(axes, shown, means)
        axes.set(xlabel=question.axis, ylabel="top-1, %")
        axes.axhline(_CHANCE, color="gray", linestyle=":", linewidth=1)
    else:
        _bars(axes, shown, means, rows)
        axes.axvline(_CHANCE, color="gray", linestyle=":", linewidth=1)
    axes.set_title(question.title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(os.fspath(path.with_suffix(suffix)), dpi=110, metadata=metadata)
    pyplot.close(figure)


def _half(found: Interval) -> float:
    return found.half if math.isfinite(found.half) else 0.0


def _curves(axes: Any, shown: Sequence[Row], means: Mapping[str, Interval]) -> None:
    for row in shown:
        if row.x is None:
            axes.axhline(means[row.name].mean, color="gray", linestyle="--", label=row.name)
    shown = [row for row in shown if row.x is not None]
    for series in dict.fromkeys(row.series for row in shown):
        points = sorted(
            ((row.x or 0.0, means[row.name]) for row in shown if row.series == series),
            key=lambda point: point[0],
        )
        places = [x for x, _ in points]
        centre = [found.mean for _, found in points]
        low = [max(found.mean - _half(found), 0.0) for _, found in points]
        high = [min(found.mean + _half(found), 100.0) for _, found in points]
        (line,) = axes.plot(places, centre, marker="o", label=series)
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if len(points) == 1:  # has no band
            axes.vlines(places, low, high, color=line.get_color(), alpha=0.6)
    axes.set_xscale("log")
    ticks = sorted({row.x for row in shown if row.x is not None})
    is_near = [i > 0 and tick < 1.5 * ticks[i - 1] for i, tick in enumerate(ticks)]
    names = [f"\n{tick:g}" if near else f"{tick:g}" for tick, near in zip(ticks, is_near, strict=True)]
    axes.set_xticks(ticks, names)
    axes.minorticks_off()
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False)


def _bars(
    axes: Any,
    shown: Sequence[Row],
    means: Mapping[str, Interval],
    rows: Mapping[str, Mapping[int, float]],
) -> None:
    for place, row in enumerate(shown):
        found = means[row.name]
        axes.barh(place, found.mean, xerr=_half(found), color="tab:blue", alpha=0.6, capsize=3)
        axes.plot(list(rows[row.name].values()), [place] * found.count, "k.", markersize=4)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, min(axes.get_xlim()[1], 100))  # two seeds give intervals that leave what can be
    axes.set_xlabel("top-1, %")
