"""PyTorch weights in and out: published numbers, bit-exact round trips, files that are not what they say."""

import collections
import io
import json
import os
import pickle
import re
import shutil
import time
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import videomae_jax as vm
from videomae_jax.interop import export, torch_file, torch_weights, weights
from videomae_jax.models import positions, vit

HEADS = {"num_heads": 3, "decoder_num_heads": 2}


def relative_error(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def params_of(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("file", ["pretrain_weights.safetensors", "pretrain_checkpoint.pth"])
def test_official_pretraining(golden, file):
    expected = load_file(golden / "pretrain_expected.safetensors")
    model = vm.load(golden / file, **HEADS)
    video, mask = jnp.asarray(expected["video_u8"]), jnp.asarray(expected["mask"])
    assert relative_error(model(video, mask), expected["prediction"]) < 1e-5
    assert relative_error(model.encode(video, mask), expected["encoder_out"]) < 1e-5
    assert relative_error(model.loss(video, mask), expected["loss"]) < 1e-5


@pytest.mark.parametrize("file", ["finetune_weights.safetensors", "finetune_checkpoint.pth"])
def test_official_finetuning(golden, file):
    expected = load_file(golden / "finetune_expected.safetensors")
    model = vm.load(golden / file, num_heads=3)
    video = jnp.asarray(expected["video_u8"])
    assert relative_error(model(video), expected["logits"]) < 1e-5
    assert relative_error(model.features(video), expected["features"]) < 1e-5


def test_hugging_face(golden):
    expected = load_file(golden / "hf_expected.safetensors")
    video, mask = jnp.asarray(expected["video_u8"]), jnp.asarray(expected["mask"])
    model = vm.load(golden / "hf_pretrain")
    assert relative_error(model(video, mask), expected["pretrain_logits"]) < 1e-5
    assert relative_error(model.loss(video, mask), expected["pretrain_loss"]) < 1e-5
    classifier = vm.load(golden / "hf_classify")
    assert relative_error(classifier(video), expected["classify_logits"]) < 1e-5
    assert classifier.config.classes == tuple(f"LABEL_{i}" for i in range(7))


def newer_names(tensors: dict) -> dict:
    """The other spelling of Hugging Face's biases, with a zero key bias."""
    renamed = {}
    for name, tensor in tensors.items():
        short = re.sub(r"\.q_bias$", ".query.bias", re.sub(r"\.v_bias$", ".value.bias", name))
        renamed[short] = tensor
        if short != name:
            renamed[name[: -len("q_bias")] + "key.bias"] = np.zeros_like(tensor)
    return renamed


def hf_folder(golden, folder, change):
    """A copy of the Hugging Face classifier with other tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((golden / "hf_classify" / "config.json").read_bytes())
    save_file(change(load_file(golden / "hf_classify" / "model.safetensors")), folder / "model.safetensors")
    return folder


def test_both_spellings_of_hugging_face_biases(golden, tmp_path):
    other = vm.load(hf_folder(golden, tmp_path / "new", newer_names))
    jax.tree.map(np.testing.assert_array_equal, params_of(other), params_of(vm.load(golden / "hf_classify")))

    def poison(tensors):
        tensors = newer_names(tensors)
        tensors["videomae.encoder.layer.1.attention.attention.key.bias"][3] = 1e-3
        return tensors

    with pytest.raises(
        torch_weights.WeightsError, match=r"layer\.1\.attention\.attention\.key\.bias is not zero"
    ):
        vm.load(hf_folder(golden, tmp_path / "bad", poison))


def test_a_sharded_hugging_face_folder(golden, tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_bytes((golden / "hf_classify" / "config.json").read_bytes())
    tensors = load_file(golden / "hf_classify" / "model.safetensors")
    index = {}
    for part, names in enumerate((sorted(tensors)[:20], sorted(tensors)[20:])):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    plain = vm.load(golden / "hf_classify")
    jax.tree.map(np.testing.assert_array_equal, params_of(vm.load(folder)), params_of(plain))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(export.ExportError, match="names files that are not there"):
        vm.load(folder)


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.", "module.", "_orig_mod.", "module.backbone."])
def test_prefixes_of_official_files(golden, tmp_path, prefix):
    tensors = load_file(golden / "finetune_weights.safetensors")
    file = tmp_path / "weights.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, file)
    plain = vm.load(golden / "finetune_weights.safetensors", num_heads=3)
    jax.tree.map(np.testing.assert_array_equal, params_of(vm.load(file, num_heads=3)), params_of(plain))


def test_an_encoder_alone_encodes_and_refuses_to_predict(golden, tmp_path):
    tensors = load_file(golden / "pretrain_weights.safetensors")
    expected = load_file(golden / "pretrain_expected.safetensors")
    file = tmp_path / "encoder.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}, file)
    model = vm.load(file, num_heads=3)
    video, mask = jnp.asarray(expected["video_u8"]), jnp.asarray(expected["mask"])
    assert relative_error(model.encode(video, mask), expected["encoder_out"]) < 1e-5
    with pytest.raises(ValueError, match="is an encoder alone: it can encode, but has no decoder"):
        model(video, mask)


def test_heads_are_inferred_for_published_widths_only(golden):
    with pytest.raises(
        torch_weights.WeightsError, match=r"heads of its 48 wide blocks: pass num_heads=\.\.\."
    ):
        vm.load(golden / "finetune_weights.safetensors")
    with pytest.raises(torch_weights.WeightsError, match=r"pass decoder_num_heads=\.\.\."):
        vm.load(golden / "pretrain_weights.safetensors", num_heads=3)


@pytest.mark.parametrize(
    ("file", "heads"),
    [("pretrain_weights.safetensors", HEADS), ("finetune_weights.safetensors", {"num_heads": 3})],
)
def test_official_round_trips(golden, tmp_path, file, heads):
    """official -> ours -> official and official -> ours -> Hugging Face -> ours -> official, bit for bit."""
    theirs = load_file(golden / file)
    model = vm.load(golden / file, **heads)
    vm.export_torch(model, tmp_path / "same.safetensors", layout="official")
    vm.export_torch(model, tmp_path / "hf", layout="hf")
    vm.save(model, tmp_path / "orbax")
    through_hf, through_orbax = vm.load(tmp_path / "hf"), vm.load(tmp_path / "orbax")
    vm.export_torch(through_hf, tmp_path / "hf.safetensors", layout="official")
    vm.export_torch(through_orbax, tmp_path / "orbax.safetensors", layout="official")
    for name in ("same", "hf", "orbax"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert found[key].dtype == tensor.dtype
            assert found[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("name", ["hf_pretrain", "hf_classify"])
def test_hugging_face_round_trip(golden, tmp_path, name):
    theirs = load_file(golden / name / "model.safetensors")
    vm.export_torch(vm.load(golden / name), tmp_path / "back", layout="hf")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(found[key].tobytes() == tensor.tobytes() for key, tensor in theirs.items())
    config, original = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "back", golden / name)
    )
    same = (
        "image_size",
        "num_frames",
        "patch_size",
        "hidden_size",
        "num_attention_heads",
        "use_mean_pooling",
    )
    assert all(config[key] == original[key] for key in same)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(golden, tmp_path, dtype):
    tensors = load_file(golden / "finetune_weights.safetensors")
    file = tmp_path / "half.safetensors"
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, file)
    model = vm.load(file, num_heads=3)
    kernel = tensors["head.weight"].astype(dtype).astype(np.float32).T
    np.testing.assert_array_equal(model.head.kernel[...], kernel)
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(model))} == {jnp.dtype("float32")}


@pytest.fixture(scope="module")
def tensors(golden):
    return load_file(golden / "pretrain_weights.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_change_is_detected_and_named(tensors, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["missing", "renamed", "reshaped", "integers", "extra"]))
    changed = dict(tensors)
    tensor = changed[name]
    if kind == "missing":
        del changed[name]
    elif kind == "renamed":
        changed[f"{name}_old"] = changed.pop(name)
    elif kind == "reshaped":
        changed[name] = np.concatenate([tensor, tensor], axis=0)
    elif kind == "integers":
        changed[name] = tensor.astype(np.int32)
    else:
        changed[f"{name}.extra"] = tensor
    file = tmp_path_factory.mktemp("changed") / "w.safetensors"
    save_file(changed, file)
    with pytest.raises(torch_weights.WeightsError) as error:
        vm.load(file, **HEADS)
    text = str(error.value)
    stack = re.sub(r"\.\d+\..*", "", name)
    # Named itself, or as the block whose sizes can no longer be told; or the model is another one without it.
    part = ("encoder_to_decoder", "patch_embed", "encoder.norm")
    assert name.split(".weight")[0] in text or stack in text or any(word in name for word in part), text


def test_a_large_checkpoint_maps_both_ways():
    """The names and counts of the published files (fact sheet 9.6)."""
    for size, decoder_depth, count in (
        ("base", 4, 218),
        ("large", 12, 478),
        ("huge", 12, 582),
        ("giant", 4, 582),
    ):
        of = vm.SIZES[size]
        decoder = vit.Stack(of.decoder.width, decoder_depth, of.decoder.num_heads, of.decoder.mlp_dim)
        backbone = {"clip_size": (16, 224, 224), "tubelet": (2, of.patch, of.patch), "encoder": of.encoder}
        backbone |= {"pixel_mean": (0.5,) * 3, "pixel_std": (0.5,) * 3}
        config = vm.VideoMAEConfig(**backbone, decoder=decoder)
        assert len(list(torch_weights.table(config, "official"))) == count
        finetuned = {"base": 162, "large": 318, "huge": 422, "giant": 526}[size]
        classifier = vm.ClassifierConfig(**backbone, classes=("a", "b"))
        assert len(list(torch_weights.table(classifier, "official"))) == finetuned


# Files that are not what they say. A torch file is a zip with a pickle, so tests write both by hand.
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


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda d: (d / "x.txt").write_text("hello"), "is no model: pass a .pth or .safetensors file"),
        (lambda d: (d / "x.safetensors").write_bytes(b"\xff" * 40), "is damaged"),
        (lambda d: save_file({"a": np.zeros(2)}, d / "x.safetensors"), "no tubelet embedding"),
        (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "of type vit, not videomae"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "videomae"}'),
            "holds no model.safetensors",
        ),
    ],
)
def test_what_is_no_model(tmp_path, make, text):
    make(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name.startswith("x.")]
    with pytest.raises(ValueError, match=re.escape(text)):
        vm.load(files[0] if files else tmp_path)


def test_convert(golden, tmp_path):
    source = str(golden / "hf_classify")
    model = weights.convert(source, str(tmp_path / "orbax"), "orbax")
    assert isinstance(model, vm.VideoClassifier)
    loaded = vm.load(tmp_path / "orbax")
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params_of(loaded), params_of(model))
    assert export.read_metadata(tmp_path / "orbax")["recipe"]["origin"]["source"] == source
    with pytest.raises(torch_weights.WeightsError, match="layout 'onnx' is unknown: use official or hf"):
        weights.convert(source, str(tmp_path / "x"), "onnx")
    with pytest.raises(export.ExportError, match=r"name it \.safetensors"):
        weights.convert(source, str(tmp_path / "x.pth"), "official")
    with pytest.raises(export.ExportError, match="exists"):
        weights.convert(source, str(tmp_path / "orbax"), "hf")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["hf", "official"])
def test_exports_in_half_precision(golden, tmp_path, dtype, layout):
    out = tmp_path / ("out" if layout == "hf" else "out.safetensors")
    model = weights.convert(str(golden / "hf_classify"), str(out), layout, dtype)
    again = vm.load(out) if layout == "hf" else vm.load(out, num_heads=3)
    rounded = jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float32), params_of(model))
    jax.tree.map(np.testing.assert_array_equal, params_of(again), rounded)
    with pytest.raises(export.ExportError, match="an Orbax export holds float32"):
        weights.convert(str(golden / "hf_classify"), str(tmp_path / "orbax"), "orbax", dtype)
    with pytest.raises(export.ExportError, match="dtype 'int8' is unknown: use float32"):
        weights.convert(str(golden / "hf_classify"), str(tmp_path / "x"), "hf", "int8")


def test_other_clip_sizes_and_the_choice_that_is_kept(golden, tmp_path):
    """32 frames of 96 pixels from 16 of 64: a new table, or the old one resampled; the choice is kept."""
    video = np.random.default_rng(0).integers(0, 256, (1, 32, 96, 96, 3), dtype=np.uint8)
    outputs = {}
    for choice in positions.RESIZE:
        model = weights.convert(
            str(golden / "hf_classify"), str(tmp_path / choice), "orbax", "float32", choice
        )
        assert vm.load(tmp_path / choice).config.position_resize == choice
        assert model.config.grid == (8, 4, 4)
        outputs[choice] = np.asarray(vm.load(tmp_path / choice)(jnp.asarray(video)))
    assert np.abs(outputs["recompute"] - outputs["interpolate"]).max() > 1e-6
    with pytest.raises(export.ExportError, match="unknown position_resize 'nearest'"):
        vm.load(golden / "hf_classify", position_resize="nearest")


def test_other_models_and_several_candidates(golden, tmp_path):
    tensors = load_file(golden / "finetune_weights.safetensors") | {
        "pos_embed_spatial": np.zeros((1, 16, 48))
    }
    save_file(tensors, tmp_path / "st.safetensors")
    with pytest.raises(torch_weights.WeightsError, match=r"weights of Meta's mae_st.*cannot be converted"):
        vm.load(tmp_path / "st.safetensors", num_heads=3)
    (tmp_path / "other.pth").write_bytes(b"PK")
    with pytest.raises(export.ExportError, match=r"name one of other\.pth, st\.safetensors"):
        vm.load(tmp_path)


def test_transformers_reads_our_folders(golden, tmp_path):
    """No key missing or left over, and the same numbers; needs the extra [torch]."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    expected = load_file(golden / "hf_expected.safetensors")
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(expected["video_u8"]).permute(0, 1, 4, 2, 3).float() / 255 - mean) / std
    for name, kind, extra, wanted in (
        ("hf_classify", "VideoMAEForVideoClassification", {}, "classify_logits"),
        ("hf_pretrain", "VideoMAEForPreTraining", {"bool_masked_pos": expected["mask"]}, "pretrain_logits"),
    ):
        vm.export_torch(vm.load(golden / name), tmp_path / name)
        load = getattr(transformers, kind).from_pretrained
        model, found = load(tmp_path / name, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        inputs = {key: torch.from_numpy(value) for key, value in extra.items()}
        logits = model.eval()(pixels, **inputs).logits.detach().numpy()
        assert relative_error(logits, expected[wanted]) < 1e-5


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
    half = jax.tree.map(lambda p: p.astype(np.float16).astype(np.float32), params_of(expected))
    jax.tree.map(np.testing.assert_array_equal, params_of(loaded), half)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"id2label": None}, ""),
        ({"image_size": [64, 64]}, ""),
        ({"image_size": "64"}, "image_size='64' is no int"),
        ({"image_size": [64, 64, 64]}, "image_size"),
        ({"num_frames": None}, "num_frames=None is no int"),
        ({"layer_norm_eps": -1}, "layer_norm_eps"),
        ({"id2label": ["a"]}, "id2label"),
        ({"id2label": {"x": "a"}}, "id2label"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new': only the exact gelu is known"),
        ({"num_attention_heads": 5}, "num_heads 5 does not divide"),
        ({"num_attention_heads": "3"}, "num_attention_heads='3' is no int"),
    ],
)
def test_odd_configs_of_hugging_face(golden, tmp_path, change, text):
    folder = tmp_path / "hf"
    shutil.copytree(golden / "hf_classify", folder)
    about = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(about))
    if not text:
        assert vm.load(folder).config.clip_size[1:] == (64, 64)
        return
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        vm.load(folder)
    assert str(folder) in str(error.value)
    assert type(error.value).__module__.startswith("videomae_jax")


