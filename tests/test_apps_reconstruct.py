"""Reconstructions: what each statistics mode may look at, the numbers, and the files."""

import json

import av
import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import videomae_jax as vm
from videomae_jax.apps import reconstruct
from videomae_jax.config import UserError
from videomae_jax.data import decode
from videomae_jax.evaluation import reconstruction
from videomae_jax.interop.weights import Hints
from videomae_jax.models import masking, tubelets, vit

CONFIG = vm.VideoMAEConfig(
    clip_size=(4, 32, 32),
    tubelet=(2, 8, 8),
    pixel_mean=(0.5,) * 3,
    pixel_std=(0.2,) * 3,
    encoder=vit.Stack(8, 1, 1, 16),
    decoder=vit.Stack(8, 1, 1, 16),
)


@pytest.fixture(scope="module")
def model() -> vm.VideoMAE:
    return vm.VideoMAE(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def video(rng) -> np.ndarray:
    return rng.integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> jax.Array:
    return vm.tube_mask(jax.random.key(1), 2, CONFIG.grid, 0.75)


def run(model, video, mask, normalize, statistics):
    return reconstruct.reconstruct(
        model, video, ["a"] * len(video), *masking.from_mask(mask), normalize, statistics
    )


def changed_where_hidden(video, mask, rng):
    noise = rng.integers(0, 256, video.shape, dtype=np.uint8)
    cut, other = (tubelets.patchify(jnp.asarray(x), CONFIG.tubelet) for x in (video, noise))
    mixed = jnp.where(mask[..., None], other, cut)
    return np.asarray(tubelets.unpatchify(mixed, CONFIG.grid, CONFIG.tubelet))


def hidden_voxels(mask) -> np.ndarray:
    """bool [B, T, H, W, 3]."""
    tokens = jnp.repeat(mask[..., None].astype(jnp.uint8), 384, 2)
    return np.asarray(tubelets.unpatchify(tokens, CONFIG.grid, CONFIG.tubelet)) == 1


@pytest.mark.parametrize(
    ("normalize", "statistics", "honest"),
    [(True, "true", False), (True, "visible", True), (True, "raw", True), (False, "raw", True)],
)
def test_only_true_statistics_look_at_hidden_pixels(model, video, mask, rng, normalize, statistics, honest):
    panels = run(model, video, mask, normalize, statistics)
    other = run(model, changed_where_hidden(video, mask, rng), mask, normalize, statistics)
    assert (panels.reconstructed == other.reconstructed).all() == honest
    assert not (panels.original == other.original).all()


def test_visible_tubelets_are_shown_as_they_are(model, video, mask):
    panels = run(model, video, mask, True, "true")
    hidden = hidden_voxels(mask)
    for panel in (panels.masked, panels.reconstructed):
        np.testing.assert_array_equal(panel[~hidden], video[~hidden])
    assert set(np.unique(panels.masked[hidden])) == {128}


def test_psnr_counts_hidden_pixels_only(model, video, mask):
    panels = run(model, video, mask, False, "raw")
    hidden = hidden_voxels(mask)
    error = (panels.reconstructed[hidden] / 255 - video[hidden] / 255) ** 2
    assert panels.psnr()["psnr_hidden"] == pytest.approx(-10 * np.log10(error.mean()), abs=0.05)


def test_a_perfect_prediction_is_the_original(video, mask):
    """Through the target and back: for true statistics nothing but rounding is lost."""
    visible, hidden = masking.from_mask(mask)
    raw = tubelets.patchify(jnp.asarray(video), CONFIG.tubelet)
    seen, unseen = tubelets.take(raw, visible), tubelets.take(raw, hidden)
    nearest = reconstruction.nearest_visible(visible, hidden, CONFIG.grid)
    for normalize, statistics in ((True, "true"), (False, "raw")):
        target = tubelets.reconstruction_target(unseen, 3, normalize)
        pixels = reconstruction.to_pixels(target, unseen, seen, nearest, 3, normalize, statistics)
        np.testing.assert_allclose(pixels * 255, unseen, atol=0.01)


def test_trivial_predictions(video, mask):
    visible, hidden = masking.from_mask(mask)
    raw = tubelets.take(tubelets.patchify(jnp.asarray(video), CONFIG.tubelet), visible)
    nearest = reconstruction.nearest_visible(visible, hidden, CONFIG.grid)
    zeros = reconstruction.trivial_predictions(raw, nearest, 3, True)
    assert not zeros["mean"].any()
    pixels = reconstruction.trivial_predictions(raw, nearest, 3, False)
    colour = np.asarray(raw[0]).reshape(-1, 3).mean(axis=0) / 255
    np.testing.assert_allclose(pixels["mean"][0, 5].reshape(-1, 3)[7], colour, rtol=1e-5)
    np.testing.assert_allclose(pixels["nearest_visible"][1, 2] * 255, raw[1, nearest[1, 2]], atol=1e-3)


def test_many_clips_go_through_the_device_in_parts(model, video, mask):
    many, masks = np.tile(video, (5, 1, 1, 1, 1)), jnp.tile(mask, (5, 1))
    panels = run(model, many, masks, False, "raw")
    assert len(many) > reconstruct._CLIPS_AT_ONCE
    few = run(model, video, mask, False, "raw")
    np.testing.assert_array_equal(panels.reconstructed[8:], few.reconstructed)
    np.testing.assert_allclose(panels.errors["hidden"][8:], few.errors["hidden"], rtol=1e-5)


def test_nearest_visible_by_brute_force(mask):
    visible, hidden = masking.from_mask(mask)
    nearest = reconstruction.nearest_visible(visible, hidden, CONFIG.grid)
    for row in range(2):
        seen = np.stack(np.unravel_index(np.asarray(visible[row]), CONFIG.grid), -1)
        for place, token in enumerate(np.asarray(hidden[row])):
            here = np.array(np.unravel_index(token, CONFIG.grid))
            assert nearest[row, place] == np.argmin(((seen - here) ** 2).sum(-1))


def test_statistics_that_make_no_sense_are_refused(model, video, mask):
    with pytest.raises(ValueError, match="this one predicts pixels: use statistics=raw"):
        run(model, video, mask, False, "true")
    with pytest.raises(ValueError, match="unknown statistics 'best'"):
        run(model, video, mask, True, "best")


@pytest.mark.parametrize("statistics", ["true", "visible", "raw"])
def test_pictures_name_their_statistics(model, video, mask, statistics, monkeypatch):
    written = []
    caption = reconstruct._caption
    monkeypatch.setattr(reconstruct, "_caption", lambda t, *a: written.append(t) or caption(t, *a))
    reconstruct.draw(run(model, video, mask, True, statistics), ["a", "b"], png=False)
    assert written[0][:2] == ["original", "masked"]
    assert {"true": "true", "visible": "visible", "raw": "raw"}[statistics] in written[0][2]


def test_files(model, video, mask, tmp_path):
    panels = run(model, video, mask, True, "true")
    for suffix in (".gif", ".mp4", ".png"):
        reconstruct.write(panels, ["one", "two"], tmp_path / f"x{suffix}")
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 4
        assert gif.size[0] >= 3 * 224
    with Image.open(tmp_path / "x.png") as png:
        assert png.size[1] > 6 * 96
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4
    with pytest.raises(UserError, match="unknown suffix"):
        reconstruct.write(panels, ["one", "two"], tmp_path / "x.bmp")


def test_the_command(model, tmp_path):
    vm.save(
        model, tmp_path / "model", {"mask": "tube", "mask_ratio": 0.75, "normalize_target": True, "stride": 2}
    )
    path = clips.write(tmp_path / "v.mp4", clips.numbered_frames(20))
    settings = {"statistics": "", "mask": "", "mask_ratio": 0.0, "start": 1.0, "seed": 0, "hints": Hints()}
    panels = reconstruct.run(path, str(tmp_path / "model"), str(tmp_path / "out.gif"), **settings)
    assert panels.statistics == "true"
    assert clips.frame_numbers(panels.original[0]) == [10, 12, 14, 16]
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["frames"], told["mask_ratio"]) == ([10, 12, 14, 16], 0.75)
    assert told["psnr"] == pytest.approx(panels.psnr())
    settings |= {"start": -1.0, "hints": Hints(stride=1), "mask": "frame", "mask_ratio": 0.5}
    panels = reconstruct.run(path, str(tmp_path / "model"), str(tmp_path / "out.png"), **settings)
    assert clips.frame_numbers(panels.original[0]) == [8, 9, 10, 11]
    vm.save(model, tmp_path / "bare")
    with pytest.raises(UserError, match="does not say how it was trained: give --mask_ratio"):
        reconstruct.run(path, str(tmp_path / "bare"), "o.gif", **{**settings, "mask_ratio": 0.0})


