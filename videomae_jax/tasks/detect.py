"""Action detection: what each boxed person does, as published for AVA (arXiv 2203.12602)."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from videomae_jax import config as settings
from videomae_jax import hosts, storage
from videomae_jax.config import Config, UserError
from videomae_jax.data import detection_clips, moving_scenes, processes, scenes
from videomae_jax.data.scenes import SceneSource
from videomae_jax.data.sources import Source
from videomae_jax.interop import export, weights
from videomae_jax.models import functional, views
from videomae_jax.models.detector import ActionDetector, DetectorConfig
from videomae_jax.models.layout import Layout
from videomae_jax.storage import Place
from videomae_jax.tasks import backbone, detections
from videomae_jax.training import compute, optim, report, splits
from videomae_jax.training.splits import Splits
from videomae_jax.training.step import Batch, Terms, TrainState, clip_keys
from videomae_jax.training.task import Run, Task, Validate

_COLOURS = (10, 26, 26)  # published: hue of 180, saturation and value of 255, at most; whole numbers


@dataclasses.dataclass(frozen=True)
class Detect(Task[DetectorConfig]):
    """A detector of actions in training.

    Attributes:
        stride: frames of the file from one frame of a clip to the next.
        short, test_short: short side of frames, in pixels: least and largest, and of tests.
        boxes: at most, of a training clip.
        flip: mirror half of the clips.
        colours: change hue, saturation and value.
        layers: learning rates by depth, and what stays as it is.
        numbers: number of each class in files.
    """

    model: DetectorConfig
    stride: int
    short: tuple[int, int]
    test_short: int
    boxes: int
    flip: bool
    colours: bool
    layers: optim.Layers
    numbers: tuple[int, ...]
    clips_per_video: int = 1
    exported: ClassVar[tuple[str, ...]] = ("encoder", "norm", "head")
    last_phase: ClassVar[str] = "test"

    def open_videos(self, config: Config) -> Splits:
        """Key frames with boxes: a folder of that form (`data.scenes`), or generated ones."""
        return open_videos(config)

    def init(self, key: Key[Array, ""]) -> dict:
        """Parameters of a detector from scratch, a nested dict of float32 arrays."""
        return functional.init(ActionDetector, self.model, key)

    def module(self, params: dict) -> ActionDetector:
        """The detector that the parameters belong to."""
        graphdef, _ = functional.abstract(ActionDetector, self.model)
        return nnx.merge(graphdef, {name: params[name] for name in self.exported})

    @property
    def best_by(self) -> str:
        """Frame-mAP of the validation part."""
        return "mAP"

    def start(self, config: Config, names: list[str]) -> dict[str, np.ndarray]:
        """The backbone of `init_from`, its norm, and the head of a detector of the same actions."""
        return backbone.start(config, self.model, names)

    @property
    def rate_factors(self) -> Callable[[Any], Any]:
        """Layer-wise decay, and 0 for what is frozen."""
        return functools.partial(optim.layer_scales, layers=self.layers)

    def terms(
        self,
        params: dict,
        others: None,
        batch: Batch,
        root: Key[Array, ""],
        step: Int[Array, ""],
        layout: Layout,
    ) -> Terms:
        """Of each clip the sum over its boxes of the mean over actions, a mean over clips; see `Task.terms`.

        As published, but for a factor that Adam does not see: there it is the sum over a GPU's clips.

        Args:
            batch: `boxes` float32 [B, R, 4], `box_weight` [B, R] and `actions` [B, R, K], too.
        """
        c, model = self.model, self.module(params)
        pixels = batch["video"].astype(jnp.float32) / 255
        if self.colours:
            pixels = jax.vmap(self._recoloured)(pixels, clip_keys(root, "view", batch["index"]))
        pixels = (pixels - jnp.array(c.pixel_mean)) / jnp.array(c.pixel_std)
        drop = clip_keys(root, "drop_path", batch["index"])
        logits = model.head(
            model.features(model.feature_map(pixels, drop, layout, self.layers.frozen), batch["boxes"])
        )
        losses = (jnp.logaddexp(0.0, logits) - batch["actions"] * logits).mean(axis=-1)
        weight = batch["weight"][:, None] * batch["box_weight"]
        return Terms(
            jnp.where(weight > 0, losses * weight, 0.0).sum(),
            batch["weight"].sum(),
            {"boxes": weight.sum()},
        )

    def _recoloured(self, clip: Float[Array, "T H W 3"], key: Key[Array, ""]) -> Float[Array, "T H W 3"]:
        most = jnp.array(_COLOURS)
        shift = jax.random.randint(key, (3,), -most, most + 1)
        return views.shift_hsv(clip, shift / jnp.array([180.0, 255.0, 255.0]))

    def scores(
        self, params: dict, video: UInt8[Array, "B T H W C"], boxes: Float[Array, "B R 4"]
    ) -> Float[Array, "B R K"]:
        """How sure the model is of each action of each box, 0..1."""
        model = self.module(params)
        return jax.nn.sigmoid(model.logits(model.normalized(video), boxes))

    def flops_per_clip(self) -> float:
        """Floating-point operations of a clip's forward and backward pass; see `vit.block_flops`."""
        return backbone.adapted_flops(self.model, self.layers.frozen)

    @property
    def clip_transform(self) -> detection_clips.DetectClip:
        """Record -> training clips."""
        frames, height, width = self.model.clip_size
        size, classes = (height, width), len(self.model.classes)
        return detection_clips.DetectClip(
            frames, self.stride, size, self.short, self.flip, self.boxes, classes
        )

    def metadata(self) -> dict[str, Any]:
        """What is stored beside the parameters."""
        recipe = {"stride": self.stride, "test_short": self.test_short, "numbers": list(self.numbers)}
        return export.metadata(ActionDetector, self.model, recipe)

    def describe(self) -> str:
        """The model in half a line."""
        encoder, tokens = self.model.encoder, math.prod(self.model.grid)
        return (
            f"encoder {encoder.width}x{encoder.depth}, {tokens} tubelets, {len(self.model.classes)} actions, "
            f"at most {self.boxes} boxes, {self.model.compute.dtype}"
        )

    def tester(self, config: Config, source: Source, mesh: Mesh, part: str) -> detections.Tester:
        """What tests weights on a part, on a detector's boxes where there are some."""
        assert isinstance(source, SceneSource)
        frames, patch = self.model.clip_size[0], self.model.tubelet[1]
        views_of = detections.Views(frames, self.stride, self.test_short, patch)
        return detections.Tester(self.scores, source, part, views_of, config, mesh)

    def validator(self, run: Run) -> Validate:
        """Frame-mAP on the key frames of the validation part."""
        tester = self.tester(run.config, run.videos.validation, run.mesh, "validation")

        def validate(params: Any, step: int) -> dict[str, float]:
            found = tester.run(params)
            found.say_failed()
            return {f"validation_{name}": value for name, value in found.figures().items()}

        return validate

    def finish(self, run: Run, state: TrainState) -> dict[str, Any]:
        """The test of the best weights; writes evaluation.json, detections.csv and classes.png.

        Raises:
            UserError: there are no best weights.
        """
        best = backbone.best_weights(run.workdir)
        tester = self.tester(run.config, run.videos.test, run.mesh, tested_part(run.videos.test))
        found = tester.run(best)
        return {"test": detections.write(run.workdir, found, run.config, str(run.workdir / "best"))}


