"""Metrics: ranks, ties, merging, and numbers that padding cannot move."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from videomae_jax.evaluation import classification, neighbours
from videomae_jax.evaluation.classification import Scores


def scores(values, labels) -> Scores:
    values, labels = np.asarray(values, np.float64), np.asarray(labels)
    return Scores(np.arange(len(labels)), values, labels, np.zeros((len(labels), 0)))


def test_the_worked_example_of_the_published_merge():
    merged = classification.merge_views(np.array([[[2.0, 0, 0], [0, 1.0, 0]]], np.float32), "softmax")
    np.testing.assert_allclose(merged, [[0.4995, 0.3413, 0.1592]], atol=1e-4)
    assert merged.dtype == np.float64
    # Another answer than that of averaged logits.
    assert classification.merge_views(np.array([[[0, 9.0], [4.0, 0]], [[0, 9.0], [6.0, 0]]]), "softmax")[
        :, 0
    ].tolist() == pytest.approx([0.491, 0.4988], abs=1e-3)


def test_merging_the_other_heads():
    outputs = np.array([[[0.0, 2.0], [0.0, -2.0]]])
    np.testing.assert_allclose(classification.merge_views(outputs, "multilabel"), [[0.5, 0.5]])
    np.testing.assert_allclose(classification.merge_views(outputs, "regression"), [[0.0, 0.0]])
    np.testing.assert_allclose(classification.merge_views(outputs - 1e4, "multilabel"), 0)


def test_accuracies():
    values = np.eye(6)[[0, 0, 1, 2, 5, 4]] * 0.5 + np.linspace(0.1, 0, 6)
    found = scores(values, [0, 1, 1, 2, 3, 4]).metrics("softmax")
    assert found["top1"] == pytest.approx(4 / 6)
    assert found["mean_class_accuracy"] == pytest.approx((1 + 0.5 + 1 + 0 + 1) / 5)
    assert found["top5"] == 1.0


def test_confusion_counts_every_video_once():
    confusion = scores([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 0, 1]).confusion()
    assert confusion.tolist() == [[1, 1], [1, 0]]


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.float64, (7, 6), elements=st.sampled_from([0.0, 0.1, 0.2])), st.data())
def test_ranks_agree_with_a_stable_sort(values, data):
    labels = np.array(data.draw(st.lists(st.integers(0, 5), min_size=7, max_size=7)))
    order = np.argsort(-values, axis=1, kind="stable")
    expected = [row.tolist().index(label) for row, label in zip(order, labels, strict=True)]
    assert classification.label_ranks(values, labels).tolist() == expected
    top1 = scores(values, labels).metrics("softmax")["top1"]
    assert top1 == pytest.approx((values.argmax(axis=1) == labels).mean())


def test_videos_without_a_label_do_not_count():
    values = [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]
    assert scores(values, [0, -1, 0]).metrics("softmax")["top1"] == 1.0


def test_mean_average_precision_leaves_out_classes_without_a_video():
    targets = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    values = np.array([[0.9, 0.5], [0.8, 0.5], [0.1, 0.5]])
    assert classification.mean_average_precision(values, targets) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("head", ["softmax", "multilabel", "regression"])
def test_what_is_not_finite_is_never_right(bad, head):
    """One output of one view of one video, of the class that is right or of another."""
    labels = np.array([0, 1])
    targets = np.eye(3)[labels] if head != "softmax" else np.zeros((2, 0))
    good = np.where(np.eye(3)[labels], 5.0, -5.0)[:, None].repeat(2, axis=1)
    for place in range(3):
        outputs = good.copy()
        outputs[1, 0, place] = bad
        with np.errstate(all="raise"):
            found = Scores(np.array([4, 7]), classification.merge_views(outputs, head), labels, targets)
        assert found.not_finite.tolist() == [7]
        figures = found.metrics(head)
        if head == "softmax":
            assert (figures["top1"], figures["top5"], figures["mean_class_accuracy"]) == (0.5, 0.5, 0.5)
            assert np.isfinite(figures["loss"])
        elif head == "multilabel":
            assert figures["mean_average_precision"] == pytest.approx(0.5)
        else:
            assert not figures["r2"] > 0
        with pytest.raises(classification.OutputError, match=r"it: the outputs for 1 of 2 videos .* is b:"):
            classification.check_finite(outputs, ["a", "b"], "it")


def test_average_precision_does_not_depend_on_the_order_of_ties(rng):
    """The published definition: a threshold takes all of a score at once."""
    scores, targets = rng.integers(0, 4, (50, 3)) / 4, rng.integers(0, 2, (50, 3)).astype(float)
    expected = []
    for score, target in zip(scores.T, targets.T, strict=True):
        recall, total = 0.0, 0.0
        for threshold in sorted(set(score), reverse=True):
            taken = score >= threshold
            reached = target[taken].sum() / target.sum()
            total, recall = total + (reached - recall) * target[taken].mean(), reached
        expected.append(total)
    for order in (np.arange(50), rng.permutation(50), np.argsort(targets[:, 0]), np.argsort(-targets[:, 0])):
        found = classification.mean_average_precision(scores[order], targets[order])
        assert found == pytest.approx(np.mean(expected), abs=1e-12)


def test_features_that_are_not_finite_have_no_vote():
    known = np.array([[1.0, 0], [np.nan, 0.1], [0, 1.0]])
    votes = neighbours.votes(known, np.array([0, 0, 1]), np.array([[1.0, 0.1], [np.inf, 1]]), 2, 3, 0.07)
    assert votes[0].argmax() == 0
    assert np.isnan(votes[1]).all()
    assert classification.label_ranks(votes, np.array([0, 0])).tolist()[1] > 5
    with pytest.raises(ValueError, match="none of the features of 3 known videos are finite"):
        neighbours.votes(known * np.nan, np.array([0, 0, 1]), known, 2, 3, 0.07)


def test_regression():
    truth = np.array([[0.0], [2.0]])
    found = Scores(np.arange(2), np.array([[1.0], [2.0]]), np.full(2, -1), truth).metrics("regression")
    assert found == {"mean_squared_error": 0.5, "mean_absolute_error": 0.5, "r2": 0.5}
    same = Scores(np.arange(2), np.array([[1.0], [2.0]]), np.full(2, -1), truth * 0)
    assert same.metrics("regression")["r2"] == 0.0


def test_chance():
    labels = np.array([0] * 60 + [1] * 40)
    assert classification.is_at_chance(0.6, labels)
    assert classification.is_at_chance(0.65, labels)
    assert not classification.is_at_chance(0.75, labels)
    assert classification.is_at_chance(0.5, np.array([0, 1]))
    assert not classification.is_at_chance(1.0, np.array([0, 1]))  # so few that luck reaches it


def test_neighbours_vote_with_their_nearness():
    known = np.array([[1.0, 0], [0.9, 0.1], [0, 1.0], [0, 0.5]])
    labels = np.array([0, 0, 1, 1])
    votes = neighbours.votes(known, labels, np.array([[2.0, 0.1], [0.1, 3.0]]), 3, 2, 0.07)
    np.testing.assert_allclose(votes, [[1, 0, 0], [0, 1, 0]], atol=1e-9)
    both = neighbours.votes(
        np.array([[1.0, 0], [0.6, 0.8]]), np.array([0, 1]), np.array([[1.0, 0]]), 2, 2, 0.5
    )
    weights = np.exp(np.array([1, 0.6]) / 0.5)
    np.testing.assert_allclose(both, [weights / weights.sum()])


def test_more_neighbours_than_videos_and_many_questions(rng):
    known = rng.normal(size=(5, 3))
    labels = np.array([0, 1, 2, 0, 1])
    asked = rng.normal(size=(2100, 3))  # more than one block
    votes = neighbours.votes(known, labels, asked, 3, 20, 0.5)
    again = neighbours.votes(known, labels, asked[2050:], 3, 20, 0.5)
    np.testing.assert_allclose(votes[2050:], again)
    np.testing.assert_allclose(votes.sum(axis=1), 1)
