"""PyTorch files that are read without running them: made by hand, hostile, lying, damaged, DeepSpeed's."""

import collections
import io
import os
import pickle
import time
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import videomae_jax as vm
from videomae_jax.interop import torch_file, torch_weights, weights


# A torch file is a zip with a pickle: tests write both by hand.
class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Reference) else None


class Reference:
    """A persistent id."""

    def __init__(self, pid):
        self.pid = pid


class Call:
    """Pickled as a call of a global."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def torch_pickle(content) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def raw(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def write_zip(path, data: bytes, files=(), compression=zipfile.ZIP_STORED, name="archive/data.pkl"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, data)
        for file, content in files:
            archive.writestr(file, content)
    return path


STORAGE = b"\x8c\x07storagec" + b"torch\nFloatStorage\n"


def tensor_pickle(count=4, offset=0, size=(4,), stride=(1,), key="0", kind="FloatStorage") -> bytes:
    """A pickle {"w": tensor}, from opcodes: the globals need not exist here."""
    number = lambda n: b"J" + int(n).to_bytes(4, "little", signed=True)  # noqa: E731
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()  # noqa: E731
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    pid = (
        b"("
        + text("storage")
        + f"ctorch\n{kind}\n".encode()
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )
    arguments = b"(" + pid + number(offset) + numbers(size) + numbers(stride) + b"\x89" + b"ccollections\n"
    arguments += b"OrderedDict\n)Rt"
    return raw(b"}", text("w"), b"ctorch._utils\n_rebuild_tensor_v2\n", arguments, b"R", b"s")


FLOATS = ("archive/data/0", np.arange(4, dtype=np.float32).tobytes())


def test_a_file_made_by_hand(tmp_path):
    path = write_zip(tmp_path / "a.pth", tensor_pickle(), [FLOATS])
    np.testing.assert_array_equal(torch_file.read(path)["w"], np.arange(4))
    strided = write_zip(tmp_path / "b.pth", tensor_pickle(size=(2, 2), stride=(1, 2)), [FLOATS])
    np.testing.assert_array_equal(torch_file.read(strided)["w"], [[0, 2], [1, 3]])


def test_arguments_inside_become_plain_data(golden):
    content = torch_file.read(golden / "pretrain_checkpoint.pth")
    assert {"model", "optimizer", "args"} <= set(content)
    assert type(content["args"]) is dict
    assert all(isinstance(key, str) for key in content["args"])


CANARY = "/tmp/videomae_jax_canary"


HOSTILE = {
    "os.system": torch_pickle(Call(os.system, f"touch {CANARY}")),
    "eval": torch_pickle(Call(eval, f"open({CANARY!r}, 'w')")),
    "exec": torch_pickle(Call(exec, f"open({CANARY!r}, 'w')")),
    "open": torch_pickle(Call(open, CANARY, "w")),
    "getattr": torch_pickle(Call(getattr, os, "system")) if False else raw(b"c__builtin__\ngetattr\n", b")R"),
    "import": raw(b"c__builtin__\n__import__\n(X\x02\x00\x00\x00ostR"),
    "subprocess": raw(b"csubprocess\nPopen\n(X\x04\x00\x00\x00truetR"),
    "torch loader": raw(b"ctorch.hub\nload\n(X\x01\x00\x00\x00atR"),
    "numpy": raw(b"cnumpy.core.multiarray\n_reconstruct\n)R"),
    "nested in a dict": torch_pickle({"model": {"w": [Call(os.system, f"touch {CANARY}")]}}),
    "in a key": torch_pickle({Call(os.getcwd): 1}),
    "ordered dict of calls": torch_pickle(collections.OrderedDict(a=Call(os.system, f"touch {CANARY}"))),
    "inst": raw(b"(X\x04\x00\x00\x00truei" + b"os\nsystem\n"),
    "obj": raw(b"(cos\nsystem\nX\x04\x00\x00\x00trueo"),
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "stack global by memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x04true\x85R.",
    "extension registry": raw(b"\x82\x01"),
    "dotted name": raw(b"cargparse\nNamespace.__init__\n)R"),
    "namespace with a call": raw(b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00acos\nsystem\nsb"),
    "named persistent id": raw(b"Pwhatever\n"),
    "other persistent id": raw(b"X\x01\x00\x00\x00aQ"),
    "memo bomb": raw(b"Nr\xff\xff\xff\x7f"),
    "buffer": b"\x80\x05\x97.",
    "long text": raw(b"X\xff\xff\xff\x7fabc"),
    "cut off": raw(b"}X\x01\x00\x00\x00a")[:-1],
    "empty": b"",
    "no pickle": b"hello",
    "call of a type": raw(b"ctorch\nFloatStorage\n)R"),
    "state of a tuple": raw(b"))b"),
    "unknown operation": raw(b"\xff"),
}


LYING = {
    "storage too small": (tensor_pickle(count=8), [FLOATS]),
    "storage too large": (tensor_pickle(count=2, size=(2,)), [FLOATS]),
    "storage absent": (tensor_pickle(key="7"), [FLOATS]),
    "storage elsewhere": (tensor_pickle(key="../../etc/passwd"), [FLOATS]),
    "storage of objects": (tensor_pickle(kind="OrderedDict"), [FLOATS]),
    "size beyond the storage": (tensor_pickle(size=(5,)), [FLOATS]),
    "offset beyond the storage": (tensor_pickle(offset=2), [FLOATS]),
    "negative offset": (tensor_pickle(offset=-1), [FLOATS]),
    "negative size": (tensor_pickle(size=(-4,)), [FLOATS]),
    "negative stride": (tensor_pickle(stride=(-1,)), [FLOATS]),
    "stride beyond the storage": (tensor_pickle(size=(2,), stride=(9,)), [FLOATS]),
    "repeated element": (tensor_pickle(size=(2_000_000_000,), stride=(0,)), [FLOATS]),
    "more sizes than strides": (tensor_pickle(size=(2, 2)), [FLOATS]),
    "path that leaves the file": (tensor_pickle(), [FLOATS, ("../evil", b"x")]),
    "absolute path": (tensor_pickle(), [FLOATS, ("/tmp/evil", b"x")]),
    "two pickles": (tensor_pickle(), [FLOATS, ("other/data.pkl", tensor_pickle())]),
    "big endian": (tensor_pickle(), [FLOATS, ("archive/byteorder", b"big")]),
}


@pytest.fixture
def untouched(tmp_path):
    """Nothing was run and no file was left anywhere."""
    assert not os.path.exists(CANARY)
    yield
    assert not os.path.exists(CANARY)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, name, untouched):
    path = write_zip(tmp_path / "evil.pth", HOSTILE[name], [FLOATS])
    for read in (torch_file.read, vm.load):
        with pytest.raises(torch_file.TorchFileError) as error:
            read(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name", LYING)
def test_lying_files_are_refused(tmp_path, name, untouched):
    path = write_zip(tmp_path / "evil.pth", *LYING[name])
    with pytest.raises(torch_file.TorchFileError):
        torch_file.read(path)


def test_zips_that_are_none(tmp_path, golden, untouched):
    path = tmp_path / "evil.pth"
    whole = (golden / "finetune_checkpoint.pth").read_bytes()
    for cut in (10, 1000, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(torch_file.TorchFileError, match=r"damaged|refused"):
            torch_file.read(path)
    path.write_bytes(b"")
    bomb = write_zip(path, tensor_pickle(), [("archive/data/0", b"\0" * 10_000_000)], zipfile.ZIP_DEFLATED)
    with pytest.raises(torch_file.TorchFileError, match="is compressed, which PyTorch never does"):
        torch_file.read(bomb)
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(torch_file.TorchFileError, match=r"before 1\.6: open it once with a newer PyTorch"):
        torch_file.read(path)
    write_zip(path, b"x", name="archive/constants.pkl")
    with pytest.raises(torch_file.TorchFileError, match=r"no data\.pkl"):
        torch_file.read(path)


def test_flipped_bytes_never_crash(golden, tmp_path):
    """Damage anywhere gives arrays or one refusal, nothing else."""
    whole = bytearray((golden / "finetune_checkpoint.pth").read_bytes())
    start = whole.find(b"data.pkl")
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "evil.pth", 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in start + rng.integers(0, 12_000, 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            torch_file.read(path)
        except torch_file.TorchFileError:
            refused += 1
    assert refused > 75


def test_nothing_behind_a_name_is_ever_touched(tmp_path):
    """Attributes of dtypes, functions and types, and structures that take for ever to look at."""
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()  # noqa: E731
    state = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    double = (
        b")" + b"2\x86" * 40
        if False
        else b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    )
    hostile = {
        "state of a dtype": raw(b"ctorch\nBFloat16Storage\n", state, b"b"),
        "state of a function": raw(
            b"ctorch._utils\n_rebuild_tensor_v2\n}", text("__name__"), text("x"), b"sb"
        ),
        "slots of a function": raw(
            b"ctorch._utils\n_rebuild_parameter\nN}", text("__doc__"), text("x"), b"s\x86b"
        ),
        "state of a type": raw(b"ccollections\nOrderedDict\n}", text("a"), b"Nsb"),
        "a tuple as key": raw(b"}", double, b"Ns"),
        "a tuple as reference": raw(double, b"Q"),
        "a tuple as a call": raw(double, b")R"),
        "a tuple as the state of a list": raw(b"]", double, b"b"),
        "a tuple as a size": raw(b"ctorch._utils\n_rebuild_tensor_v2\n(", double, b"K\x00", double, b"))tR"),
        "a number as the whole": raw(b"K\x01", b"K\x01a"),
        "deep": raw(b"]" * 5000, b"a" * 4999),
        "items without a mark": raw(b"]", b"e"),
        "nothing left": raw(b"0"),
        "float key": raw(b"}G?\xf0\x00\x00\x00\x00\x00\x00Ns"),
    }
    before = (torch_file._tensor.__name__, torch_file._tensor.__doc__, np.dtype("bfloat16").byteorder)
    for name, data in hostile.items():
        path = write_zip(tmp_path / "evil.pth", data, [FLOATS])
        started = time.perf_counter()
        with pytest.raises(torch_file.TorchFileError) as error:
            torch_file.read(path)
        assert "\n" not in str(error.value), name
        assert len(str(error.value)) < 600, name
        assert time.perf_counter() - started < 5, name
    assert before == (torch_file._tensor.__name__, torch_file._tensor.__doc__, np.dtype("bfloat16").byteorder)
    shared = write_zip(tmp_path / "evil.pth", raw(b"}", text("a"), double, b"s"), [FLOATS])
    assert set(torch_file.read(shared)) == {"a"}  # sixty pairs, read in as many steps
    with pytest.raises(torch_weights.WeightsError, match="a is a tuple, not a tensor"):
        vm.load(shared)


def test_encrypted_and_damaged_storages(golden, tmp_path):
    path = tmp_path / "a.pth"
    data = bytearray(write_zip(path, tensor_pickle(), [FLOATS]).read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + place] |= 1
            at = data.find(signature, at + 4)
    path.write_bytes(data)
    with pytest.raises(torch_file.TorchFileError, match="is encrypted"):
        torch_file.read(path)
    good = (golden / "finetune_checkpoint.pth").read_bytes()
    tensor = torch_file.read(golden / "finetune_checkpoint.pth", weights._tensors_of)["head.weight"]
    at = good.find(np.ascontiguousarray(tensor).tobytes())
    path.write_bytes(good[: at + 5] + bytes([good[at + 5] ^ 1]) + good[at + 6 :])
    with pytest.raises(torch_file.TorchFileError, match=r"storage \d+ is damaged"):
        torch_file.read(path, weights._tensors_of)


def deepspeed_pickle(tensors: dict[str, np.ndarray]) -> tuple[bytes, list[tuple[str, bytes]]]:
    """What an engine of DeepSpeed saves: the tensors under `module`, and its own fields beside them."""
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()  # noqa: E731
    number = lambda n: b"J" + int(n).to_bytes(4, "little", signed=True)  # noqa: E731
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    ordered = b"ccollections\nOrderedDict\n)R"

    def tensor(key: int, array: np.ndarray) -> bytes:
        pid = b"(" + text("storage") + b"ctorch\nHalfStorage\n" + text(str(key)) + text("cuda:0")
        pid += number(array.size) + b"tQ"
        strides = [s // array.itemsize for s in array.strides]
        arguments = (
            b"(" + pid + number(0) + numbers(array.shape) + numbers(strides) + b"\x89" + ordered + b"t"
        )
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"

    arrays = [np.ascontiguousarray(array, np.float16) for array in tensors.values()]
    module = (
        ordered
        + b"("
        + b"".join(
            text(name) + tensor(key, array)
            for key, (name, array) in enumerate(zip(tensors, arrays, strict=True))
        )
        + b"u}"
        + text("_metadata")
        + ordered
        + b"sb"
    )
    scaler = (
        b"cdeepspeed.runtime.fp16.loss_scaler\nDynamicLossScaler\n)\x81}"
        + text("cur_scale")
        + b"G@p"
        + bytes(6)
    )
    scaler += b"sb"
    data = b"}(" + text("module") + module
    data += text("optimizer") + b"}" + text("loss_scaler") + scaler + b"s"
    data += text("csr_tensor_module_names") + b"c__builtin__\nset\n](" + text("a") + b"e\x85R"
    data += (
        text("mp_world_size") + number(1) + text("ds_config") + b"}" + text("dtype") + b"ctorch\nfloat16\ns"
    )
    data += text("args") + b"cargparse\nNamespace\n)\x81}" + text("lr") + b"G?\xf0" + bytes(6) + b"sb"
    data += text("unused") + tensor(len(arrays), np.zeros(4, np.float16)) + b"u"
    files = [(f"archive/data/{key}", array.tobytes()) for key, array in enumerate(arrays)]
    return raw(data), files  # the storage of `unused` is not even there


def test_checkpoints_of_deepspeed(golden, tmp_path):
    tensors = load_file(golden / "finetune_weights.safetensors")
    path = write_zip(tmp_path / "mp_rank_00_model_states.pt", *deepspeed_pickle(tensors))
    loaded, expected = (
        vm.load(path, num_heads=3),
        vm.load(golden / "finetune_weights.safetensors", num_heads=3),
    )
    half = jax.tree.map(
        lambda p: p.astype(np.float16).astype(np.float32), nnx.to_pure_dict(nnx.state(expected, nnx.Param))
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(loaded, nnx.Param)), half)
