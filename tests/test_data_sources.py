"""Folders and lists as users have them, and one line for each way to get them wrong."""

import pickle

import fsspec
import pytest
from fsspec.implementations import local

from videomae_jax.data import lists, prepared, sources


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


def test_videos_are_in_order_of_the_parts_of_their_paths(tmp_path):
    names = (
        "a b/1.mp4",
        "a-b/1.mp4",
        "a/2/x.mp4",
        "a/2-1.mp4",
        "a/10.mp4",
        "a.d/1.mp4",
        "é/1.mp4",
        "z/1.mp4",
    )
    found = tuple(sources.videos_below(touch(tmp_path, *names)))
    assert found == tuple(sorted(names, key=lambda name: name.split("/"))) != tuple(sorted(names))
    assert sources.from_folder(tmp_path).ids == found


def test_a_folder_in_a_store_is_listed_once_and_no_file_asked_for(bucket, monkeypatch):
    names = [f"{kind}/{i}.mp4" for kind in ("jump", "run") for i in range(20)]
    touch(bucket / "listed", *names)
    asked, plain = [], local.LocalFileSystem.ls
    monkeypatch.setattr(
        local.LocalFileSystem, "ls", lambda *a, **kw: (asked.append(a[1]), plain(*a, **kw))[1]
    )
    for question in ("info", "isdir", "exists"):
        monkeypatch.setattr(type(fsspec.filesystem("gs")), question, lambda *_: pytest.fail("asked for one"))
    assert sorted(sources.videos_below("gs://bucket/listed")) == sorted(names)
    assert len(asked) == 3
    with pytest.raises(FileNotFoundError):
        list(sources.videos_below("gs://bucket/absent"))


def test_a_link_to_itself_is_the_failure_of_that_video_alone(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "loop").symlink_to("loop")
    assert prepared.open_source(str(tmp_path), "train").ids == ("a.mp4", "loop.mp4")


def test_names_may_hold_odd_breaks_of_lines(tmp_path):
    touch(tmp_path, "a\u2028b.mp4", "c\x0bd.mp4")
    (tmp_path / "list.csv").write_text("a\u2028b.mp4,0\r\nc\x0bd.mp4,1\n", encoding="utf-8", newline="")
    assert lists.from_csv(tmp_path / "list.csv").ids == ("a\u2028b.mp4", "c\x0bd.mp4")


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
        # VideoMAE V2: finetuning on frames, and pretraining on videos and frames.
        ("a.mp4 40 1\nc.mp4 30 0\n", ("a.mp4", "c.mp4"), (1, 0), "01"),
        ("a.mp4 0 -1\nc.mp4 0 -1\n", ("a.mp4", "c.mp4"), (-1, -1), ""),
        ("a.mp4 1 117 3\nc.mp4 1 30 4\n", ("a.mp4", "c.mp4"), (-1, -1), ""),
        ("a 1\nc 0\n", ("a.mp4", "c.mp4"), (1, 0), "01"),  # names without suffix
    ],
)
def test_lists(tmp_path, text, ids, labels, classes):
    touch(tmp_path, "a.mp4", "b b.mp4", "c.mp4")
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    source = lists.from_csv(tmp_path / "list.csv")
    assert source.ids == (ids or ("a.mp4", "b b.mp4"))
    assert source.labels == labels
    assert source.classes == tuple(classes)