def evaluate(
    config: Config, workdir: Place, checkpoint: str, hints: weights.Hints | None = None
) -> dict[str, Any]:
    """Tests a detector on the test part; writes what `detections.write` does.

    Args:
        checkpoint: export, checkpoint, work folder, or file; "" for WORKDIR/best, or WORKDIR without one.
        hints: what a file does not tell.

    Raises:
        UserError: no detector, or one of other actions; as `detections.write`.
    """
    config = compute.on_this_machine(settings.checked(config))
    is_best = not checkpoint and (workdir / "best").is_dir()
    path = checkpoint or str(workdir / "best" if is_best else workdir)
    hints = backbone.hints(config, hints)
    made = weights.read_config(path, hints)
    if not isinstance(made, DetectorConfig):
        raise UserError(f"{path} holds no detector: train one with configs/detect.py")
    videos = hosts.agreed(lambda: open_videos(config))
    task = make(config, videos.test, "")
    numbers = tuple(map(str, task.numbers))  # what files of weights know of AVA's actions
    if made.classes not in (videos.test.classes, numbers):
        raise UserError(
            f"{path} knows {len(made.classes)} actions, {config.data.path} has {len(videos.test.classes)} or "
            f"others: use the classes.csv of its training"
        )
    hosts.check_agreement(config, [videos.test], workdir, checkpoint=path)
    # The weights decide what they are; the settings, how large clips are and how they are computed.
    use = {name: getattr(task.model, name) for name in ("clip_size", "compute")}
    use["position_grid"] = backbone.trained_grid(config, made)
    task = dataclasses.replace(task, model=dataclasses.replace(made, **use))
    if trouble := storage.trouble(storage.at(workdir)):
        raise UserError(f"{trouble}: choose another --workdir")
    recipe = weights.read_recipe(path, hints)
    own = {"stride": task.stride, "test_short": task.test_short}
    for name, value in own.items():
        if recipe.get(name, value) != value:
            key = {"stride": "data.stride"}.get(name, f"detect.{name}")
            report.say(
                f"warning: {path} was trained with {key}={recipe[name]} and is tested with {value}: "
                f"--config.{key}={recipe[name]} tests it as it was trained"
            )
    params: Any = jax.device_get(nnx.to_pure_dict(nnx.state(weights.read(path, hints), nnx.Param)))
    hosts.check_weights(params)
    tester = task.tester(config, videos.test, compute.make_mesh(config), tested_part(videos.test))
    return detections.write(workdir, tester.run(params), config, path)


