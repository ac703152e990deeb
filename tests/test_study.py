"""Studies: the plan holds together, runs are carried out once, and a report says what its results say."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_config
from hypothesis import given
from hypothesis import strategies as st

from videomae_jax import config as settings
from videomae_jax.config import UserError
from videomae_jax.study import carry_out, claims, plan, report, runner
from videomae_jax.study.claims import Claim
from videomae_jax.study.runner import Run, Slot
from videomae_jax.tasks import table
from videomae_jax.training import compute

CLAIM = Claim("more is more", "a", "b", "2 against 1")
FIGURES = st.lists(st.floats(0, 100), min_size=2, max_size=6)


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ([70, 71, 72], [50, 52, 51], "agrees"),
        ([50, 52, 51], [70, 71, 72], "does not"),
        ([50, 70, 60], [55, 55, 66], "cannot tell"),
        ([50], [40], "one seed"),
        ([], [40], "not run"),
    ],
)
def test_verdicts(better, worse, word):
    rows = {"a": dict(enumerate(map(float, better))), "b": dict(enumerate(map(float, worse)))}
    assert claims.judge(CLAIM, rows).word == word


def test_only_seeds_of_both_sides_count():
    rows = {"a": {0: 70.0, 1: 71.0, 2: 5.0}, "b": {0: 50.0, 1: 52.0, 3: 99.0}}
    gain = claims.judge(CLAIM, rows).gain
    assert gain is not None
    assert (gain.count, gain.mean) == (2, 19.5)


@given(FIGURES, st.floats(-50, 50))
def test_an_interval_moves_with_its_figures(figures, shift):
    before, after = claims.interval(figures), claims.interval([x + shift for x in figures])
    assert after.mean == pytest.approx(before.mean + shift, abs=1e-9)
    assert after.half == pytest.approx(before.half, abs=1e-6)
    assert before.low <= before.mean <= before.high


def test_an_interval_covers_the_truth_as_often_as_it_says():
    import numpy as np

    draws = np.random.default_rng(0).normal(10, 3, (2000, 3))
    found = [claims.interval(list(row)) for row in draws]
    assert sum(i.low <= 10 <= i.high for i in found) / 2000 == pytest.approx(0.95, abs=0.015)


def load(run: Run):
    """The settings that a run's command line gives."""
    path, _, arg = run.config.partition(":")
    config = load_config(pathlib.PurePath(path).stem, arg)
    config.update_from_flattened_dict(dict(run.edits) | {"seed": run.seed})
    return config


@pytest.mark.parametrize("scale", plan.SCALES)
def test_every_run_of_a_plan_can_be_set_up(scale):
    runs = plan.Plan(plan.SCALES[scale]).runs
    seen: dict[str, Run] = {}
    for run in runs:
        assert run.name not in seen
        assert set(run.needs) <= seen.keys(), f"{run.name} comes before what it needs"
        assert all(seen[need].seed == run.seed for need in run.needs)
        seen[run.name] = run
    made = set()
    for run in runs:
        if run.seed == 0 and not run.needs and (run.config, run.edits) not in made:
            made.add((run.config, run.edits))
            config = compute.on_this_machine(settings.checked(load(run)))
            if config.task in ("pretrain", "contrast"):
                table.make_task(config)


def test_questions_ask_what_was_run():
    laptop = plan.Plan(plan.SCALES["laptop"])
    names = [row.name for question in laptop.questions for row in question.rows]
    asked = {claim.better for q in laptop.questions for claim in q.claims}
    asked |= {claim.worse for q in laptop.questions for claim in q.claims}
    assert asked <= set(names)
    for question in laptop.questions:
        of_question = [row.name for row in question.rows]
        assert len(set(of_question)) == len(of_question)
        assert all(len(row.runs) == 3 for row in question.rows)


def test_two_runs_of_one_name_are_refused():
    one = plan.Plan(plan.SCALES["smoke"])
    one.run("mae", "stage=pretrain,steps=5", 0)
    with pytest.raises(ValueError, match="two runs are called mae_0"):
        one.run("mae", "stage=pretrain,steps=6", 0)


class Pretended(runner.Runner):
    """Writes what a run would have left."""

    def __init__(self, workdir, fails=()):
        super().__init__(workdir, "smoke")
        self.fails, self.order = set(fails), []

    def _train(self, run, slot, log):
        self.order.append(run.name)
        folder = self.workdir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            out.write("what went on\nwhat went wrong\n")
        (folder / "config.json").write_text(json.dumps({"config": {"seed": run.seed}, "data": "0" * 64}))
        if run.name in self.fails:
            return 1
        summary = {"interrupted": False, "test": {"best": {"top1": 0.5 + run.seed / 10}}}
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0


