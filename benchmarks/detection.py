"""Action detection on generated scenes: pretrained and from scratch, and what the box is worth.

    .venv/bin/python benchmarks/detection.py --pretrained=runs/small --workdir=runs/detection

Frame-mAP of the test part (annotated boxes). "whole": the same weights see the whole frame as every box.
"chance": every box gets each action's share of the training boxes as its score. A finished run is not
repeated.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import numpy as np
from flax import nnx
from methods import settings, show, train

from videomae_jax.config import Config
from videomae_jax.data.scenes import Scene, SceneSource
from videomae_jax.interop import export
from videomae_jax.tasks import detect, detections, table
from videomae_jax.training import compute


def with_corners(source: SceneSource, corners: tuple[float, ...]) -> SceneSource:
    """The same boxes, all at one place."""
    moved = [
        Scene(s.time, np.tile(np.array(corners, np.float32), (len(s.corners), 1)), s.actions, s.scores)
        for s in source.scenes
    ]
    return dataclasses.replace(source, scenes=tuple(moved))


def seen_whole(config: Config, folder: pathlib.Path) -> float:
    """Frame-mAP where the whole frame is what is looked at, and the boxes are reported as they are."""
    config = compute.on_this_machine(config)
    videos = detect.open_videos(config)
    task = table.make_task(config, videos.train)
    assert isinstance(task, detect.Detect)
    params = jax.device_get(nnx.to_pure_dict(nnx.state(export.load(folder / "best"), nnx.Param)))
    whole = with_corners(videos.test, (0.0, 0.0, 1.0, 1.0))
    found = task.tester(config, whole, compute.make_mesh(config), "test").run(params)
    return dataclasses.replace(found, source=videos.test, truth=videos.test).figures()["mAP"]


def chance(config: Config) -> float:
    """Frame-mAP of scores that know how frequent actions are."""
    videos = detect.open_videos(config)
    marks = [actions for scene in videos.train.scenes for actions in scene.actions]
    actions = range(len(videos.train.classes))
    share = np.array([sum(action in done for done in marks) / len(marks) for action in actions])
    scores = {i: np.tile(share, (len(s.corners), 1)) for i, s in enumerate(videos.test.scenes)}
    return detections.Found(videos.test, videos.test, scores, {}).figures()["mAP"]


def main() -> None:
    """Runs both sides with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--workdir", default="runs/detection")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    started, runs = time.time(), []
    for seed in range(arguments.seeds):
        row = {}
        for name in ("pretrained", "scratch"):
            config = settings("detect", "size=tiny,data=moving_shapes", seed)
            config.init_from = arguments.pretrained if name == "pretrained" else ""
            folder = pathlib.Path(arguments.workdir).absolute() / f"{name}_{seed}"
            row[name] = train(config, folder)["test"]["mAP"]
            row[f"{name}, whole"] = seen_whole(config, folder)
        runs.append(row | {"chance": chance(config)})
    show(runs, arguments, started)


if __name__ == "__main__":
    main()
