"""Frame-mAP against the official evaluator's figures, by its definition, and as a command."""

import json

import numpy as np
import pytest
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from videomae_jax.apps import score_detections
from videomae_jax.config import UserError
from videomae_jax.data import boxes, scenes
from videomae_jax.data.sources import SourceError
from videomae_jax.evaluation import detection
from videomae_jax.evaluation.detection import Boxes


@pytest.fixture
def official():
    folder = FIXTURES / "golden" / "ava_eval"
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {FIXTURES}: set VIDEOMAE_JAX_FIXTURES")
    return folder


def made(rows) -> Boxes:
    """(frame, left, top, right, bottom, action, score) rows."""
    table = np.array(rows, float).reshape(-1, 7)
    return Boxes(table[:, 0].astype(int), table[:, 1:5], table[:, 5].astype(int), table[:, 6])


def test_equals_the_official_evaluator(official, tmp_path):
    classes, out = tmp_path / "classes.csv", tmp_path / "ava.json"
    ids = json.loads((official / "ava_evaluated_class_ids.json").read_text())
    classes.write_text("\n".join(f"{i},action {i}" for i in ids))
    assert scenes._SCORED["ava"] == set(ids)
    files = [str(official / name) for name in ("ava_groundtruth.csv", "ava_detections.csv")]
    found = score_detections.run(*files, str(classes), "", str(out))
    expected = json.loads((official / "ava_expected.json").read_text())
    each = {int(name.split()[-1]): value for name, value in expected.items() if "Category" in name}
    assert len(each) == len(found["classes"]) == 60
    for action, value in each.items():
        assert found["classes"][str(action)] == pytest.approx(value, abs=1e-9), action
    assert found["mAP"] == pytest.approx(expected["PascalBoxes_Precision/mAP@0.5IOU"], abs=1e-9)
    assert json.loads(out.read_text()) == found


def written_out(truth: Boxes, found: Boxes, action: int) -> float | None:
    """The definition, detection by detection, at every score that occurs."""
    total = int((truth.actions == action).sum())
    if not total:
        return None
    mine = [i for i in np.argsort(-found.scores) if found.actions[i] == action]
    taken, right = set(), {}
    for i in mine:
        theirs = [j for j in range(len(truth.frames)) if truth.frames[j] == found.frames[i]]
        theirs = [j for j in theirs if truth.actions[j] == action]
        overlap = [detection.overlaps(found.corners[[i]], truth.corners[[j]])[0, 0] for j in theirs]
        best = int(np.argmax(overlap)) if theirs else -1
        right[i] = bool(theirs) and overlap[best] >= 0.5 and theirs[best] not in taken
        if right[i]:
            taken.add(theirs[best])
    points = []
    for score in sorted({found.scores[i] for i in mine}, reverse=True):
        kept = [right[i] for i in mine if found.scores[i] >= score]
        points.append((sum(kept) / total, sum(kept) / len(kept)))
    area, before = 0.0, 0.0
    for place, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[place:])
        before = recall
    return area


corner = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda x: (*x, x[0] + 2, x[1] + 2))
row = st.tuples(st.integers(0, 2), corner, st.integers(1, 3), st.sampled_from([0.1, 0.5, 0.9]))
rows = st.lists(row, max_size=12).map(lambda found: [(f, *c, a, s) for f, c, a, s in found])


@given(rows, rows, st.randoms())
@settings(deadline=None)
def test_is_the_definition_whatever_the_order_of_rows(truth, found, random):
    """Ties, empty classes, duplicate boxes, and frames without truth are among these."""
    actions = np.array([1, 2, 3])
    expected = detection.average_precisions(made(truth), made(found), actions)
    for action, value in expected.items():
        assert value == pytest.approx(written_out(made(truth), made(found), action), abs=1e-12)
    random.shuffle(found)
    again = detection.average_precisions(made(truth), made(found), actions)
    assert all(again[a] == pytest.approx(expected[a], abs=1e-12) for a in expected if expected[a] is not None)


def test_a_second_detection_of_a_box_is_wrong_and_one_without_area_is_none():
    truth = made([(0, 0, 0, 2, 2, 1, 1), (1, 0, 0, 2, 2, 1, 1)])
    twice = [(0, 0, 0, 2, 2, 1, 0.9), (0, 0, 0, 2, 2, 1, 0.8), (1, 0, 0, 2, 2, 1, 0.7)]
    assert detection.average_precisions(truth, made(twice), np.array([1]))[1] == pytest.approx(
        0.5 + 0.5 * 2 / 3
    )
    flat = [(0, 2, 2, 0, 0, 1, 0.95), *twice]
    assert detection.average_precisions(truth, made(flat), np.array([1, 2])) == {
        1: pytest.approx(0.5 + 0.5 * 2 / 3),
        2: None,
    }


