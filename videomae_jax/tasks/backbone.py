"""What every method reads of the settings: the model below its head."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from videomae_jax.config import Config, UserError
from videomae_jax.interop import export, transfer, weights
from videomae_jax.models import functional, tubelets, vit
from videomae_jax.models.mae import VideoMAEConfig
from videomae_jax.storage import Place
from videomae_jax.training import optim, report


def fields(config: Config) -> dict[str, Any]:
    """The settings that every model shares, as fields of its config, plain data."""
    model = config.model.to_dict()
    del model["decoder"]
    compute = {name: model.pop(name) for name in ("dtype", "unroll", "remat", "attention")}
    return model | {"clip_size": (config.data.frames, *config.data.size), "compute": compute}


def stride(config: Config) -> int:
    """The stride of clips whose motion is learnt from.

    Raises:
        UserError: it is 0.
    """
    if config.data.stride < 1:
        raise UserError("data.stride=0 (one frame of each part) is for finetuning: use at least 1")
    return config.data.stride


def hints(config: Config, given: weights.Hints | None = None) -> weights.Hints:
    """What the settings tell of weights whose files do not, beside what is `given`."""
    heads = {config.model.encoder.width: config.model.encoder.num_heads}
    return dataclasses.replace(given or weights.Hints(), heads_by_width=heads, needs_decoder=False)


def kept(config: Config, path: str) -> dict[str, Any]:
    """The fields of a model that stay with the backbone in `path`; "": none.

    What its position table is interpolated from is the grid of the table that it was trained with.

    Raises:
        UserError, ValueError: no weights, or sizes that do not fit together.
    """
    if not path:
        return {}
    made = weights.read_config(path, hints(config))
    return {"position_grid": trained_grid(config, made), "norm_epsilon": made.norm_epsilon}


def trained_grid(config: Config, made: vit.BackboneConfig) -> tubelets.Grid | None:
    """The grid of the position table that a model was trained with; None: that of the settings."""
    grid = made.grid if made.position_resize == "recompute" else made.position_grid or made.grid
    own = tubelets.grid_of((config.data.frames, *config.data.size), config.model.tubelet)
    return None if grid == own else grid


def computed(config: Config, model: export.Model) -> export.Model:
    """The same model, computed as the settings say."""
    compute = vit.Compute(**fields(config)["compute"])
    graphdef, _ = functional.abstract(type(model), dataclasses.replace(model.config, compute=compute))
    return nnx.merge(graphdef, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def read_teacher(config: Config, kind: type) -> Any:
    """The config of the model in `teacher`, of the kind that a method learns from.

    Raises:
        UserError: there is none, it is another kind of model, or the mesh does not divide its heads.
    """
    if not config.teacher:
        raise UserError(f"task={config.task} learns from a teacher: set --config.teacher=WORKDIR or a file")
    made = weights.read_config(config.teacher, hints(config))
    if not isinstance(made, kind):
        wanted = "pretraining model" if kind is VideoMAEConfig else "classifier"
        raise UserError(f"task={config.task} learns from a {wanted}, and {config.teacher} holds none")
    check_tensor(config, made)
    return made


def check_tensor(config: Config, model: vit.BackboneConfig) -> None:
    """Refuses a mesh whose `tensor` axis does not divide the heads.

    Raises:
        UserError: naming both.
    """
    for name, stack in vars(model).items():
        if isinstance(stack, vit.Stack) and stack.num_heads % config.mesh.tensor:
            raise UserError(
                f"mesh.tensor={config.mesh.tensor} does not divide model.{name}.num_heads={stack.num_heads}: "
                f"each device takes whole heads"
            )


def start(config: Config, model: export.ModelConfig, names: list[str]) -> dict[str, np.ndarray]:
    """What a model takes of `init_from`, by the names of the state; see `transfer.read`.

    Raises:
        UserError: blocks would be frozen that nothing has trained.
    """
    if not config.init_from:
        if config.optim.freeze_blocks:
            raise UserError(
                f"optim.freeze_blocks={config.optim.freeze_blocks} would freeze blocks that nothing has "
                f"trained: set --config.init_from, or optim.freeze_blocks=0"
            )
        return {}
    ours = [name.removeprefix("params/") for name in names if name.startswith("params/")]
    taken = transfer.read(config.init_from, model, ours)
    report.say(f"starting from {config.init_from}: {taken}")
    found: dict[str, Any] = flatten_dict(taken.params, sep="/")
    return {f"params/{name}": value for name, value in found.items()}


def layers(config: Config, model: vit.BackboneConfig) -> optim.Layers:
    """How the learning rates of an adapted model's layers differ.

    Raises:
        UserError: more blocks would be frozen than there are.
    """
    frozen = config.optim.freeze_blocks
    if frozen > model.encoder.depth:
        raise UserError(f"optim.freeze_blocks={frozen} of {model.encoder.depth} blocks: lower it")
    return optim.Layers(config.optim.layer_decay, frozen)


def best_weights(workdir: Place) -> dict[str, Any]:
    """The parameters in WORKDIR/best, a nested dict of NumPy arrays.

    Raises:
        UserError: the run has none.
    """
    if not (workdir / "best").exists():
        raise UserError(
            f"no weights of this run can be tested: its validation was never finite, so there is no "
            f"{workdir / 'best'}: lower optim.lr or set optim.clip_norm, in another --workdir"
        )
    return jax.device_get(nnx.to_pure_dict(nnx.state(export.load(workdir / "best"), nnx.Param)))


def adapted_flops(model: vit.BackboneConfig, frozen: int) -> float:
    """Forward and backward pass of a clip of which every token is visible; see `vit.block_flops`.

    What is frozen is computed once, forward; the gradient costs twice as much again.
    """
    encoder, tokens = model.encoder, math.prod(model.grid)
    embed = 2.0 * tokens * math.prod(model.tubelet) * model.channels * encoder.width
    block = vit.block_flops(encoder, tokens) / encoder.depth
    moving = (embed if not frozen else 0.0) + (encoder.depth - frozen) * block
    return 3 * moving + frozen * block + (embed if frozen else 0.0)