SLOTS = [Slot("2 pretended cores", {}, frozenset()) for _ in range(2)]
CHAIN = [
    Run("first_0", "configs/study.py", (), 0),
    Run("second_0", "configs/study.py", (), 0, start="first_0"),
    Run("third_0", "configs/study.py", (), 0, start="second_0", teacher="first_0"),
]


def test_runs_wait_for_what_they_need_and_are_made_once(tmp_path):
    work = Pretended(tmp_path)
    work.run(CHAIN[::-1], SLOTS)
    assert work.order == ["first_0", "second_0", "third_0"]
    again = Pretended(tmp_path)
    again.run(CHAIN, SLOTS)
    assert again.order == []
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == ["first_0", "second_0", "third_0"]
    assert lines[2]["command"].endswith(
        "--config.init_from=RUNS/second_0 --config.teacher=RUNS/first_0 --workdir=RUNS/third_0"
    )


def test_runs_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("settings.py").write_text("lr = 1")
    run = Run("first_0", "settings.py:steps=9", (), 0)
    Pretended(tmp_path / "study").run([run], SLOTS)
    pathlib.Path("settings.py").write_text("lr = 2")
    with pytest.raises(
        UserError, match=r"first_0 was made before its config file changed: .*settings\.py back"
    ):
        Pretended(tmp_path / "study").run([run], SLOTS)


def test_what_began_from_another_run_is_of_another_plan_too(tmp_path):
    """Its command says where it began, not how that was made."""
    child = Run("child_0", "configs/study.py", (), 0, start="first_0")
    Pretended(tmp_path).run([CHAIN[0], child], SLOTS)
    longer = Run("first_0", "configs/study.py:steps=9", (), 0)
    with pytest.raises(UserError, match="first_0 is of another plan"):
        Pretended(tmp_path).run([longer, child], SLOTS)
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(lines[1] + "\n")
    with pytest.raises(UserError, match="child_0 began from another first_0 than this plan's"):
        Pretended(tmp_path).run([longer, child], SLOTS)
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(UserError, match=r"results\.jsonl:3 is a second result of child_0"):
        Pretended(tmp_path)


def test_a_failed_run_is_told_and_tried_again(tmp_path):
    other = Run("other_0", "configs/study.py", (), 0)
    work = Pretended(tmp_path, fails={"first_0"})
    with pytest.raises(UserError, match=r"3 of 4 runs failed, first first_0: what went wrong; see .*\.log"):
        work.run([*CHAIN, other], SLOTS)
    assert set(work.results.lines) == {"other_0"}
    again = Pretended(tmp_path)
    again.run([*CHAIN, other], SLOTS)
    assert len(again.order) == 3


