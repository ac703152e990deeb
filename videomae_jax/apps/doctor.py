"""The command `doctor`: what this machine has, whether it works, and how to mend what does not.

One line per check: `ok`, `warning` (it will run, but) or `fix` (it will not). Nothing is changed.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from videomae_jax import hardware, hosts, pages, storage
from videomae_jax.data import decode, generated, prepared, processes, reading, scenes
from videomae_jax.models import attention
from videomae_jax.storage import Place

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "av", "numpy")
_SPACE_GIB = 10  # a few ViT-B checkpoints
_MEMORY_GIB = 4
_SAMPLE = 8  # videos to decode


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check says: `status` is "ok", "warning" or "fix"."""

    check: str
    status: str
    text: str


def run(data: str, workdir: str) -> list[Finding]:
    """Every check, printed as it is made.

    Args:
        data: videos to look at, as in `data.path`; "" for none.
        workdir: folder that a run would write.
    """
    checks: list[tuple[str, Callable[[], Iterator[tuple[str, str]]]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("memory", _memory),
        ("matmul", _matmul),
        ("attention", _attention),
        ("decoder", _decoder),
        ("work folder", lambda: _folder(storage.at(workdir))),
        ("hosts", _hosts),
    ]
    if data:
        checks.insert(-1, ("data", lambda: _data(data)))
    findings = []
    for name, check in checks:
        try:
            found = [Finding(name, status, text) for status, text in check()]
        except Exception as error:  # whatever is broken must not hide the rest
            # A user's errors say what there is to do.
            kind = "" if type(error).__module__.startswith("videomae_jax") else f"{type(error).__name__}: "
            found = [Finding(name, "fix", kind + " ".join(str(error).split())[:300])]
        for finding in _of_all_hosts(found):
            if hosts.is_writer():
                print(f"{finding.status:8} {finding.check:12} {finding.text}", flush=True)
            findings.append(finding)
    return findings


def _of_all_hosts(found: list[Finding]) -> list[Finding]:
    """The findings of host 0, and what is wrong on others; the same on every host, all of which ask."""
    return [
        Finding(**fields) if not host else Finding(**fields | {"text": f"host {host}: {fields['text']}"})
        for host, each in enumerate(hosts.gather([vars(finding) for finding in found]))
        for fields in each
        if not host or fields["status"] != "ok"
    ]


def _versions() -> Iterator[tuple[str, str]]:
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield "ok", f"Python {sys.version.split()[0]}, {installed}"


def _devices() -> Iterator[tuple[str, str]]:
    kinds = {device.device_kind for device in jax.devices()}
    yield "ok", f"{jax.device_count()} x {', '.join(sorted(kinds))} ({jax.default_backend()})"
    if jax.default_backend() == "cpu":
        if shutil.which("nvidia-smi"):
            yield "fix", "an NVIDIA driver, but no GPU in JAX: EXTRAS=cuda launch/local.sh doctor installs it"
        elif os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
            yield "fix", "a TPU, but none in JAX: EXTRAS=tpu launch/local.sh doctor installs it"


def _memory() -> Iterator[tuple[str, str]]:
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    if min(limits) > 0:
        yield "ok", f"{min(limits) / 2**30:.0f} GiB per device"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    text = f"{total:.0f} GiB on this host, {free:.0f} free; {processes.usable_cores()} usable cores"
    if slow := pages.trouble():
        yield "warning", f"{slow}; steps on a CPU and decoded clips take a third more time without"
    is_small = total < _MEMORY_GIB
    yield ("warning", f"{text}: use fewer loader processes (data.workers)") if is_small else ("ok", text)


def _seconds(step: Callable[..., Any], *arguments: Any) -> float:
    """Median seconds of a compiled call."""
    jax.block_until_ready(step(*arguments))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _matmul() -> Iterator[tuple[str, str]]:
    is_cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, "float32") if is_cpu else (8192, "bfloat16")
    x = jnp.ones((size, size), dtype)
    rate = 2 * size**3 / _seconds(jax.jit(jnp.matmul), x, x)
    peak = None if is_cpu else hardware.peak_flops(jax.devices()[0].device_kind)
    share = f", {rate / peak:.0%} of the data sheet" if peak else ""
    text = f"{rate / 1e12:.2f} TFLOP/s in {dtype}{share}"
    is_slow = peak is not None and rate < peak / 2
    yield ("warning", f"{text}: is another process on the device?") if is_slow else ("ok", text)


