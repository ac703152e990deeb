"""UCF101 from ucfTrainTestlist: classInd.txt, trainlist0N.txt and testlist0N.txt, N = 1, 2, 3."""

from collections.abc import Callable, Iterator

from etils import epath

from videomae_jax.data.collection import Collection, Entry, VideoFinder, collect, find_file
from videomae_jax.data.sources import SourceError

_CLASSES = 101


def ucf101(number: int) -> Callable[[epath.Path, epath.Path], Collection]:
    """The reader of official split `number`; labels count from 0 where classInd.txt counts from 1."""

    def read(annotations: epath.Path, videos: epath.Path) -> Collection:
        """Raises SourceError: annotation files of something else."""
        lines = find_file(annotations, "list of classes", "classInd.txt").read_text().split("\n")
        classes = tuple(line.split()[1] for line in lines if len(line.split()) == 2)
        if len(classes) != _CLASSES:
            raise SourceError(f"{annotations} has {len(classes)} classes, not the {_CLASSES} of UCF101")
        splits = {
            split: list(
                _entries(find_file(annotations, f"{split} list", f"{split}list{number:02d}.txt"), classes)
            )
            for split in ("train", "test")
        }
        return collect(f"ucf101_{number}", splits, VideoFinder(videos), classes)

    return read


def _entries(file: epath.Path, classes: tuple[str, ...]) -> Iterator[tuple[Entry, list[str]]]:
    for line in filter(None, map(str.strip, file.read_text().split("\n"))):
        path = line.split()[0]  # CLASS/NAME.avi, in training lists a number follows
        name, _, video = path.partition("/")
        if name not in classes:
            raise SourceError(f"{file}: {path} has the class {name!r}, which classInd.txt does not list")
        stem = video.rpartition(".")[0]
        yield Entry(f"{name}/{stem}", "", classes.index(name)), [f"{name}/{stem}", stem]
