"""PyTorch's zip files as NumPy arrays, without PyTorch and without running anything that they say.

A `.pth` file is a zip with a pickle of names and one uncompressed file per storage. The pickle is not
unpickled: a machine of its few harmless operations makes dicts, lists, text, numbers, and in place of all
else inert records; what it would call is looked up in a short table. Only the storages of the tensors that
are asked for are read, each checked for its size and its checksum; every tensor must lie inside its storage.
"""

import dataclasses
import math
import os
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np


class TorchFileError(ValueError):
    """A file that is damaged, of another kind, or that asks for more than tensors."""


_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Classes that published checkpoints hold beside their tensors: each instance becomes a `Record`.
_INERT = {
    *(("builtins", name) for name in ("set", "frozenset", "slice", "range", "complex", "bytearray")),
    *(("collections", name) for name in ("defaultdict", "deque", "Counter")),
    *(("argparse", "Namespace"), ("torch", "device"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath")),
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8")),
}
_INERT_PACKAGES = ("deepspeed",)
_MAX_PICKLE = 16 << 20  # bytes; that of a large model with its optimizer has 0.5 MB
_MAX_DEPTH = 100  # containers inside one another


@dataclasses.dataclass(frozen=True, eq=False)
class _Global:
    """A name that the pickle gives, and nothing behind it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module[:80]}.{self.name[:80]}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """A file of the zip, and what its bytes are."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage, not read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Record(dict):
    """The attributes of an object whose class is not known here, such as argparse.Namespace: data alone."""


def _tensor(arguments: tuple) -> _Tensor:
    storage, offset, size, stride, *_ = arguments
    if not (isinstance(storage, _Storage) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise TorchFileError("a tensor without a storage or sizes")
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise TorchFileError("a tensor with impossible sizes")
    count = storage.count
    if len(size) != len(stride) or len(size) > 16 or math.prod(size) > count:
        raise TorchFileError(f"a tensor of {size} in a storage of {count} elements")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) and last >= count:
        raise TorchFileError(f"a tensor of {size} that ends beyond its storage of {count} elements")
    return _Tensor(storage, offset, size, stride)


def _size(arguments: tuple) -> tuple:
    (size,) = arguments
    if not isinstance(size, tuple):
        raise TorchFileError("a size that is no tuple")
    return size


# What a call of a name makes, from its arguments.
_CALLS: dict[tuple[str, str], Callable[[tuple], Any]] = {
    ("collections", "OrderedDict"): lambda arguments: dict(_pairs(*arguments)),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda arguments: arguments[0],
    ("torch", "Size"): _size,
}


def _pairs(items: Any = ()) -> dict[Any, Any]:
    """The entries of a dict given as a list of pairs."""
    return {_key(name): value for name, value in items}


def _key(name: Any) -> Any:
    if type(name) not in (str, int):
        raise TorchFileError(f"a dict with a key that is a {type(name).__name__}, not text or a number")
    return name


class _Machine:
    """Runs a pickle's operations on data alone: nothing is imported, called, or given attributes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """The object that a pickle describes, its tensors as `_Tensor`."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            name = operation.name
            if name == "STOP":
                return self.stack.pop()
            if name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > count:
                raise TorchFileError("its pickle has a memo larger than itself")
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name not in _IGNORED:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise TorchFileError(f"its pickle has the operation {name}, which no tensor needs")
                step(argument)
        raise TorchFileError("its pickle has no end")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _put(self, place: Any) -> None:
        self.memo[int(place)] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, place: Any) -> None:
        self.stack.append(self.memo[int(place)])

    _binget = _long_binget = _get

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _few(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def _tuple1(self, _: Any) -> None:
        self._few(1)

    def _tuple2(self, _: Any) -> None:
        self._few(2)

    def _tuple3(self, _: Any) -> None:
        self._few(3)

    def _list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(_pairs(zip(items[::2], items[1::2], strict=True)))

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target += items
        elif not isinstance(target, Record):
            raise TorchFileError(f"items of a {type(target).__name__}")

    def _setitem(self, _: Any) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self._update([name, value])

    def _setitems(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TorchFileError(f"entries of a {type(target).__name__}")
        target.update(_pairs(zip(items[::2], items[1::2], strict=True)))

    def _global(self, argument: Any) -> None:
        self._find(*str(argument).split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._find(module, name)

    def _find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TorchFileError("a name that is no text")
        found = _Global("builtins" if module == "__builtin__" else module, name)
        pair = (found.module, name)
        is_storage = module == "torch" and name in _STORAGES
        is_inert = pair in _INERT or (module.split(".")[0] in _INERT_PACKAGES and name.isidentifier())
        if not (is_storage or is_inert or pair in _CALLS):
            raise TorchFileError(f"it asks for {found}, which is no part of a tensor")
        self.stack.append(found)

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TorchFileError("a call of what is no name")
        pair = (function.module, function.name)
        if pair in _CALLS:
            self.stack.append(_CALLS[pair](arguments))
        elif function.name in _STORAGES:
            raise TorchFileError(f"a call of {function}")
        else:
            self.stack.append(Record())

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record:
            if isinstance(state, dict):
                target.update(state)
        elif type(target) is not dict:  # an OrderedDict has attributes too, which no tensor needs
            raise TorchFileError(f"attributes of a {type(target).__name__}")

    def _binpersid(self, _: Any) -> None:
        pid = self.stack.pop()
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise TorchFileError("an unknown reference")
        kind, storage, key, _location, count = pid
        dtype = _STORAGES.get(storage.name) if isinstance(storage, _Global) else None
        if kind != "storage" or dtype is None or type(key) is not str or type(count) is not int or count < 0:
            raise TorchFileError("an unknown reference")
        self.stack.append(_Storage(key, dtype, count))


_PUSHED = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "FLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINSTRING", "SHORT_BINSTRING"),
        *("SHORT_BINBYTES", "BINBYTES"),
    ]
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict},
}
_IGNORED = frozenset(["PROTO", "FRAME"])


