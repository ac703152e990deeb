"""Time of a step against the Hugging Face PyTorch model, in the same run on the same device.

    .venv/bin/python benchmarks/step_time.py --size=small --batch=4          (needs the extra [torch])
    .venv/bin/python benchmarks/step_time.py --size=small --batch=2 --task=finetune
    .venv/bin/python benchmarks/step_time.py --size=base --batch=256 --peers=eager,compiled --attention=cudnn
    .venv/bin/python benchmarks/step_time.py --compile-time                  (compile time by depth; no peer)

All sides do the same work: raw uint8 clips in, 16 x 224 x 224, loss, every gradient, one AdamW update.
Pretraining: tube mask 0.9, normalised target. Finetuning: 400 classes, label smoothing 0.1, all tokens.
Inference: logits of 400 classes. Peers are the model as it is (SDPA attention) and under `torch.compile`;
steps alternate A B C A B C ...; the figure to quote is the median of the ratios of pairs. Prints one table
and one JSON line. On a GPU all compute in bfloat16 (PyTorch by autocast). FLOPs count matmuls only.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from videomae_jax import hardware, keys, sharding
from videomae_jax.models import attention, masking, vit
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.mae import VideoMAEConfig
from videomae_jax.tasks.finetune import Finetune
from videomae_jax.tasks.pretrain import Pretrain
from videomae_jax.training import optim, step

CLIP, CLASSES = (16, 224, 224), 400


def make_task(
    size: vit.Size, dtype: str, unroll: int, name: str, remat: str = "none", attention: str = "xla"
) -> Pretrain | Finetune:
    """The published task of a size."""
    backbone = {
        "clip_size": CLIP,
        "tubelet": (2, size.patch, size.patch),
        "pixel_mean": keys.IMAGENET_MEAN,
        "pixel_std": keys.IMAGENET_STD,
        "encoder": size.encoder,
        "compute": vit.Compute(dtype, unroll, remat, attention),
    }
    if name == "pretrain":
        model = VideoMAEConfig(**backbone, decoder=size.decoder)
        how = {"mask": "tube", "mask_ratio": 0.9, "normalize_target": True, "loss_kind": "mse", "stride": 4}
        return Pretrain(model=model, **how)
    model = ClassifierConfig(**backbone, classes=tuple(map(str, range(CLASSES))))
    plain = {"policy": None, "flip": False, "erasing": 0.0, "area": (1.0, 1.0), "mix": None}
    return Finetune(model, stride=4, **plain, clips_per_video=1, smoothing=0.1, class_weights=None)


def our_step(task: Pretrain | Finetune, video: np.ndarray, is_training: bool):
    """(a function that runs one step and waits for it, seconds to compile it, bytes that it needs)"""
    mesh = sharding.make_mesh(-1, 1, 1)
    rows = len(video)
    fields = {"video": video, "index": np.arange(rows, dtype=np.uint32), "weight": np.ones(rows, np.float32)}
    batch = sharding.global_batch(mesh, fields | {"label": np.arange(rows, dtype=np.int32)})
    if is_training:
        tx = optim.adamw((0.9, 0.95), 1e-8, 0.05, 0.0)
        state, shardings = step.init_state(step.Recipe(task.init, tx), mesh, seed=0)
        lowering = step.make_train_step(task.terms, tx, lambda _: jnp.float32(1e-4), mesh, shardings)
        arguments = (state, batch, jax.random.key(0))
    else:
        assert isinstance(task, Finetune)
        lowering = jax.jit(task.outputs)
        arguments = (sharding.replicate(task.init(jax.random.key(0)), mesh), batch["video"])
    started = time.perf_counter()
    compiled = lowering.lower(*arguments).compile()
    seconds = time.perf_counter() - started
    needs = compiled.memory_analysis()
    total = needs.temp_size_in_bytes + needs.argument_size_in_bytes

    def train() -> float:
        nonlocal arguments
        state, metrics = compiled(*arguments)
        arguments = (state, *arguments[1:])
        return float(metrics["loss"])

    def infer() -> float:
        return float(compiled(*arguments)[0, 0])

    return (train if is_training else infer), seconds, total


def their_step(size: vit.Size, video: np.ndarray, mask: np.ndarray | None, compiled: bool, is_training: bool):
    """The same step of the `transformers` model, of its classifier without a mask; SDPA attention."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, decoder = size.encoder, size.decoder
    sizes = transformers.VideoMAEConfig(
        image_size=CLIP[1],
        patch_size=size.patch,
        num_frames=CLIP[0],
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.num_heads,
        intermediate_size=encoder.mlp_dim,
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=decoder.mlp_dim,
        norm_pix_loss=True,
        use_mean_pooling=True,
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    kinds = (transformers.VideoMAEForVideoClassification, transformers.VideoMAEForPreTraining)
    model = kinds[mask is not None](sizes).to(device).train(is_training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    forward = torch.compile(model) if compiled else model
    raw, labels = torch.from_numpy(video).to(device), torch.arange(len(video), device=device)
    mean, std = (
        torch.tensor(x, device=device)[:, None, None] for x in (keys.IMAGENET_MEAN, keys.IMAGENET_STD)
    )
    hidden = None if mask is None else torch.from_numpy(mask.copy()).to(device)

    @torch.no_grad()
    def infer() -> float:
        pixels = (raw.permute(0, 1, 4, 2, 3).float() / 255 - mean) / std
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return float(forward(pixels).logits[0, 0])

    def train() -> float:
        pixels = (raw.permute(0, 1, 4, 2, 3).float() / 255 - mean) / std
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if hidden is None:
                logits = forward(pixels).logits
                loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
            else:
                loss = forward(pixels, bool_masked_pos=hidden).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return train if is_training else infer


def timed(run) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(arguments: argparse.Namespace) -> None:
    """Prints the table and the JSON line of one size."""
    size, is_training = vit.SIZES[arguments.size], arguments.task != "inference"
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    task = make_task(size, dtype, arguments.unroll, arguments.task, arguments.remat, arguments.attention)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (arguments.batch, *CLIP, 3), dtype=np.uint8)
    mask = None
    if isinstance(task, Pretrain):
        keys = jax.random.split(jax.random.key(0), arguments.batch)
        _, indices = masking.indices(keys, "tube", task.model.grid, 0.9)
        mask = np.asarray(masking.to_mask(indices, math.prod(task.model.grid)))
    ours, compile_seconds, needs = our_step(task, video, is_training)
    sides = {"videomae_jax": ours}
    for peer in filter(None, arguments.peers.split(",")):
        sides[f"PyTorch {peer}"] = their_step(size, video, mask, peer == "compiled", is_training)
    for run in sides.values():
        run(), run()
    rounds = [{name: timed(run) for name, run in sides.items()} for _ in range(arguments.pairs)]
    flops = task.flops_per_clip() * arguments.batch / (1 if is_training else 3)
    device = jax.devices()[0].device_kind
    peak = hardware.peak_flops(device) if dtype == "bfloat16" else None
    result = {
        **{
            name: getattr(arguments, name)
            for name in ("task", "size", "batch", "attention", "remat", "pairs")
        },
        "dtype": dtype,
        "device": device,
        "compile_seconds": compile_seconds,
        "gib": needs / 2**30,
        "sides": {},
    }
    print(f"{'':18}{'s/step':>10}{'clips/s':>10}{'TFLOP/s':>10}{'MFU':>8}{'times as fast':>15}")
    for name in sides:
        seconds = statistics.median(times[name] for times in rounds)
        found = {
            "seconds": seconds,
            "clips_per_second": arguments.batch / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": peak and flops / seconds / peak,
            # How many times as fast as this side ours is.
            "speedup": statistics.median(times[name] / times["videomae_jax"] for times in rounds),
        }
        result["sides"][name] = found
        use = f"{found['mfu']:8.1%}" if found["mfu"] else f"{'-':>8}"
        print(
            f"{name:18}{seconds:10.3f}{found['clips_per_second']:10.2f}{found['tflops']:10.3f}{use}"
            f"{found['speedup']:15.2f}"
        )
    print(json.dumps(result))


def compile_time() -> None:
    """Prints seconds to compile the step of ViT-S by encoder depth; the loop over layers keeps them alike."""
    video = np.zeros((jax.device_count(), *CLIP, 3), np.uint8)
    seconds = {}
    for depth in (4, 8, 24, 32):
        size = vit.SIZES["small"]
        size = dataclasses.replace(size, encoder=dataclasses.replace(size.encoder, depth=depth))
        _, seconds[depth], _ = our_step(make_task(size, "float32", 1, "pretrain"), video, True)
        print(f"depth {depth:3}: {seconds[depth]:6.2f} s")
    ratios = {"24_over_4": seconds[24] / seconds[4], "32_over_8": seconds[32] / seconds[8]}
    print(json.dumps({"compile_seconds": seconds, **ratios}))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="small", choices=["small", "base", "large", "huge"])
    parser.add_argument("--task", default="pretrain", choices=["pretrain", "finetune", "inference"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--remat", default="none", choices=["none", "dots", "full"])
    parser.add_argument("--attention", default="xla", choices=attention.KINDS)
    parser.add_argument("--peers", default="eager", help="eager, compiled, both by a comma, or empty")
    parser.add_argument("--compile-time", action="store_true")
    arguments = parser.parse_args()
    compile_time() if arguments.compile_time else compare(arguments)


if __name__ == "__main__":
    main()