def test_a_start_beyond_the_end_is_refused(model, tmp_path):
    vm.save(model, tmp_path / "export", {"mask": "tube", "mask_ratio": 0.5, "stride": 1})
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(10))
    how = {"statistics": "", "mask": "", "mask_ratio": 0.0, "seed": 0, "hints": Hints()}
    with pytest.raises(UserError, match=r"--start=99: .* ends after 1\.0 s"):
        reconstruct.run(path, str(tmp_path / "export"), str(tmp_path / "o.gif"), start=99.0, **how)


def test_a_folder_of_frames_is_a_video(model, tmp_path, rng):
    vm.save(model, tmp_path / "export", {"mask": "tube", "mask_ratio": 0.5, "stride": 1})
    (tmp_path / "frames").mkdir()
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))
        image.save(tmp_path / "frames" / f"{i:03}.png")
    how = {"statistics": "", "mask": "", "mask_ratio": 0.0, "seed": 0, "hints": Hints()}
    source, out = str(tmp_path / "frames"), tmp_path / "out.png"
    reconstruct.run(source, str(tmp_path / "export"), str(out), start=-1.0, **how)
    assert out.stat().st_size > 1000
    with pytest.raises(decode.DecodeError, match="no frame rate"):
        reconstruct.run(source, str(tmp_path / "export"), str(out), start=1.0, **how)