def is_torch_file(path: str | os.PathLike) -> bool:
    """Whether a file looks like one of PyTorch's, zip or older."""
    with pathlib.Path(path).open("rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def read(path: str | os.PathLike, select: Callable[[Any], Any] = lambda content: content) -> Any:
    """The content of a `.pth` file: dicts, lists, numbers, text, and arrays in place of tensors.

    Args:
        select: the part of the content that is wanted; the tensors of the rest are not read.

    Raises:
        TorchFileError: the file is damaged, encrypted, of PyTorch's format before 1.6, or asks for anything
            but tensors and plain containers; nothing has been run.
        OSError: the file cannot be read.
    """
    try:
        return _read(pathlib.Path(path), select)
    except OSError:
        raise
    except TorchFileError as error:
        raise TorchFileError(f"{path} is refused: {error}") from None
    except Exception as error:  # whatever a damaged file makes of libraries
        reason = " ".join(str(error).split())[:200]
        raise TorchFileError(
            f"{path} is damaged ({type(error).__name__}: {reason}): download it again"
        ) from None


def _read(path: pathlib.Path, select: Callable[[Any], Any]) -> Any:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise TorchFileError(
                "it is no zip, so perhaps of PyTorch's format before 1.6: open it once with a newer PyTorch, "
                "torch.save(torch.load(OLD), NEW), or use a .safetensors file"
            )
    with zipfile.ZipFile(path) as archive:
        _check_entries(archive, path.stat().st_size)
        pickles = [info for info in archive.infolist() if info.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise TorchFileError(
                "its zip has no data.pkl, so it holds no tensors (perhaps it is a TorchScript file)"
            )
        folder = pickles[0].filename.rpartition("/")[0]
        order = f"{folder}/byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise TorchFileError("it was written on a big-endian machine")
        if pickles[0].file_size > _MAX_PICKLE:
            raise TorchFileError(f"its pickle has {pickles[0].file_size} bytes")
        content = select(_Machine().run(archive.read(pickles[0])))
        mapped = np.memmap(path, np.uint8, mode="r")
        storages = _Storages(mapped, folder, {info.filename: info for info in archive.infolist()})
        return _with_arrays(content, storages, {}, 0)


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
    total = 0
    for info in archive.infolist():
        total += info.file_size
        name = info.filename[:80]
        if info.filename.startswith("/") or ".." in info.filename.split("/") or "\\" in info.filename:
            raise TorchFileError(f"its zip has the path {name!r}, which leaves the file")
        if info.flag_bits & 1:
            raise TorchFileError(f"{name} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(f"{name} is compressed, which PyTorch never does")
    if total > size:
        raise TorchFileError(f"its parts are {total} bytes, and the whole has {size}")


class _Storages:
    """Storages of the file as arrays in mapped memory, each checked when it is first wanted."""

    def __init__(self, mapped: np.memmap, folder: str, entries: dict[str, zipfile.ZipInfo]):
        self.mapped, self.folder, self.entries = mapped, folder, entries
        self.known: dict[tuple[str, str], np.ndarray] = {}

    def array(self, tensor: _Tensor) -> np.ndarray:
        """A tensor, read-only."""
        storage = tensor.storage
        ours = (storage.key, storage.dtype.name)
        if ours not in self.known:
            self.known[ours] = self._open(storage)
        values = self.known[ours]
        strides = tuple(s * values.itemsize for s in tensor.stride)
        start = values[tensor.offset :]
        return np.lib.stride_tricks.as_strided(start, tensor.size, strides, writeable=False)

    def _open(self, storage: _Storage) -> np.ndarray:
        info = self.entries.get(f"{self.folder}/data/{storage.key}")
        if info is None:
            raise TorchFileError(f"storage {storage.key[:40]!r} is not in the file")
        size = storage.count * storage.dtype.itemsize
        if info.file_size != size:
            raise TorchFileError(
                f"storage {storage.key} has {info.file_size} bytes, and is said to hold {storage.count} of "
                f"{storage.dtype}"
            )
        header = bytes(self.mapped[info.header_offset : info.header_offset + 30])
        if header[:4] != b"PK\3\4":
            raise TorchFileError(f"storage {storage.key} is not where the zip says")
        start = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:30]))
        data = self.mapped[start : start + size]
        if len(data) != size or zlib.crc32(data.data) != info.CRC:
            raise TorchFileError(f"storage {storage.key} is damaged: download the file again")
        return np.frombuffer(data, storage.dtype)


def _with_arrays(value: Any, storages: _Storages, known: dict[int, Any], depth: int) -> Any:
    """The same in dicts, lists and tuples of this process; what stands twice stays one object."""
    if depth > _MAX_DEPTH:
        raise TorchFileError(f"its containers are more than {_MAX_DEPTH} deep")
    if isinstance(value, _Tensor):
        return storages.array(value)
    if isinstance(value, _Global | _Storage):
        return Record()
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in known:
        known[id(value)] = value  # a cycle ends here
        if isinstance(value, dict):
            items = {name: _with_arrays(item, storages, known, depth + 1) for name, item in value.items()}
            known[id(value)] = items
        else:
            kind = tuple if isinstance(value, tuple) else list
            known[id(value)] = kind(_with_arrays(item, storages, known, depth + 1) for item in value)
    return known[id(value)]