@pytest.mark.parametrize("content", ["{", "[]", "null", '"x"', "[" * 100_000, "\xff"])
def test_broken_configs_of_hugging_face(golden, tmp_path, content):
    folder = tmp_path / "hf"
    shutil.copytree(golden / "hf_classify", folder)
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(export.ExportError, match=r"config\.json"):
        vm.load(folder)


def test_a_header_that_lies(tmp_path):
    for shape in ([10**9, 0], [10**18, 10**18], [-1], ["a"], 3):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"x\.safetensors") as error:
            vm.load(tmp_path / "x.safetensors")
        assert type(error.value).__module__.startswith("videomae_jax")


def test_what_is_predicted_is_kept_in_both_directions(golden, tmp_path):
    """`norm_pix_loss: false`: pixels, which are shown as they are."""
    folder = tmp_path / "hf"
    shutil.copytree(golden / "hf_pretrain", folder)
    about = json.loads((folder / "config.json").read_text())
    for value in (True, False):
        (folder / "config.json").write_text(json.dumps(about | {"norm_pix_loss": value}))
        assert weights.read_recipe(folder)["normalize_target"] is value
        weights.convert(str(folder), str(tmp_path / f"orbax{value}"), "orbax")
        weights.convert(str(tmp_path / f"orbax{value}"), str(tmp_path / f"back{value}"), "hf")
        assert json.loads((tmp_path / f"back{value}" / "config.json").read_text())["norm_pix_loss"] is value
    with pytest.raises(
        export.ExportError, match="the official layout cannot tell that the model predicts pixels"
    ):
        weights.convert(str(folder), str(tmp_path / "x.safetensors"), "official")


