"""The published names of a model's tensors, as our parameter tree."""

import re

import numpy as np

_PATHS = [
    (r"mask_token", "decoder/mask_token", lambda w: w.reshape(-1)),
    (r"encoder_to_decoder\.weight", "decoder/project", np.transpose),
    (r"encoder\.patch_embed\.proj\.weight", "encoder/embed/kernel", None),
    (r"encoder\.patch_embed\.proj\.bias", "encoder/embed/bias", None),
    (r"(\w+)\.norm\.weight", r"\1/norm/scale", None),
    (r"(\w+)\.norm\.bias", r"\1/norm/bias", None),
    (r"decoder\.head\.weight", "decoder/head/kernel", np.transpose),
    (r"decoder\.head\.bias", "decoder/head/bias", None),
    (r"fc_norm\.weight", "norm/scale", None),
    (r"fc_norm\.bias", "norm/bias", None),
    (r"head\.weight", "head/kernel", np.transpose),
    (r"head\.bias", "head/bias", None),
]
_BLOCK = {
    "norm1.weight": ("norm1/scale", None),
    "norm1.bias": ("norm1/bias", None),
    "attn.q_bias": ("attention/q_bias", None),
    "attn.v_bias": ("attention/v_bias", None),
    "attn.qkv.weight": ("attention/qkv", lambda w: w.T.reshape(w.shape[1], 3, -1)),
    "attn.proj.weight": ("attention/out/kernel", np.transpose),
    "attn.proj.bias": ("attention/out/bias", None),
    "norm2.weight": ("norm2/scale", None),
    "norm2.bias": ("norm2/bias", None),
    "mlp.fc1.weight": ("fc1/kernel", np.transpose),
    "mlp.fc1.bias": ("fc1/bias", None),
    "mlp.fc2.weight": ("fc2/kernel", np.transpose),
    "mlp.fc2.bias": ("fc2/bias", None),
}


def to_params(tensors: dict[str, np.ndarray]) -> dict:
    """Every tensor of a published model, in our layout; blocks stacked in order."""
    flat: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if name.startswith(("blocks.", "patch_embed.")):  # of a finetuned model
            name = f"encoder.{name}"
        block = re.fullmatch(r"(encoder|decoder)\.blocks\.(\d+)\.(.+)", name)
        if block:
            path, transform = _BLOCK[block[3]]
            layer = transform(tensor) if transform else tensor
            stacks.setdefault(f"{block[1]}/blocks/{path}", {})[int(block[2])] = layer
        elif name == "encoder.patch_embed.proj.weight":
            kernel = tensor.transpose(2, 3, 4, 1, 0)
            flat["encoder/embed/kernel"] = kernel.reshape(-1, kernel.shape[-1])
        else:
            matches = [(p, path, t) for p, path, t in _PATHS if re.fullmatch(p, name)]
            pattern, path, transform = matches[0]
            flat[re.sub(pattern, path, name)] = transform(tensor) if transform else tensor
    flat |= {path: np.stack([s[i] for i in range(len(s))]) for path, s in stacks.items()}
    params: dict = {}
    for path, tensor in flat.items():
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = tensor
    return params
