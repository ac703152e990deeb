"""What validation and the multi-view test look at: frames and crops of the fact sheet, decoded once."""

import clips
import numpy as np
import pytest

from videomae_jax.data import augment, decode, pipeline, prepared, sampling, sources

SIZE = (224, 224)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    rng = np.random.default_rng(0)
    for name, frames, height, width in (("a", 20, 36, 48), ("b", 40, 48, 36), ("short", 3, 32, 32)):
        video = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        clips.write(folder / "x" / f"{name}.mp4", video)
    (folder / "x" / "broken.mp4").write_bytes(b"nothing")
    return folder


def ramp(height: int, width: int) -> np.ndarray:
    """One frame whose red tells the row and whose green tells the column, 16 bits of each in two parts."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, rows // 256 * 16 + columns // 256], -1).astype(np.uint8)[None]


def test_the_worked_example_of_published_test_crops():
    """340 x 256 becomes 297 x 224; three crops at columns 0, 36 and 73."""
    frames = np.zeros((1, 256, 340, 3), np.uint8)
    fitted = augment.fit(frames, SIZE)
    assert fitted.shape == (1, 224, 297, 3)
    exact = ramp(224, 297)
    for crop, left in enumerate((0, 36, 73)):
        found = augment.view_crop(exact, SIZE, crop, 3)
        np.testing.assert_array_equal(found, exact[:, :, left : left + 224])
    upright = ramp(297, 224)
    for crop, top in enumerate((0, 36, 73)):
        found = augment.view_crop(upright, SIZE, crop, 3)
        np.testing.assert_array_equal(found, upright[:, top : top + 224])
    np.testing.assert_array_equal(augment.view_crop(exact, SIZE, 0, 1), exact[:, :, 36:260])


@pytest.mark.parametrize(("free", "offset"), [(73, 36), (75, 38), (1, 0), (3, 2), (40, 20)])
def test_validation_offsets_are_rounded_to_the_even_side(free, offset):
    frames = ramp(224, 224 + free)
    found = augment.validation_crop(frames, SIZE)
    np.testing.assert_array_equal(found, frames[:, :, offset : offset + 224])


@pytest.mark.parametrize(
    ("given", "size", "fitted"),
    [
        ((256, 340), (224, 224), (224, 297)),
        ((340, 256), (224, 224), (297, 224)),
        ((224, 500), (224, 224), (224, 500)),  # as it is
        ((100, 100), (224, 224), (224, 224)),
        ((100, 200), (48, 64), (48, 96)),
        ((200, 100), (48, 64), (128, 64)),
    ],
)
def test_fitted_sizes(given, size, fitted):
    frames = augment.fit(np.zeros((1, *given, 3), np.uint8), size)
    assert frames.shape[1:3] == fitted


@pytest.mark.parametrize(("stride", "segments", "crops"), [(2, 3, 3), (0, 2, 3), (1, 1, 1)])
def test_all_views_of_a_video(folder, stride, segments, crops):
    """Segments outermost; each view is what reading it alone would give."""
    source = prepared.open_source(str(folder), "train")
    views = pipeline.TestViews(8, stride, (32, 32), segments, crops)
    for place, video in enumerate(source.ids):
        found = views.map((place, source[place]))
        assert found["video"].shape == (segments * crops, 8, 32, 32, 3)
        if video == "broken.mp4" or "broken" in video:
            assert (found["weight"], found["num_frames"]) == (0, 0)
            assert "broken.mp4" in found["error"]
            continue
        path = folder / video
        with decode.Video(str(path)) as opened:
            assert found["num_frames"] == opened.num_frames
            for segment in range(segments):
                if stride:
                    wanted = sampling.dense_view(opened.num_frames, 8, stride, segment, segments)
                else:
                    wanted = sampling.segment_view(opened.num_frames, 8, segment, segments)
                frames = augment.fit(opened.read(wanted), (32, 32))
                for crop in range(crops):
                    expected = augment.view_crop(frames, (32, 32), crop, crops)
                    np.testing.assert_array_equal(found["video"][segment * crops + crop], expected)


def test_the_validation_clip_is_the_middle_one(folder):
    source = prepared.open_source(str(folder), "train")
    place = source.ids.index("b.mp4" if "b.mp4" in source.ids else "x/b.mp4")
    found = pipeline.ValidationClip(8, 2, (32, 32)).map((place, source[place]))
    with decode.Video(str(folder / source.ids[place])) as opened:
        frames = opened.read(sampling.dense_clip(40, 8, 2, None))
    np.testing.assert_array_equal(found["video"][0], augment.validation_crop(frames, (32, 32)))


def test_without_randomness_a_stream_is_the_same_for_any_seed(folder):
    source = prepared.open_source(str(folder / "x"), "train").select([0, 2])
    clip = pipeline.ValidationClip(4, 1, (16, 16))
    rows = [pipeline.clips(source, clip, seed=seed, batch_size=2)[i] for seed in (0, 1) for i in range(4)]
    by_record = {int(row["record"]): row["video"] for row in rows[:4]}
    for row in rows:
        np.testing.assert_array_equal(row["video"], by_record[int(row["record"])])


def test_lists_with_several_labels_and_with_numbers(folder, tmp_path):
    listed = tmp_path / "multi.csv"
    listed.write_text(
        f"path,label\n{folder}/x/a.mp4,jump;run\n{folder}/x/b.mp4,run\n{folder}/x/short.mp4,;\n"
    )
    source = prepared.open_source(str(listed), "train", "multilabel")
    assert source.classes == ("jump", "run")
    assert source.targets == ((1, 1), (0, 1), (0, 0))
    assert source.labels == (-1, -1, -1)
    assert source.select([2, 0]).targets == ((0, 0), (1, 1))
    other = sources.relabel(source, ("run", "sit", "jump"))
    assert other.targets == ((1, 0, 1), (1, 0, 0), (0, 0, 0))
    with pytest.raises(sources.SourceError, match="the class 'jump', which is not among the 2 classes"):
        sources.relabel(source, ("run", "sit"))
    numbers = tmp_path / "numbers.csv"
    numbers.write_text(f"{folder}/x/a.mp4 0.5;-1\n{folder}/x/b.mp4 2;3e1\n")
    found = prepared.open_source(str(numbers), "train", "regression")
    assert found.targets == ((0.5, -1.0), (2.0, 30.0))
    assert len(found.classes) == 2
    numbers.write_text(f"{folder}/x/a.mp4 0.5\n{folder}/x/b.mp4 2;3\n")
    with pytest.raises(sources.SourceError, match=r"line 2: 2 numbers where 1 were before"):
        prepared.open_source(str(numbers), "train", "regression")
    numbers.write_text(f"{folder}/x/a.mp4 fast\n")
    with pytest.raises(sources.SourceError, match=r"line 1: fast is no number"):
        prepared.open_source(str(numbers), "train", "regression")
    with pytest.raises(sources.SourceError, match=r"head\.kind=multilabel, which needs a CSV list"):
        prepared.open_source(str(folder), "train", "multilabel")


def test_published_lists_in_a_folder(folder, tmp_path):
    for name, label in (("train", 0), ("val", 1), ("test", 0)):
        (tmp_path / f"{name}.csv").write_text(f"{folder}/x/a.mp4 {label}\n")
    assert prepared.has_split(str(tmp_path), "validation")
    assert prepared.open_source(str(tmp_path), "validation").labels == (1,)
    assert prepared.open_source(str(tmp_path), "test").labels == (0,)


def test_relabelling_by_name(shapes):
    test = prepared.open_source(str(shapes), "test")
    turned = sources.relabel(test, test.classes[::-1])
    names = [turned.classes[label] for label in turned.labels]
    assert names == [test.classes[label] for label in test.labels]
    assert turned.labels != test.labels
    assert sources.relabel(test, test.classes) is test
    with pytest.raises(sources.SourceError, match=r"the class 'up_right', .* 7 classes of the model in X"):
        sources.relabel(test, test.classes[:-1], "the model in X")


def test_held_out_videos_are_an_equal_part_of_each_class():
    labels = (0,) * 40 + (1,) * 60
    source = sources.VideoSource("r", tuple(f"{i}.mp4" for i in range(100)), labels, ("a", "b"))
    kept, held = sources.hold_out(source, 100)
    assert (held.labels.count(0), held.labels.count(1)) == (4, 6)
    assert set(kept.ids) | set(held.ids) == set(source.ids)
    backwards = source.select(range(99, -1, -1))
    assert set(sources.hold_out(backwards, 100)[1].ids) == set(held.ids)
