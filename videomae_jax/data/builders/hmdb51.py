"""HMDB51 from testTrainMulti_7030_splits: CLASS_test_splitN.txt, N = 1, 2, 3.

Each line is a video and 1 (it trains), 2 (it tests) or 0 (it is unused).
"""

from collections.abc import Callable

from etils import epath

from videomae_jax.data.collection import Collection, Entry, VideoFinder, collect
from videomae_jax.data.sources import SourceError

_CLASSES = 51


def hmdb51(number: int) -> Callable[[epath.Path, epath.Path], Collection]:
    """The reader of official split `number`; classes in alphabetical order."""
    ending = f"_test_split{number}.txt"

    def read(annotations: epath.Path, videos: epath.Path) -> Collection:
        """Raises SourceError: annotation files of something else."""
        folder = annotations / "testTrainMulti_7030_splits"
        folder = folder if folder.is_dir() else annotations
        files = (
            sorted(file for file in folder.iterdir() if file.name.endswith(ending)) if folder.is_dir() else []
        )
        classes = tuple(file.name.removesuffix(ending) for file in files)
        if len(classes) != _CLASSES:
            raise SourceError(f"{folder} has {len(classes)} lists *{ending}, not the {_CLASSES} of HMDB51")
        splits = {"train": [], "test": []}
        for label, file in enumerate(files):
            for line in filter(None, map(str.strip, file.read_text().split("\n"))):
                video, part = line.rsplit(maxsplit=1)
                if part not in ("0", "1", "2"):
                    raise SourceError(f"{file}: {line!r} does not end in 0, 1 or 2")
                stem = video.removesuffix(".avi")
                if part != "0":
                    splits["train" if part == "1" else "test"].append(
                        (Entry(f"{classes[label]}/{stem}", "", label), [f"{classes[label]}/{stem}", stem])
                    )
        return collect(f"hmdb51_{number}", splits, VideoFinder(videos), classes)

    return read