def test_absolute_paths_in_a_list(tmp_path):
    touch(tmp_path / "videos", "a.mp4")
    (tmp_path / "list.csv").write_text(f"{tmp_path / 'videos' / 'a.mp4'} 0\n")
    assert lists.from_csv(tmp_path / "list.csv")[0]["video"] == str(tmp_path / "videos" / "a.mp4")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("path,label\n", "lists no video below its header"),
        ("file,class,frames\na.mp4,1,30\n", r"line 1: 3 columns .*header line `path,label`"),
        ("a.mp4 1\nb b.mp4 0\n", "line 2: 3 columns .*quote paths"),
        ("a.mp4,1\nmissing.mp4,0\ngone.mp4,1\n", r"line 2: no file .*missing.mp4 \(2 of 3 are absent\)"),
        ("a.mp4,1\n,0\n", "line 2: no path"),
        ("a.mp4,1\na.mp4,0\n", "line 2: a.mp4 is already on line 1"),
        ("a.mp4,1\na,0\n", "line 2: a is already on line 1"),
        ("a.mp4,1\n./a.mp4,0\n", "line 2: ./a.mp4 is already on line 1"),
        ("path,label\na.mp4\n", r"line 2: 1 columns"),
        (
            "path,class\na.mp4,run\n",
            "line 1: the header has a column `class`: call the one of the labels `label`",
        ),
        ('a.mp4,1\n"b b.mp4,0\n', "line 2: a quote is not closed"),
        ('"a.mp4,1\nb b.mp4",0\n', "line 1: a quote is not closed on its line"),
        ("a.mp4,0.5\nb b.mp4,1\n", r"line 1: the label '0.5' beside numbers.*head.kind=regression"),
        ("a.mp4,1\nb b.mp4,jump\n", "line 2: the label 'jump' beside numbers"),
        ("a.mp4,-2\nb b.mp4,1\n", "line 1: the label '-2' beside numbers"),
        ("a.mp4,nan\nb b.mp4,\n", "line 1: the label 'nan' beside numbers"),
        ("a.mp4,run\nb b.mp4,jump;run\n", "line 2: 'jump;run' is several classes: set head.kind=multilabel"),
        ("two 1\n", "line 1: two is .mkv and .mp4: add the suffix"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, problem):
    touch(tmp_path, "a.mp4", "b b.mp4", "two.mkv", "two.mp4")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(sources.SourceError, match=problem) as error:
        prepared.open_source(str(tmp_path / "list.csv"), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("head", "text", "problem"),
    [
        ("regression", "a.mp4,1\nb b.mp4,\n", "line 2: no number to predict"),
        ("regression", "a.mp4,1\nb b.mp4,nan\n", "line 2: nan is not finite"),
        ("regression", "a.mp4,1;inf\nb b.mp4,1;2\n", "line 1: 1;inf is not finite"),
        ("regression", "a.mp4\nb b.mp4\n", "line 1: no number to predict"),
        ("regression", "path,frames\na.mp4,3\n", "line 2: no number to predict"),
        ("regression", "a.mp4,1\nb b.mp4,1;2\n", "line 2: 2 numbers where 1 were before"),
        ("regression", "a.mp4,1;\nb b.mp4,1;2\n", "line 1: 1; is no number to predict"),
        ("multilabel", "a.mp4,run\nb b.mp4,\n", "line 2: no classes: name them, or write `;` for none"),
        ("multilabel", "a.mp4\nb b.mp4\n", "line 1: no classes"),
        ("multilabel", "a.mp4,run\nb b.mp4,-1\n", "line 2: no classes"),
    ],
)
def test_a_missing_target_is_named_by_list_and_line(tmp_path, head, text, problem):
    touch(tmp_path, "a.mp4", "b b.mp4")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(sources.SourceError, match=rf"list\.csv, {problem}"):
        lists.from_csv(tmp_path / "list.csv", head)


def test_targets(tmp_path):
    touch(tmp_path, "a.mp4", "b b.mp4")
    (tmp_path / "list.csv").write_text("a.mp4,run;jump\nb b.mp4,;\n")
    source = lists.from_csv(tmp_path / "list.csv", "multilabel")
    assert (source.classes, source.targets) == (("jump", "run"), ((1.0, 1.0), (0.0, 0.0)))
    (tmp_path / "list.csv").write_text("a.mp4,1e-3;-2\nb b.mp4,0;3\n")
    source = lists.from_csv(tmp_path / "list.csv", "regression")
    assert source.targets == ((0.001, -2.0), (0.0, 3.0))
    with pytest.raises(sources.SourceError, match="has 2 numbers for each video, the training videos 3"):
        sources.relabel(source, ("value 0", "value 1", "value 2"))