def open_videos(config: Config) -> Splits:
    """The key frames of a run.

    Raises:
        UserError: no path, or videos without boxes; SourceError: as `scenes.open_scenes`.
    """
    path = config.data.path
    if path == "moving_shapes":
        report.say(
            f"moving scenes: {config.data.generate.videos} training videos, cached in {storage.cache()}"
        )
        try:
            spec = splits.shapes(config.data.generate)
            made = moving_scenes.generate(spec, storage.cache(), processes.usable_cores())
        except ValueError as error:
            raise UserError(f"data.generate: {error}") from None
        path = str(made)
    if not path:
        raise UserError("data.path is empty: name a folder with train.csv, classes.csv and videos/")
    train = scenes.open_scenes(path, "train")
    if scenes.has_part(path, "validation"):
        validation = scenes.open_scenes(path, "validation")
    else:
        train, validation = scenes.hold_out(train)
        report.say(f"{path} has no validation.csv: {len(validation)} key frames of training videos validate")
    test = scenes.open_scenes(path, "test") if scenes.has_part(path, "test") else validation
    span = config.data.frames * config.data.stride
    for source in (train, validation, test):
        if short := source.beyond(span):
            report.say(
                f"{path}: of {short} key frames of {len(source)} the {scenes.CLIP_SECONDS:g} seconds "
                f"stored have fewer frames than the {span} that a clip spans, and the outermost is repeated: "
                f"the videos themselves, unprepared, have all"
            )
        for note in source.notes:
            report.say(note)
    for part in {"validation", tested_part(test)}:  # before any work
        if not detections.countable(validation if part == "validation" else test):
            raise UserError(
                f"{path}: no box of the {part} part counts, as each is of an excluded frame, or of an action "
                f"that scored.csv lacks: there is no mAP of it"
            )
        if file := scenes.detected_file(path, part):
            source = validation if part == "validation" else test
            scenes.detected(source, file, config.detect.threshold)
    return Splits(train, validation, test)


def tested_part(test: Source) -> str:
    """What the key frames that are tested at the end are called in the folder."""
    return "test" if scenes.has_part(test.root, "test") else "validation"


def make(config: Config, train: Source | None, path: str) -> Detect:
    """The task that the settings name; see `task.Make`.

    Raises:
        UserError, ValueError: sizes and settings that do not fit together.
    """
    detect = config.detect
    model = DetectorConfig.from_dict(
        backbone.fields(config)
        | {
            "classes": train.classes if train else ("unknown",),
            "bins": detect.bins,
            "aligned": detect.aligned,
            "head_scale": config.head.scale,
        }
        | backbone.kept(config, path)
    )
    low, high = detect.short
    if not max(config.data.size) <= low <= high:
        raise UserError(
            f"detect.short={low},{high} must not be below data.size={tuple(config.data.size)}, which is cut "
            f"out of such frames, and the second not below the first"
        )
    if config.data.clips_per_video != 1 or config.data.stride == 0:
        raise UserError(
            "task=detect takes one clip around a key: set data.clips_per_video=1, data.stride=1 or more"
        )
    return Detect(
        model=model,
        stride=config.data.stride,
        short=(low, high),
        test_short=detect.test_short,
        boxes=detect.boxes,
        flip=config.augment.flip,
        colours=detect.colours,
        layers=backbone.layers(config, model),
        numbers=train.numbers if isinstance(train, SceneSource) else (),
    )
