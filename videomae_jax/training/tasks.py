"""From settings to a task: what is trained, and whether the settings fit together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from videomae_jax import sharding
from videomae_jax.config import Config, UserError
from videomae_jax.data import randaugment
from videomae_jax.data.sources import Source
from videomae_jax.evaluation import reconstruction
from videomae_jax.interop import weights as stored
from videomae_jax.models import attention, masking, tubelets
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.mae import VideoMAEConfig
from videomae_jax.training import losses, report
from videomae_jax.training.finetune import Finetune
from videomae_jax.training.mixup import Mix
from videomae_jax.training.pretrain import Pretrain

Task = Pretrain | Finetune


def make_task(config: Config, train: Source | None = None, weights: str = "") -> Task:
    """The task that a config names.

    Args:
        train: the training videos, which name a classifier's classes; None where only the settings are
            checked.
        weights: export, checkpoint or work folder whose backbone is taken; "" for a fresh one.

    Raises:
        UserError: sizes and settings that do not fit together.
    """
    try:
        task = _pretrain(config) if config.task == "pretrain" else _finetune(config, train, weights)
    except ValueError as error:
        raise UserError(str(error)) from None
    for name in ("encoder", "decoder"):
        stack = getattr(task.model, name, None)
        if stack and stack.num_heads % config.mesh.tensor:
            raise UserError(
                f"mesh.tensor={config.mesh.tensor} does not divide model.{name}.num_heads={stack.num_heads}: "
                f"each device takes whole heads"
            )
    return task


def with_dtype(config: Config) -> Config:
    """The settings with the dtype that "auto" means here, so that a run's own say what it was computed in."""
    if config.model.dtype != "auto":
        return config
    config = config.copy_and_resolve_references()
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config


