"""`save` and `load`: the same model comes back, and nothing else is taken for one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import videomae_jax as vm
from videomae_jax.interop import export
from videomae_jax.models import attention, vit

BACKBONE = {
    "clip_size": (2, 8, 8),
    "tubelet": (2, 4, 4),
    "pixel_mean": (0.5,) * 3,
    "pixel_std": (0.2,) * 3,
    "encoder": vit.Stack(8, 2, 2, 16),
}
CONFIG = vm.VideoMAEConfig(**BACKBONE, decoder=vit.Stack(8, 1, 1, 16))


@pytest.fixture
def saved(tmp_path):
    model = vm.VideoMAE(CONFIG, rngs=nnx.Rngs(0))
    vm.save(model, tmp_path / "export", {"mask_ratio": 0.5})
    return model, tmp_path / "export"


def test_round_trip(saved):
    model, path = saved
    loaded = vm.load(path)
    assert loaded.config == CONFIG
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(loaded))
    )
    video = np.random.default_rng(0).integers(0, 256, (1, 2, 8, 8, 3), dtype=np.uint8)
    mask = vm.tube_mask(jax.random.key(0), 1, CONFIG.grid, 0.5)
    np.testing.assert_array_equal(
        model(jax.numpy.asarray(video), mask), loaded(jax.numpy.asarray(video), mask)
    )
    assert export.read_metadata(path)["recipe"] == {"mask_ratio": 0.5}


def test_an_export_is_never_overwritten(saved):
    model, path = saved
    with pytest.raises(export.ExportError, match="exists: choose another path"):
        vm.save(model, path)


def test_what_is_no_export_is_refused(saved, tmp_path):
    _, path = saved
    with pytest.raises(export.ExportError, match="holds no model"):
        vm.load(tmp_path / "nowhere")
    file = path / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(export.ExportError, match=r"has format 99 .* this version reads format 1"):
        vm.load(path)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_weights_are_loaded_wherever_they_were_trained(tmp_path, rng, kind):
    """400 tokens: kernels of TPUs and GPUs would take over from there, and are not for a CPU."""
    fields = {**BACKBONE, "clip_size": (2, 80, 80), "compute": vit.Compute("bfloat16", attention=kind)}
    model = vm.VideoMAE(vm.VideoMAEConfig(**fields, decoder=CONFIG.decoder), rngs=nnx.Rngs(0))
    vm.save(model, tmp_path / "export")
    loaded = vm.load(tmp_path / "export")
    video = jax.numpy.asarray(rng.integers(0, 256, (1, 2, 80, 80, 3), dtype=np.uint8))
    plain = dataclasses.replace(model.config, compute=vit.Compute())
    same = vm.VideoMAE(plain, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(loaded.raw_features(video), same.raw_features(video), atol=1e-5)