def test_seconds_of_all_sessions_count_and_tell_how_long_the_others_take(tmp_path, capsys):
    long = [Run(f"long_{seed}", "configs/study.py:steps=9", (), seed) for seed in range(3)]
    short = Run("short_0", "configs/study.py:steps=3", (), 0)
    (tmp_path / "long_0.log").write_text("what went on\n# session: 600 s\n")
    Pretended(tmp_path).run([long[0], *CHAIN], SLOTS[:1])
    assert [line["seconds"] for line in runner.Results(tmp_path / "results.jsonl").lines.values()] == [
        600,
        0,
        0,
        0,
    ]
    capsys.readouterr()
    Pretended(tmp_path).run([*long, *CHAIN, short], SLOTS[:1])
    told = [line.split("about ")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    # After the second: one like it (300 s, the mean of its kind) and one of another (120 s, the mean of all).
    assert told == ["7 min left", "2 min left", "0 min left"]


@pytest.mark.parametrize("line", ['{"run": \n', '{"step": 1}\n', "[]\n"])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_text('{"run": "a"}\n' + line)
    with pytest.raises(UserError, match=r"results.jsonl:2 is no result of a run"):
        runner.Results(tmp_path / "results.jsonl")


@pytest.fixture
def pretended(tmp_path):
    """Results of every run of the smoke scale."""
    work = Pretended(tmp_path / "study")
    work.run(plan.Plan(plan.SCALES["smoke"]).runs, SLOTS)
    return work.results.path


def test_a_report_says_what_its_results_say(pretended, tmp_path, capsys):
    carry_out.show(str(pretended.parent), str(tmp_path / "docs"))
    text = (tmp_path / "docs" / "evidence.md").read_text()
    lines = (tmp_path / "docs" / "evidence.jsonl").read_text().splitlines()
    cells = re.findall(r"\[([\d.]+)\]\(evidence.jsonl#L(\d+)\)", text)
    assert len(cells) == 2 * sum(len(question.rows) for question in plan.Plan(plan.SCALES["smoke"]).questions)
    for figure, number in cells:
        assert 100 * json.loads(lines[int(number) - 1])["figures"]["top1"] == pytest.approx(float(figure))
    for suffix in ("png", "svg"):
        assert (tmp_path / "docs" / "images" / f"evidence_labels.{suffix}").stat().st_size > 1000
    assert "not run" in capsys.readouterr().out  # claims of rows that this scale has not


def test_a_report_says_why_what_points_the_other_way_may(pretended, tmp_path):
    lines = [json.loads(line) for line in pretended.read_text().splitlines()]
    for line in lines:
        if line["run"].startswith("frame_attentive"):
            line["figures"]["top1"] += 0.1
    pretended.write_text("".join(json.dumps(line) + "\n" for line in lines))
    carry_out.show(str(pretended), str(tmp_path / "docs"))
    text = (tmp_path / "docs" / "evidence.md").read_text()
    assert "* tube masking beats frame masking: -10.0 ± 0.0. The slice that frame masking leaves" in text
    assert "Of 3 findings that were tried 0 point as in the paper" in text


def test_a_report_can_be_made_again_from_the_committed_results(pretended, tmp_path):
    for out, source in (("one", pretended), ("two", tmp_path / "one" / "evidence.jsonl")):
        carry_out.show(str(source), str(tmp_path / out))
    for path in sorted(p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_another_figure_gives_another_report(pretended, tmp_path):
    carry_out.show(str(pretended), str(tmp_path / "one"))
    pretended.write_text(pretended.read_text().replace('"top1": 0.6', '"top1": 0.7'))
    carry_out.show(str(pretended), str(tmp_path / "two"))
    one, two = ((tmp_path / name / "evidence.md").read_text() for name in ("one", "two"))
    assert "55.0" in one
    assert "55.0" not in two
    assert "60.0" in two


def test_wrong_uses_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="--scale=big is unknown: use smoke, laptop, gpu"):
        carry_out.run("big", tmp_path, 1)
    with pytest.raises(UserError, match="no results; name the --workdir"):
        carry_out.show(str(tmp_path), str(tmp_path))
    (tmp_path / "results.jsonl").write_text('{"run": "a", "scale": "gpu"}\n')
    with pytest.raises(UserError, match="has results of --scale=gpu: use another --workdir"):
        carry_out.run("smoke", tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run the study in the folder of the project"):
        carry_out.run("smoke", tmp_path, 1)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="matplotlib"):
        report.check_plotting()


@pytest.mark.slow
def test_the_smallest_study_by_its_command(tmp_path):
    """Every run for real; the second call finds nothing to do."""
    command = [sys.executable, "-m", "videomae_jax", "study", "--scale=smoke", f"--workdir={tmp_path}"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "24 runs, 24 to do" in first.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "24 runs, 0 to do" in again.stdout
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({line["config_hash"] for line in lines}) == 24
    assert {line["scale"] for line in lines} == {"smoke"}
    assert (tmp_path / "evidence.md").exists()


@pytest.mark.slow
def test_sigterm_ends_a_study_and_its_runs_where_ctrl_c_is_ignored(tmp_path):
    """As in the background of a script; nothing of it stays behind."""
    command = [sys.executable, "-m", "videomae_jax", "study", "--scale=smoke", f"--workdir={tmp_path}"]
    deaf = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command]
    process = subprocess.Popen(deaf, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*.log")):
        assert process.poll() is None
        time.sleep(0.2)
    time.sleep(3)
    process.terminate()
    assert "the same command goes on" in process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert subprocess.run(["pgrep", "-f", f"workdir={tmp_path}"], check=False).returncode == 1


def test_a_row_is_above_chance_where_its_interval_is():
    chance = report._CHANCE
    assert report._mean({0: chance + 1, 1: chance + 9}).endswith("*")
    assert not report._mean({0: chance + 8, 1: chance + 8.1}).endswith("*")