def test_what_files_do_not_tell(golden, tmp_path):
    file = golden / "finetune_weights.safetensors"
    classes = len(vm.load(file, num_heads=3).config.classes)
    hints = weights.Hints(
        num_heads=3, clip_size=(16, 64, 64), classes=tuple("abcdefghijkl"[:classes]), stride=2
    )
    model = weights.read(file, hints)
    assert (model.config.clip_size, model.config.classes) == (hints.clip_size, hints.classes)
    assert weights.read_recipe(file, hints)["stride"] == 2
    with pytest.raises(
        export.ExportError, match=r"does not tell how frames are sampled.*--stride=4.*--stride=0"
    ):
        weights.read_stride(file, weights.Hints(num_heads=3))
    for count, stride in ((174, 0), (400, 4), (710, 4), (51, 2), (101, 4)):
        assert weights.published_stride(count) == stride
    weights.convert(str(file), str(tmp_path / "orbax"), "orbax", hints=hints)
    assert weights.read_recipe(tmp_path / "orbax")["stride"] == 2
    assert vm.load(tmp_path / "orbax").config.classes == hints.classes
    with pytest.raises(export.ExportError, match="tells itself that its num_heads is 3, not 6"):
        weights.read(tmp_path / "orbax", weights.Hints(num_heads=6))