def hints_of(config: Config) -> stored.Hints:
    """What the settings tell of weights whose files do not."""
    encoder = config.model.encoder
    return stored.Hints(heads_by_width={encoder.width: encoder.num_heads})


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh that the settings ask for.

    Raises:
        UserError: it does not use every device, or asks for what `mesh.mapping` or a host cannot do.
    """
    sizes = config.mesh
    if sizes.mapping not in ("jit", "pmap"):
        raise UserError(f"mesh.mapping={sizes.mapping!r} is unknown: use jit or pmap")
    if sizes.mapping == "pmap" and (sizes.fsdp * sizes.tensor > 1 or jax.process_count() > 1):
        raise UserError(
            "mesh.mapping=pmap gives each device of one host a whole copy of the state: with mesh.fsdp, "
            "mesh.tensor or several hosts use --config.mesh.mapping=jit"
        )
    if jax.local_device_count() % sizes.tensor:
        raise UserError(
            f"mesh.tensor={sizes.tensor} does not divide the {jax.local_device_count()} devices of a host: "
            f"a clip's devices must share a host"
        )
    try:
        return sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    except ValueError as error:
        raise UserError(str(error)) from None


def backbone(config: Config) -> dict[str, Any]:
    """The settings that every model shares, as fields of its config, plain data."""
    model = with_dtype(config).model.to_dict()
    del model["decoder"]
    compute = {name: model.pop(name) for name in ("dtype", "unroll", "remat", "attention")}
    widths = {stack["width"] // stack["num_heads"] for stack in (model["encoder"], config.model.decoder)}
    compute["attention"] = _attention(compute["attention"], compute["dtype"], tuple(sorted(widths)))
    return model | {"clip_size": (config.data.frames, *config.data.size), "compute": compute}


@functools.cache
def _attention(wanted: str, dtype: str, head_widths: tuple[int, ...]) -> str:
    """What `model.attention` means on this machine: "auto" tries the fused kernel of a GPU, both ways."""
    if wanted not in ("auto", "cudnn"):
        return wanted
    if wanted == "auto" and jax.default_backend() == "cpu":
        return "blocks"
    if wanted == "auto" and (jax.default_backend() != "gpu" or dtype == "float32"):
        return "xla"

    def probe(x: jax.Array) -> jax.Array:
        return attention.attend(x, x, x, "cudnn").astype(jnp.float32).sum()

    try:
        for width in head_widths:
            heads = jnp.zeros((2, 2, 160, width), dtype)
            jax.block_until_ready(jax.jit(jax.grad(probe))(heads))
    except Exception as error:  # compilers and drivers raise what they like
        reason = str(error).strip().split("\n")[0][:200]
        if wanted == "cudnn":
            raise UserError(
                f"model.attention=cudnn does not work here with {dtype} ({reason}): set it to auto or xla"
            ) from None
        report.say(f"model.attention=auto: the fused kernel does not work here, using xla ({reason})")
        return "xla"
    return "cudnn"


def _pretrain(config: Config) -> Pretrain:
    if config.data.stride < 1:
        raise UserError("data.stride=0 (one frame of each part) is for finetuning: use at least 1")
    if config.init_from:
        raise UserError("init_from is for finetuning and probes: pretraining starts from nothing")
    task = Pretrain(
        model=VideoMAEConfig.from_dict(backbone(config) | {"decoder": config.model.decoder.to_dict()}),
        mask=config.mask.kind,
        mask_ratio=config.mask.ratio,
        normalize_target=config.loss.normalize_target,
        loss_kind=config.loss.kind,
        stride=config.data.stride,
        clips_per_video=config.data.clips_per_video,
    )
    masking.counts(task.mask, task.model.grid, task.mask_ratio)
    if task.loss_kind not in tubelets.LOSSES:
        raise UserError(f"loss.kind={task.loss_kind!r} is unknown: use {', '.join(tubelets.LOSSES)}")
    if config.log.statistics not in reconstruction.STATISTICS:
        modes = ", ".join(reconstruction.STATISTICS)
        raise UserError(f"log.statistics={config.log.statistics} is unknown: use {modes}")
    if config.log.statistics != "raw" and not task.normalize_target:
        raise UserError(
            f"log.statistics={config.log.statistics} is for normalised targets: with "
            f"loss.normalize_target=False set --config.log.statistics=raw"
        )
    return task


def _finetune(config: Config, train: Source | None, weights: str) -> Finetune:
    head, augment, loss = config.head, config.augment, config.loss
    made = stored.read_config(weights, hints_of(config)) if weights else None
    model = ClassifierConfig.from_dict(
        backbone(config)
        | {
            "classes": train.classes if train else ("unknown",),
            "head": head.kind,
            "pooling": head.pooling,
            "head_dropout": head.dropout,
            "head_scale": head.scale,
        }
        # What a backbone was made with stays with it.
        | (
            {"position_grid": made.position_grid or made.grid, "norm_epsilon": made.norm_epsilon}
            if made
            else {}
        )
    )
    if model.position_grid == model.grid:
        model = dataclasses.replace(model, position_grid=None)
    if config.optim.freeze_blocks > model.encoder.depth:
        raise UserError(
            f"optim.freeze_blocks={config.optim.freeze_blocks} of {model.encoder.depth} blocks: lower it"
        )
    mix = Mix(augment.mixup, augment.cutmix, augment.mix_probability, augment.mix_switch)
    is_mixed = mix.is_active and head.kind == "softmax" and not config.debug.overfit
    _check_mix(config, mix, is_mixed)
    if loss.class_weights not in ("none", "balanced"):
        raise UserError(f"loss.class_weights={loss.class_weights!r} is unknown: use none or balanced")
    weights_of_classes = None
    if loss.class_weights == "balanced":
        if head.kind != "softmax":
            raise UserError("loss.class_weights=balanced is for head.kind=softmax: set it to none")
        if train:
            weights_of_classes = losses.balanced_weights(
                [train.labels.count(label) for label in range(len(train.classes))]
            )
    return Finetune(
        model=model,
        stride=config.data.stride,
        policy=randaugment.parse(augment.policy) if augment.policy else None,
        flip=augment.flip,
        erasing=augment.erasing,
        area=tuple(augment.area),
        clips_per_video=config.data.clips_per_video,
        mix=mix if is_mixed else None,
        smoothing=loss.smoothing,
        class_weights=weights_of_classes,
        frozen=config.optim.freeze_blocks,
        by_heart=config.debug.overfit > 0,
    )


def _check_mix(config: Config, mix: Mix, is_mixed: bool) -> None:
    if mix.is_active and config.head.kind != "softmax":
        raise UserError(
            f"augment.mixup and cutmix mix classes and are not for head.kind={config.head.kind}: set "
            f"--config.augment.mixup=0 --config.augment.cutmix=0"
        )
    if is_mixed and config.data.batch_size % 2:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is odd, and mixup pairs clips: make it even, or set "
            f"--config.augment.mix_probability=0"
        )
