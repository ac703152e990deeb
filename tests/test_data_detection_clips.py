"""Clips around key frames: which frames, and boxes where what they hold is."""

import numpy as np
from test_data_scenes import own

from videomae_jax.data import decode, detection_clips, proposals, scenes


def test_a_mirrored_clip_has_mirrored_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(proposals, "jittered", lambda boxes, *_: boxes)
    source = scenes.open_scenes(own(tmp_path, "a,1.5,0,0,0.5,1,1\n"), "train")
    frames = np.zeros((30, 32, 48, 3), np.uint8)
    frames[:, :, :24] = 255
    decode.write_video(tmp_path / "videos" / "a.mp4", frames, 10)
    clip = detection_clips.DetectClip(4, 1, (32, 48), (32, 32), True, 3, 2)
    sides = set()
    for seed in range(8):
        made = clip.random_map((0, source[0]), np.random.default_rng(seed))
        left, _, right, _ = made["boxes"][0, 0].astype(int)
        assert made["video"][0][:, :, left : right + 1].mean() > 200
        sides.add(bool(made["video"][0][0, 0, 0, 0] > 128))
    assert sides == {True, False}


def test_a_time_that_was_rounded_is_its_frame(tmp_path):
    frames = np.arange(30, dtype=np.uint8).repeat(32 * 32 * 3).reshape(30, 32, 32, 3) * 8
    decode.write_video(tmp_path / "a.mp4", frames, 30)
    with decode.Video(tmp_path / "a.mp4") as video:
        found = detection_clips.around(video, 0.333, 1, 1)  # frame 10, at 0.3333 s
        np.testing.assert_array_equal(found, video.read([10]))
