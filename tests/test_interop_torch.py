"""PyTorch weights in and out: published numbers, bit-exact round trips, files that are not what they say."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import official
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import videomae_jax as vm
from videomae_jax.interop import export, torch_weights, weights
from videomae_jax.models import positions, vit
from videomae_jax.models.detector import ActionDetector
from videomae_jax.models.heads import ClassifierConfig, VideoClassifier

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
    with pytest.raises(
        torch_weights.WeightsError, match=r"48 and 32 wide .* pass num_heads=\.\.\., decoder_num_heads="
    ):
        vm.load(golden / "pretrain_weights.safetensors")


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
    with pytest.raises(
        torch_weights.WeightsError, match="layout 'onnx' is unknown: use orbax, official or hf"
    ):
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
        many = dataclasses.replace(model.config, classes=tuple(map(str, range(count))))
        assert weights.published_stride(many) == stride
    weights.convert(str(file), str(tmp_path / "orbax"), "orbax", hints=hints)
    assert weights.read_recipe(tmp_path / "orbax")["stride"] == 2
    assert vm.load(tmp_path / "orbax").config.classes == hints.classes
    with pytest.raises(export.ExportError, match="tells itself that its num_heads is 3, not 6"):
        weights.read(tmp_path / "orbax", weights.Hints(num_heads=6))


def a_classifier(**changes) -> VideoClassifier:
    fields = {
        "clip_size": (4, 32, 32),
        "tubelet": (2, 8, 8),
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
        "encoder": vit.Stack(32, 1, 2, 64),
        "classes": ("calm", "loud"),
        "final_norm_epsilon": 1e-5,  # as Hugging Face has it
        "head_scale": 1.0,
    }
    return VideoClassifier(ClassifierConfig(**fields | changes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "change", [{"head": "multilabel"}, {"head": "regression"}, {"pixel_mean": (0.5,) * 3}, {}]
)
def test_a_model_is_read_as_it_was_written_or_not_written(change, rng, tmp_path):
    """Kind of head, normalisation and stride: a folder tells them, an official file those as published."""
    model = a_classifier(**change)
    vm.export_torch(model, tmp_path / "hf", stride=3)
    again = weights.read(tmp_path / "hf", weights.Hints())
    video = jnp.asarray(rng.integers(0, 256, (1, 4, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(again(video), model(video), rtol=1e-5)
    assert again.config.head == model.config.head
    assert weights.read_stride(tmp_path / "hf", weights.Hints()) == 3
    if change:
        with pytest.raises(torch_weights.WeightsError, match="the official layout cannot tell"):
            vm.export_torch(model, tmp_path / "x.safetensors", "official")
    else:
        vm.export_torch(model, tmp_path / "x.safetensors", "official")
    assert (tmp_path / "x.safetensors").exists() == (not change)


def test_an_interpolated_table_is_in_no_layout(tmp_path):
    model = a_classifier(position_resize="interpolate", position_grid=(2, 2, 2))
    for layout, name in (("hf", "hf"), ("official", "x.safetensors")):
        with pytest.raises(torch_weights.WeightsError, match=r"interpolated from a grid of \(2, 2, 2\)"):
            vm.export_torch(model, tmp_path / name, layout)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"image_mean": [0.5, None, 0.5]}, "is damaged"),
        ({"do_normalize": False}, "takes normalised pixels"),
        ([], "is damaged"),
    ],
)
def test_a_preprocessor_that_makes_no_sense(golden, told, message, tmp_path):
    shutil.copytree(golden / "hf_classify", tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(export.ExportError, match=message):
        vm.load(tmp_path / "hf")


def test_a_published_detector_is_read_as_one(golden, tmp_path):
    """The same names as a classifier of the first token has, and a head of AVA's 80 actions."""
    rng = np.random.default_rng(0)
    tensors = load_file(golden / "finetune_weights.safetensors")
    width = tensors["head.weight"].shape[1]
    for classes in (80, 81):
        tensors |= {
            "head.weight": rng.normal(size=(classes, width)).astype(np.float32),
            "head.bias": rng.normal(size=classes).astype(np.float32),
        }
        named = {name.replace("fc_norm.", "norm."): value for name, value in tensors.items()}
        save_file(named, tmp_path / f"{classes}.safetensors")
        if classes == 80:
            params = jax.tree.map(jnp.asarray, official.to_params(tensors))
    hints = weights.Hints(num_heads=3, clip_size=(16, 64, 64))
    assert weights.read(tmp_path / "81.safetensors", hints).config.pooling == "first"
    model = weights.read(tmp_path / "80.safetensors", hints)
    assert isinstance(model, ActionDetector)
    assert model.config.classes[::79] == ("1", "80")
    assert (model.config.bins, model.config.aligned) == (7, False)
    assert weights.read_recipe(tmp_path / "80.safetensors", hints) == {"stride": 4, "test_short": 256}
    # A frame in its own shape, which has another grid than the clips of its training.
    video = jnp.asarray(rng.integers(0, 256, (1, 16, 64, 96, 3), np.uint8))
    boxes = jnp.array([[[3.0, 5.0, 40.0, 60.0], [50.0, 0.0, 95.0, 63.0]]])
    mean, std = np.array([122.7717, 115.9465, 102.9801]), 57.375
    pixels = jnp.asarray((video - mean) / std, jnp.float32)
    expected = nnx.merge(nnx.graphdef(model), params).logits(pixels, boxes)
    np.testing.assert_allclose(model.logits(model.normalized(video), boxes), expected, rtol=1e-4, atol=1e-4)
    recomputed = weights.read(tmp_path / "80.safetensors", hints, "recompute")
    assert np.abs(recomputed.logits(pixels, boxes) - expected).max() > 1e-2
    weights.convert(str(tmp_path / "80.safetensors"), str(tmp_path / "export"), "orbax", hints=hints)
    np.testing.assert_array_equal(vm.load(tmp_path / "export").logits(pixels, boxes), expected)
    with pytest.raises(torch_weights.WeightsError, match="80 actions, their names are 2"):
        vm.load(tmp_path / "80.safetensors", num_heads=3, classes=("sit", "run"))
