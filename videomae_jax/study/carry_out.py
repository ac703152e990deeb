"""The command `study`: carries out the plan of a scale, and reports what has been found."""

import collections
import pathlib
import signal

from videomae_jax.config import UserError
from videomae_jax.study import report, runner
from videomae_jax.study.claims import Verdict
from videomae_jax.study.plan import SCALES, Plan
from videomae_jax.study.runs import CONFIG


def _plan(scale: str) -> Plan:
    if scale not in SCALES:
        raise UserError(f"--scale={scale} is unknown: use {', '.join(SCALES)}")
    return Plan(SCALES[scale])


def run(scale: str, workdir: pathlib.Path, at_once: int) -> None:
    """Carries out all runs of a scale that have no result in WORKDIR/results.jsonl, and reports there.

    Raises:
        UserError: an unknown scale, a work folder of another one, or runs that failed.
    """
    if not pathlib.Path(CONFIG).is_file():
        raise UserError(f"no file {CONFIG}: run the study in the folder of the project")
    report.check_plotting()
    plan, work = _plan(scale), runner.Runner(workdir.absolute(), scale)
    others = {line["scale"] for line in work.results.lines.values()} - {scale}
    if others:
        raise UserError(f"{workdir} has results of --scale={min(others)}: use another --workdir")
    # Also where Ctrl-C is ignored, as in the background of a script.
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.default_int_handler)
    with runner.lock(workdir):
        try:
            work.run(plan.runs, runner.slots(at_once))
        finally:
            if work.results.lines:
                tell(report.write(plan, work.results.path, workdir, f"study --scale={scale}"))
                print(f"report: {workdir / 'evidence.md'}")


def show(source: str, out: str) -> None:
    """Writes OUT/evidence.md and its pictures from the results in a work folder, or from a results file.

    Raises:
        UserError: no results.
    """
    path = pathlib.Path(source)
    results = path / runner.RESULTS if path.is_dir() else path
    lines = runner.Results(results).lines
    if not lines:
        raise UserError(f"--report={source}: no results; name the --workdir of a study, or its results file")
    scale = collections.Counter(line["scale"] for line in lines.values()).most_common(1)[0][0]
    tell(report.write(_plan(scale), results, pathlib.Path(out), f"study --scale={scale}"))
    print(f"report: {pathlib.Path(out) / 'evidence.md'}")


def tell(verdicts: list[Verdict]) -> None:
    """The verdicts, a line each."""
    for verdict in verdicts:
        gain = f"{verdict.gain} points" if verdict.gain else ""
        print(f"{verdict.word:12} {gain:24} {verdict.claim.text} ({verdict.claim.paper})")