TRUTH = "a,1,0.1,0.1,0.5,0.5,1,7\na,2.0,0.1,0.1,0.5,0.5,1,7\nb,3\n"
CLASSES = 'item { name: "run" id: 1 }\nlabel { name: "sit" label_id: 2 }\n'


def score(tmp_path, found, truth=TRUTH, classes=CLASSES, excluded=""):
    paths = [tmp_path / name for name in ("truth.csv", "found.csv", "classes.pbtxt", "excluded.csv")]
    for path, text in zip(paths, (truth, found, classes, excluded), strict=True):
        path.write_text(text)
    names = [str(path) for path in paths[:3]]
    return score_detections.run(*names, str(paths[3]) if excluded else "", str(tmp_path / "out.json"))


def test_excluded_frames_and_times_as_they_are_written(tmp_path):
    found = "a,0001,0.1,0.1,0.5,0.5,1,0.5\nc,1,0.1,0.1,0.5,0.5,1,0.9\n"
    whole = score(tmp_path, found)
    assert whole["mAP"] == whole["classes"]["1"] == pytest.approx(0.25)
    assert whole["classes"]["2"] is None
    assert whole["frames_without_truth"] == 1
    assert score(tmp_path, found, excluded="c,1\na,2\n")["mAP"] == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"found": ""}, UserError, "found.csv has no box in it"),
        ({"found": "b,3\n"}, UserError, "found.csv has no box in it"),
        ({"found": "z,1,0,0,1,1,1,1\n"}, UserError, "has no frame of .*truth.csv, such as a,1000 ms"),
        ({"found": "a,1,0,0,1,1\n"}, SourceError, "found.csv line 1 has 6 fields"),
        ({"found": "a,1,0,0,1,1,1,1\na,1,0,0,x,1,1,1\n"}, SourceError, "found.csv line 2: .*'x'"),
        ({"found": "a,1,0,0,nan,1,1,1\n"}, SourceError, "line 1: .* no number or time"),
        ({"found": "a,1,0,0,1,1,1.5,1\n"}, SourceError, "line 1: the action 1.5"),
        ({"truth": "a,1,0.5,0,0.1,1,1,1\n"}, UserError, "truth.csv line 1: a box without area"),
        ({"classes": "no classes"}, SourceError, "classes.pbtxt line 1: expected number,name"),
        ({"classes": "1,run\n1,sit\n"}, SourceError, "stands there twice"),
        ({"classes": "item { id: 3 }"}, SourceError, "has no id or name"),
        ({"excluded": "a\n"}, SourceError, "excluded.csv line 1: expected video,time"),
        ({"excluded": "a,1\na,2\nb,3\n"}, UserError, "excluded.csv leaves out every frame of .*truth.csv"),
        ({"classes": "7,jump\n"}, UserError, "truth.csv has no box of the classes in .*classes.pbtxt"),
    ],
)
def test_files_that_are_refused(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        score(tmp_path, **{"found": "a,1,0.1,0.1,0.5,0.5,1,0.5\n"} | change)


def test_the_truth_is_not_written_over(tmp_path):
    (tmp_path / "truth.csv").write_text(TRUTH)
    (tmp_path / "classes.pbtxt").write_text(CLASSES)
    names = [str(tmp_path / name) for name in ("truth.csv", "truth.csv", "classes.pbtxt")]
    with pytest.raises(UserError, match=r"truth\.csv is what is read: name another file"):
        score_detections.run(*names, "", names[0])
    assert (tmp_path / "truth.csv").read_text() == TRUTH


def test_rows_know_their_frame():
    assert boxes.Row("a", 1.5, None, -1, 1.0, 1).frame == ("a", 1500)


def test_half_of_the_union_is_enough():
    truth, half = made([(0, 0, 0, 2, 2, 1, 1)]), made([(0, 0, 0, 2, 1, 1, 0.9)])
    assert detection.average_precisions(truth, half, np.array([1])) == {1: 1.0}


def test_files_may_begin_with_the_names_of_their_columns(tmp_path):
    rows, names = "a,1,0,0,1,1,2\n", "video,time,left,top,right,bottom,action\n"
    (tmp_path / "boxes.csv").write_text(names + rows)
    (tmp_path / "plain.csv").write_text(rows)
    with_names, without = (boxes.read_rows(str(tmp_path / file)) for file in ("boxes.csv", "plain.csv"))
    assert [row._replace(line=1) for row in with_names] == without
    (tmp_path / "classes.csv").write_text("number,name\n2,run\n")
    assert boxes.read_actions(str(tmp_path / "classes.csv")) == {2: "run"}
    (tmp_path / "excluded.csv").write_text("video,time\na,1\n")
    assert boxes.read_frames(str(tmp_path / "excluded.csv")) == {("a", 1000)}
