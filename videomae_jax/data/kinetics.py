"""Kinetics-710: the classes of Kinetics-400, 600 and 700 as one list, and where those of each stand in it."""

import unicodedata
from collections.abc import Mapping, Sequence


def merge(
    lists: Sequence[Sequence[str]], same: Mapping[str, str] | None = None
) -> tuple[list[str], list[list[int]]]:
    """(classes of all lists, place of each class of each list among them), as VideoMAE V2 joins them.

    The first list's classes come first, in its order, then what each further list adds. Names are compared
    without case, quotes and underscores.

    Args:
        lists: of class names, such as those of the official label files of Kinetics-400, 600 and 700.
        same: name -> the other name of the same class, for classes that were renamed between the lists
            (V2 publishes 15, such as "balloon blowing" -> "inflating balloons").

    Raises:
        ValueError: a list that names a class twice, or a renaming of no class.

    >>> merge([["archery", "tying tie"], ["tying necktie", "Archery"]], {"tying tie": "tying necktie"})
    (['archery', 'tying tie'], [[0, 1], [1, 0]])
    """
    renamed = {_plain(old): _plain(new) for old, new in (same or {}).items()}
    known = {_plain(name) for names in lists for name in names}
    if strange := sorted((set(renamed) | set(renamed.values())) - known):
        raise ValueError(f"{strange[0]!r} is renamed and in no list: check the spelling")
    classes: list[str] = []
    places: dict[str, int] = {}
    maps = []
    for names in lists:
        found = []
        for name in names:
            key = renamed.get(_plain(name), _plain(name))
            if key not in places:
                places[key] = len(classes)
                classes.append(name)
            found.append(places[key])
        if len(set(found)) < len(found):
            twice = next(name for i, name in enumerate(names) if found.index(found[i]) < i)
            raise ValueError(f"{twice!r} stands twice in a list of {len(names)} classes")
        maps.append(found)
    return classes, maps


def _plain(name: str) -> str:
    letters = unicodedata.normalize("NFKC", name).casefold().replace("_", " ")
    return " ".join("".join(c for c in letters if c not in "'\"\u2018\u2019\u201c\u201d").split())
