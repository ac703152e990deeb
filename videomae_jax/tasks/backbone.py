"""What every method reads of the settings: the model below its head."""

from typing import Any

from videomae_jax.config import Config, UserError
from videomae_jax.interop import weights
from videomae_jax.models import vit


def fields(config: Config) -> dict[str, Any]:
    """The settings that every model shares, as fields of its config, plain data."""
    model = config.model.to_dict()
    del model["decoder"]
    compute = {name: model.pop(name) for name in ("dtype", "unroll", "remat", "attention")}
    return model | {"clip_size": (config.data.frames, *config.data.size), "compute": compute}


def hints(config: Config) -> weights.Hints:
    """What the settings tell of weights whose files do not."""
    encoder = config.model.encoder
    return weights.Hints(heads_by_width={encoder.width: encoder.num_heads})


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