def test_a_list_elsewhere_and_with_dead_entries(tmp_path):
    touch(tmp_path / "data", "a.mp4", "b.mp4")
    (tmp_path / "list.csv").write_text("a.mp4,1\ngone.mp4,0\nb.mp4,0\n")
    with pytest.raises(sources.SourceError, match=r"line 1: no file .*3 of 3 are absent.*data\.root"):
        lists.from_csv(tmp_path / "list.csv")
    with pytest.raises(sources.SourceError, match=r"line 2: no file .*data\.allow_missing=true"):
        lists.from_csv(tmp_path / "list.csv", root=str(tmp_path / "data"))
    source = prepared.open_source(
        str(tmp_path / "list.csv"), "train", root=str(tmp_path / "data"), allow_missing=True
    )
    assert (source.ids, source.labels, source.absent) == (("a.mp4", "b.mp4"), (1, 0), ("gone.mp4",))
    assert source[1]["video"] == str(tmp_path / "data" / "b.mp4")
    (note,) = source.notes
    assert "1 of 3 are absent): left out as allowed: gone.mp4" in note
    with pytest.raises(sources.SourceError, match=r"is no list: data\.root and"):
        prepared.open_source(str(tmp_path / "data"), "train", allow_missing=True)


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "valid"), ("train", "validate"), ("Train", "Val"), ("videos_train", "videos_val")],
)
def test_names_of_parts(tmp_path, train, validation):
    touch(tmp_path, f"{train}/a/1.mp4", f"{validation}/a/2.mp4")
    for split, name in (("train", "1.mp4"), ("validation", "2.mp4")):
        assert prepared.has_split(str(tmp_path), split)
        assert prepared.open_source(str(tmp_path), split).ids == (f"a/{name}",)
    assert not prepared.has_split(str(tmp_path), "test")
    touch(tmp_path, "validation_set/b/3.mp4")
    with pytest.raises(sources.SourceError, match="both called after the validation part"):
        prepared.open_source(str(tmp_path), "train")


@pytest.mark.parametrize("names", [("valid/1.mp4", "jump/2.mp4"), ("train/run/1.mp4",), ("Test/1.mp4",)])
def test_classes_that_look_like_parts_are_refused(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(sources.SourceError, match="would be a class, and is called like a part"):
        prepared.open_source(str(tmp_path), "train")


def test_what_a_folder_leaves_out_is_counted(tmp_path):
    touch(tmp_path, "run/1.mp4", "jump/2.mp4", "run/a.txt", "b.txt", "c.braw", "README", ".hidden")
    (note,) = sources.from_folder(tmp_path).notes
    assert "4 files are no videos by their suffix (2 .txt, 1 .braw, 1 without suffix): left out" in note
    touch(tmp_path, "stray.mp4")
    source = sources.from_folder(tmp_path)
    assert source.labels == (-1, -1, -1)
    assert "stray.mp4 beside 2 folders, so the folders are no classes" in source.notes[1]


def test_videos_beside_parts_are_said(tmp_path):
    for name in ("train/a/1.mp4", "val/a/2.mp4", "extra/3.mp4", "4.mp4", ".hidden/5.mp4", "notes/read.me"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (note,) = prepared.open_source(str(tmp_path), "train").notes
    assert "2 entries with videos beside its parts (4.mp4, extra): left out" in note
    assert prepared.open_source(str(tmp_path), "validation").notes == ()


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(sources.SourceError, match="does not exist"):
        prepared.open_source(str(tmp_path / "nowhere"), "train")
    touch(tmp_path, "readme.txt")
    with pytest.raises(
        sources.SourceError,
        match=r"holds no video: expected folders of frames, or files ending in \.3g2 \.3gp",
    ):
        prepared.open_source(str(tmp_path), "train")
    (tmp_path / "binary.csv").write_bytes("a.mp4,1".encode("utf-16"))
    with pytest.raises(sources.SourceError, match="cannot be read as a text list: it is UTF-16, save it as"):
        prepared.open_source(str(tmp_path / "binary.csv"), "train")
    (tmp_path / "binary.csv").write_bytes(b"\xf0\xfe\x00\x00\x80")
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


def test_a_folder_that_many_lines_name_is_listed_once(tmp_path, monkeypatch):
    """Not one question for each line; links into nowhere are there, and what is absent has its line."""
    names = [f"{i}.mp4" for i in range(100)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "50.mp4").unlink()
    (tmp_path / "50.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "list.csv").write_text("\n".join(f"{name} 0" for name in names))
    listed, plain = [], lists.os.listdir
    monkeypatch.setattr(lists.os, "listdir", lambda folder: listed.append(folder) or plain(folder))
    kind = type(lists.epath.Path(tmp_path))
    asked, exists = [], kind.exists
    with monkeypatch.context() as patch:
        patch.setattr(kind, "exists", lambda self: asked.append(str(self)) or exists(self))
        assert lists.from_csv(tmp_path / "list.csv").ids == tuple(names)
    assert listed == [str(tmp_path)]
    assert len(asked) <= 1  # whether the first line is a path as a whole
    (tmp_path / "70.mp4").unlink()
    with pytest.raises(sources.SourceError, match=r"list\.csv, line 71: no file .*70\.mp4 \(1 of 100 are"):
        lists.from_csv(tmp_path / "list.csv")
