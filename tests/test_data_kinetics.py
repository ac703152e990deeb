"""Kinetics-710 from the lists of its parts."""

import pytest

from videomae_jax.data import kinetics


def test_classes_are_joined_by_name_and_by_renaming():
    k400 = ["abseiling", "massaging person's head", "changing wheel"]
    k600 = ["changing wheel (not on bike)", "Abseiling", "adjusting glasses"]
    k700 = ["massaging person\u2019s head", "adjusting_glasses", "zorbing"]
    same = {"changing wheel": "changing wheel (not on bike)"}
    classes, maps = kinetics.merge([k400, k600, k700], same)
    assert classes == [*k400, "adjusting glasses", "zorbing"]
    assert maps == [[0, 1, 2], [2, 0, 3], [1, 3, 4]]
    assert max(maps[0]) < len(k400)  # those of the first list come first


@pytest.mark.parametrize(
    ("lists", "same", "text"),
    [
        ([["a", "A"]], {}, "'A' stands twice in a list of 2"),
        ([["a"], ["b"]], {"a": "c"}, "'c' is renamed and in no list"),
        ([["a", "b"]], {"a": "b"}, "'b' stands twice"),
    ],
)
def test_lists_that_cannot_be_joined(lists, same, text):
    with pytest.raises(ValueError, match=text):
        kinetics.merge(lists, same)
