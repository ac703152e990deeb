"""PyTorch's zip files as NumPy arrays, without PyTorch and without running anything that they say.

A `.pth` file is a zip with a pickle of names and one uncompressed file per storage. The pickle is looked
through before it is opened: operations and names outside the few that tensors and plain containers need are
refused. What is left is unpickled by a subclass that can build arrays, dicts, lists and inert records, and
nothing else. Every storage must be as large as the pickle says and every tensor must lie inside its storage.
"""

import collections
import dataclasses
import io
import math
import os
import pathlib
import pickle
import pickletools
import zipfile
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
_OPERATIONS = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "NONE", "NEWTRUE", "NEWFALSE"),
        *("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "FLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINSTRING", "SHORT_BINSTRING"),
        *("SHORT_BINBYTES", "BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *("REDUCE", "BUILD", "NEWOBJ", "BINPERSID"),
    ]
)
_MAX_PICKLE = 16 << 20  # bytes; that of a large model with its optimizer has 0.5 MB


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage of the file: its elements, and the type of them."""

    values: np.ndarray


class Record(dict):
    """The attributes of an object whose class is not known here, such as argparse.Namespace."""

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {"state": state})


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _requires_grad: Any = False, *_hooks: Any
) -> np.ndarray:
    """A view of a storage, where it lies inside; a tensor that repeats elements is refused."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise TorchFileError("a tensor without a storage or with impossible sizes")
    values = storage.values
    if len(size) != len(stride) or len(size) > 16 or math.prod(size) > len(values):
        raise TorchFileError(f"a tensor of {tuple(size)} in a storage of {len(values)} elements")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(values):
        raise TorchFileError(
            f"a tensor of {tuple(size)} that ends beyond its storage of {len(values)} elements"
        )
    strides = tuple(s * values.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(values[offset:], tuple(size), strides, writeable=False)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("argparse", "Namespace"): Record,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Finds nothing but `_GLOBALS`, and storages in the zip."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(data))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise TorchFileError(f"it asks for {module}.{name}, which is no part of a tensor") from None

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a persistent id names, read once."""
        try:
            kind, dtype, key, _location, count = pid
        except (TypeError, ValueError):
            raise TorchFileError(f"an unknown reference {str(pid)[:80]!r}") from None
        if (
            kind != "storage"
            or not isinstance(dtype, np.dtype)
            or type(count) is not int
            or not isinstance(key, str)
        ):
            raise TorchFileError(f"an unknown reference {str(pid)[:80]!r}")
        if key not in self.storages:
            try:
                info = self.archive.getinfo(f"{self.folder}/data/{key}")
            except KeyError:
                raise TorchFileError(f"storage {key[:40]!r} is not in the file") from None
            if info.file_size != count * dtype.itemsize:
                raise TorchFileError(
                    f"storage {key} has {info.file_size} bytes, and is said to hold {count} of {dtype}"
                )
            self.storages[key] = _Storage(np.frombuffer(self.archive.read(info), dtype))
        return self.storages[key]


def _check_pickle(data: bytes) -> None:
    """Refuses operations that build more than tensors and containers, and memos that fill the memory."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        name = operation.name
        if name not in _OPERATIONS:
            raise TorchFileError(f"its pickle has the operation {name}, which no tensor needs")
        if name in ("BINPUT", "LONG_BINPUT", "PUT") and int(argument or 0) > count:
            raise TorchFileError("its pickle has a memo larger than itself")
        if name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in _GLOBALS:
            raise TorchFileError(
                f"it asks for {str(argument).replace(' ', '.')}, which is no part of a tensor"
            )


def is_torch_file(path: str | os.PathLike) -> bool:
    """Whether a file looks like one of PyTorch's, zip or older."""
    with pathlib.Path(path).open("rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def read(path: str | os.PathLike) -> Any:
    """The content of a `.pth` file: dicts, lists, numbers, text, and arrays in place of tensors.

    Raises:
        TorchFileError: the file is damaged, of PyTorch's format before 1.6, or asks for anything but tensors
            and plain containers; nothing has been run.
        OSError: the file cannot be read.
    """
    try:
        return _read(pathlib.Path(path))
    except TorchFileError as error:
        raise TorchFileError(f"{path} is refused: {error}") from None
    except (
        *(
            zipfile.BadZipFile,
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ),
        *(IndexError, UnicodeError, RecursionError, MemoryError, OverflowError, NotImplementedError),
    ) as error:
        raise TorchFileError(
            f"{path} is damaged ({type(error).__name__}: {error}): download it again"
        ) from None


def _read(path: pathlib.Path) -> Any:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise TorchFileError(
                "it is no zip, so perhaps of PyTorch's format before 1.6: open it once with a newer PyTorch, "
                "torch.save(torch.load(OLD), NEW), or use a .safetensors file"
            )
    with zipfile.ZipFile(path) as archive:
        size, total = path.stat().st_size, 0
        pickles = []
        for info in archive.infolist():
            total += info.file_size
            parts = pathlib.PurePosixPath(info.filename).parts
            if info.filename.startswith("/") or ".." in parts or "\\" in info.filename:
                raise TorchFileError(f"its zip has the path {info.filename[:80]!r}, which leaves the file")
            if info.compress_type != zipfile.ZIP_STORED:
                raise TorchFileError(f"{info.filename[:80]} is compressed, which PyTorch never does")
            if parts[-1:] == ("data.pkl",) and len(parts) == 2:
                pickles.append(info)
        if total > size:
            raise TorchFileError(f"its parts are {total} bytes, and the whole has {size}")
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
        data = archive.read(pickles[0])
        _check_pickle(data)
        return _plain(_Unpickler(data, archive, folder).load(), {})


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """The same in dicts, lists and tuples of this process; what stands twice stays one object."""
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in known:
        known[id(value)] = value  # a cycle ends here
        if isinstance(value, dict):
            known[id(value)] = {name: _plain(item, known) for name, item in dict.items(value)}
        else:
            kind = tuple if isinstance(value, tuple) else list
            known[id(value)] = kind(_plain(item, known) for item in value)
    return known[id(value)]
