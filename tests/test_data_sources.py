"""Folders and lists as users have them, and one line for each way to get them wrong."""

import pickle

import pytest

from videomae_jax.data import prepared, sources


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def test_a_flat_folder_has_no_labels(tmp_path):
    source = sources.from_folder(
        touch(tmp_path, "b.mp4", "a clip.MOV", "notes.txt", ".hidden.mp4", "deep/c.webm")
    )
    assert source.ids == ("a clip.MOV", "b.mp4", "deep/c.webm")
    assert source.labels == (-1, -1, -1)
    video = {"video": str(tmp_path / "a clip.MOV"), "name": "a clip.MOV"}
    assert source[0] == video | {"label": -1, "record": 0, "error": ""}
    assert pickle.loads(pickle.dumps(source)) == source


def test_subfolders_are_classes(tmp_path):
    source = sources.from_folder(touch(tmp_path, "run/1.mp4", "jump/x/2.mp4", "run/3.mp4"))
    assert source.classes == ("jump", "run")
    assert list(zip(source.ids, source.labels, strict=True)) == [
        ("jump/x/2.mp4", 0),
        ("run/1.mp4", 1),
        ("run/3.mp4", 1),
    ]


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    touch(tmp_path / "elsewhere", "1.mp4")
    root = touch(tmp_path / "root", "run/2.mp4")
    (root / "jump").symlink_to(tmp_path / "elsewhere")
    (root / "run" / "up").symlink_to(root)
    assert sources.from_folder(root).ids == ("jump/1.mp4", "run/2.mp4")


def test_split_folders(tmp_path):
    touch(tmp_path, "train/a/1.mp4", "val/a/2.mp4")
    assert prepared.open_source(str(tmp_path), "train").ids == ("a/1.mp4",)
    assert prepared.open_source(str(tmp_path), "validation").ids == ("a/2.mp4",)
    touch(tmp_path / "classes", "train/1.mp4", "bus/2.mp4")
    assert prepared.open_source(str(tmp_path / "classes"), "train").classes == ("bus", "train")


@pytest.mark.parametrize(
    ("text", "ids", "labels", "classes"),
    [
        ('a.mp4 1\n"b b.mp4" 0\n', None, (1, 0), "01"),
        ("a.mp4  1\nc.mp4  0\n", ("a.mp4", "c.mp4"), (1, 0), "01"),
        ("a.mp4,1\nb b.mp4,0\n", None, (1, 0), "01"),
        ("path,frames,label\na.mp4,30,run\nb b.mp4,20,jump\n", None, (1, 0), ("jump", "run")),
        ("label\tpath\n0\ta.mp4\n0\tb b.mp4\n", None, (0, 0), "0"),
        ("a.mp4\nb b.mp4\n", None, (-1, -1), ""),
        ("\ufeffpath\na.mp4\n\nb b.mp4\n", None, (-1, -1), ""),
        ("a.mp4,10\nb b.mp4,\n", None, (10, -1), tuple(str(i) for i in range(11))),
        ("b b.mp4\na.mp4\n", ("b b.mp4", "a.mp4"), (-1, -1), ""),
        ('"a.mp4","1"\n"b b.mp4","0"\n', None, (1, 0), "01"),
    ],
)
def test_lists(tmp_path, text, ids, labels, classes):
    touch(tmp_path, "a.mp4", "b b.mp4", "c.mp4")
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    source = sources.from_csv(tmp_path / "list.csv")
    assert source.ids == (ids or ("a.mp4", "b b.mp4"))
    assert source.labels == labels
    assert source.classes == tuple(classes)


def test_absolute_paths_in_a_list(tmp_path):
    touch(tmp_path / "videos", "a.mp4")
    (tmp_path / "list.csv").write_text(f"{tmp_path / 'videos' / 'a.mp4'} 0\n")
    assert sources.from_csv(tmp_path / "list.csv")[0]["video"] == str(tmp_path / "videos" / "a.mp4")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("path,label\n", "lists no video below its header"),
        ("file,class,frames\na.mp4,1,30\n", r"line 1: 3 columns .*header line `path,label`"),
        ("a.mp4 1\nb b.mp4 0\n", "line 2: 3 columns .*quote paths"),
        ("a.mp4,1\nmissing.mp4,0\ngone.mp4,1\n", r"line 2: no file .*missing.mp4 \(2 of 3 are absent\)"),
        ("a.mp4,1\na.mp4,0\n", "line 2: a.mp4 is already on line 1"),
        ("path,label\na.mp4\n", r"line 2: 1 columns"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, problem):
    touch(tmp_path, "a.mp4", "b b.mp4")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(sources.SourceError, match=problem) as error:
        prepared.open_source(str(tmp_path / "list.csv"), "train")
    assert "\n" not in str(error.value)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(sources.SourceError, match="does not exist"):
        prepared.open_source(str(tmp_path / "nowhere"), "train")
    touch(tmp_path, "readme.txt")
    with pytest.raises(
        sources.SourceError,
        match=r"holds no video: expected folders of frames, or files ending in \.3gp \.avi",
    ):
        prepared.open_source(str(tmp_path), "train")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x00\x80")
    with pytest.raises(sources.SourceError, match="cannot be read as a text list"):
        prepared.open_source(str(tmp_path / "binary.csv"), "train")


def test_hold_out_does_not_depend_on_order_and_is_at_most_a_tenth():
    ids = tuple(f"{i}.mp4" for i in range(100))
    source = sources.VideoSource("root", ids, (-1,) * 100)
    kept, held = sources.hold_out(source, 5)
    assert sorted(kept.ids + held.ids) == sorted(ids)
    assert len(held) == 5
    turned = sources.VideoSource("root", ids[::-1], (-1,) * 100)
    assert set(sources.hold_out(turned, 5)[1].ids) == set(held.ids)
    assert len(sources.hold_out(source, 50)[1]) == 10
    assert len(sources.hold_out(source.select(range(9)), 5)[1]) == 0


def test_fingerprint_tells_order_names_and_labels():
    source = sources.VideoSource("root", ("a", "b"), (0, 1))
    others = [(("b", "a"), (0, 1)), (("a", "b"), (1, 1)), (("a", "c"), (0, 1))]
    prints = {source.fingerprint()} | {sources.VideoSource("root", *o).fingerprint() for o in others}
    assert len(prints) == 4
    assert sources.VideoSource("elsewhere", ("a", "b"), (0, 1)).fingerprint() == source.fingerprint()