def _attention() -> Iterator[tuple[str, str]]:
    """What there is for this machine, on the 1,568 tokens of ViT-S's decoder, forward and backward."""
    backend = jax.default_backend()
    clips, dtype = (1, "float32") if backend == "cpu" else (64, "bfloat16")
    heads = jnp.ones((clips, 3, 1568, 64), dtype)
    own, plain = attention.best(backend, dtype), attention.best(backend, dtype, kernels=False)
    for kind in dict.fromkeys(("xla", plain, own)):
        total = lambda x, kind=kind: attention.attend(x, x, x, kind).astype(jnp.float32).sum()  # noqa: E731
        try:
            seconds = _seconds(jax.jit(jax.grad(total)), heads)
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:120]
            yield "warning", f"{kind} does not work ({reason}); model.attention=auto uses another"
        else:
            yield "ok", f"{kind}: {1e3 * seconds:.1f} ms for {clips} x 3 heads of 1,568 tokens, both ways"


def _decoder() -> Iterator[tuple[str, str]]:
    frames = np.random.default_rng(0).integers(0, 256, (32, 240, 320, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "probe.mp4")
        decode.write_video(path, frames, 25)
        started = time.perf_counter()
        shape = decode.read_clip(path, range(32)).shape
        seconds = time.perf_counter() - started
    assert shape == frames.shape, shape
    yield "ok", f"H.264 written and read, {1e3 * seconds / 32:.1f} ms per frame of noise, 320 x 240"


def _folder(workdir: Place) -> Iterator[tuple[str, str]]:
    if trouble := storage.trouble(workdir):
        yield "fix", f"{trouble}: choose another --workdir"
        return
    if storage.is_remote(workdir):
        yield "ok", f"{workdir} can be written"
        return
    existing = next(folder for folder in (workdir, *workdir.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free / 2**30
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=existing) as file:
        started = time.perf_counter()
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = 64 / (time.perf_counter() - started)
    text = f"{existing}: {free:.0f} GiB free, {speed:.0f} MiB/s written"
    if free < _SPACE_GIB:
        yield "warning", f"{text}: a run keeps checkpoint.keep_last checkpoints of three times the parameters"
    else:
        yield "ok", text


def _data(path: str) -> Iterator[tuple[str, str]]:
    if path in generated.NAMES:
        yield "ok", f"{path} is generated when it is needed"
        return
    source = (
        scenes.open_scenes(path, "train")
        if scenes.has_boxes(path)
        else prepared.open_source(path, "train", head="")
    )
    text = f"{path}: {len(source)} training videos, {len(source.classes)} classes"
    if prepared.is_prepared(path):
        manifest = prepared.read_manifest(path)
        text += f", prepared; {len(manifest['failed'])} could not be"
    yield "ok", text
    count = min(_SAMPLE, len(source))
    failed, started = [], time.perf_counter()
    for record in (source[i * len(source) // count] for i in range(count)):
        try:
            if record["error"]:
                raise decode.DecodeError(record["error"])
            with reading.open_video(record["video"], record["name"]) as video:
                video.read(range(min(16, video.num_frames)))
        except decode.DecodeError as error:
            failed.append(str(error))
    seconds = (time.perf_counter() - started) / count
    if failed:
        yield "warning", f"{len(failed)} of {count} videos cannot be decoded, the first is {failed[0]}"
    else:
        yield "ok", f"{count} of the videos tried, 16 frames of each: {1e3 * seconds:.0f} ms per video"


def _hosts() -> Iterator[tuple[str, str]]:
    if jax.process_count() == 1:
        yield "ok", "one host"
        return
    hosts.check_same()
    yield "ok", f"{jax.process_count()} hosts agree: code {hosts.code_version()}, versions, devices"
