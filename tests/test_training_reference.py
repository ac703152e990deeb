"""Curves to hold a run against: read, thinned, compared and drawn; the committed ones are still true."""

import json
import time

import numpy as np
import pytest
from conftest import ROOT, load_config

from videomae_jax.config import UserError
from videomae_jax.tasks import table
from videomae_jax.training import reference


def _line(step: int) -> str:
    rare = {"knn_top1": step / 100} if step % 50 == 0 else {}
    return json.dumps({"step": step, "loss": 1 / step, "lr": 1.0} | rare) + "\n"


LOG = "".join(map(_line, range(10, 510, 10)))


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(LOG)
    return path


def test_a_curve_is_known_between_its_points_only(log):
    found = reference.read(str(log))
    assert found is not None
    assert set(found.curves) == {"loss", "knn_top1"}
    assert found.at("loss", 15) == pytest.approx((1 / 10 + 1 / 20) / 2)
    assert found.at("loss", 5) is found.at("loss", 501) is found.at("accuracy", 15) is None


def test_thinned_curves_keep_their_course(tmp_path):
    (tmp_path / "thin.jsonl").write_text(reference.thinned(LOG, lines=10))
    thin = reference.read(str(tmp_path / "thin.jsonl"))
    assert thin is not None
    assert len(thin.curves["loss"][0]) == 10
    assert len(thin.curves["knn_top1"][0]) == 10  # each of a figure that is rare
    assert thin.at("loss", 300) == pytest.approx(1 / 300, rel=0.05)
    assert reference.thinned(reference.thinned(LOG, lines=10), lines=10) == reference.thinned(LOG, lines=10)


def test_a_picture_of_both(log, tmp_path):
    found = reference.read(str(log))
    assert found is not None
    reference.draw(LOG, found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; curves of our configs are in docs/reference"),
        ("not json\n", "is no log of a run: name its log.jsonl"),
        ('{"loss": 1}\n', "is no log of a run"),
        ('{"step": 1, "seconds": 2}\n', "has no loss"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        reference.read(str(tmp_path / "log.jsonl"))


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_the_first_steps_are_those_of_the_committed_curve(task, tmp_path, capsys):
    """Also on other processors, where sums are rounded otherwise; and the run says and draws both."""
    path = ROOT / "docs" / "reference" / f"debug_{task}.jsonl"
    short = {"optim.duration": 6, "checkpoint.every": 6, "log.reference": str(path)}
    # Of the schedule's 20 steps the first four warm up: up to there both are the same.
    config = load_config("debug", f"task={task}")
    config.update_from_flattened_dict(short)
    table.train(config, tmp_path / "run", time.time())
    own = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    known = reference.read(str(path))
    assert known is not None
    for line in own[:5]:
        assert line["loss"] == pytest.approx(known.at("loss", line["step"]), rel=1e-3)
    assert not np.allclose(own[0]["loss"], own[4]["loss"], rtol=1e-3)
    assert "reference loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists()
