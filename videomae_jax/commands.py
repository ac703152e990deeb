"""The commands: their flags, and what runs them; imports wait until a command needs them."""

import json
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from videomae_jax import storage

_SPLIT_HELP = "Part of a divided folder: train, validation, test, or all."
_CONFIG_HELP = "FILE.py or FILE.py:name=value,...; --config.KEY=VALUE edits a key of videomae_jax/keys.py."
_HOSTS_HELP = "Processes of the run: auto, tpu, slurm, or I/N@HOST:PORT (this one is I of N)."


def _train(values: Any, _arguments: list[str], started: float) -> None:
    _compile_cache()
    _start_hosts(values.hosts)
    from videomae_jax.tasks import table

    table.train(values.config, storage.at(values.workdir), started)


def _train_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string("hosts", "auto", _HOSTS_HELP, flag_values=values)


def _start_hosts(hosts: str) -> None:
    from videomae_jax import sharding

    try:
        sharding.start_hosts(hosts)
    except ValueError as error:
        raise flags.Error(str(error)) from None
    _find_devices()


def _end_at_sigterm() -> None:
    """Takes back JAX's handler, which on several hosts swallows the signal: training alone asks it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _find_devices() -> None:
    """Says in one line what JAX raises in many ways where the devices that are asked for are not there."""
    import jax

    try:
        jax.devices()
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise flags.Error(
            f"JAX finds no device{f' for JAX_PLATFORMS={asked}' if asked else ''} ({reason}): unset it to "
            f"use what there is, or install what is missing with EXTRAS=cuda or EXTRAS=tpu launch/local.sh"
        ) from None


def _hints_flags(values: flags.FlagValues) -> None:
    """What PyTorch files do not tell, on every command that takes weights."""
    number, text = flags.DEFINE_integer, flags.DEFINE_string
    number("num_heads", None, "Heads of the encoder, for files that do not tell.", flag_values=values)
    number("decoder_num_heads", None, "Heads of the decoder, for files that do not tell.", flag_values=values)
    text("clip_size", "", "FRAMES,HEIGHT,WIDTH of a clip, for files that do not tell.", flag_values=values)
    help_text = "Names of the classes, A,B,... or a file with one a line, for files that do not tell."
    text("classes", "", help_text, flag_values=values)


def _stride_flag(values: flags.FlagValues, *, takes_zero: bool) -> None:
    zero = ", 0: one of each equal part" if takes_zero else ""
    help_text = f"Frames from one frame of a clip to the next{zero}; default as trained."
    flags.DEFINE_integer("stride", None, help_text, flag_values=values)


def _hints(values: Any) -> Any:
    from videomae_jax.interop import weights

    sizes = tuple(int(size) for size in re.findall(r"\d+", values.clip_size))
    if values.clip_size and (len(sizes) != 3 or not re.fullmatch(r"\d+,\d+,\d+", values.clip_size)):
        raise flags.Error(f"--clip_size={values.clip_size} is not understood: use FRAMES,HEIGHT,WIDTH")
    stride = values.stride if "stride" in values else None  # where clips are cut
    numbers = {"num_heads": values.num_heads, "decoder_num_heads": values.decoder_num_heads, "stride": stride}
    for name, value in numbers.items():
        least = int(name != "stride")
        if value is not None and value < least:
            raise flags.Error(f"--{name}={value} must be at least {least}")
    names = values.classes.split(",") if values.classes else []
    if os.path.isfile(values.classes):
        names = pathlib.Path(values.classes).read_text(encoding="utf-8-sig").splitlines()
    classes = tuple(name.strip() for name in names if name.strip())
    size = (sizes[0], sizes[1], sizes[2]) if sizes else None
    return weights.Hints(values.num_heads, values.decoder_num_heads, size, classes or None, stride)


def _say_which(checkpoint: str) -> None:
    """Says that a work folder's newest checkpoint is taken, where it has best weights too."""
    if (storage.at(checkpoint) / "best").is_dir():
        best = f"{checkpoint}/best has the weights that were tested"
        print(f"{checkpoint}: its newest checkpoint is taken; {best}", file=sys.stderr, flush=True)


def _evaluate(values: Any, _arguments: list[str], _started: float) -> None:
    _compile_cache()
    _start_hosts(values.hosts)
    from videomae_jax.tasks import table

    _end_at_sigterm()
    table.evaluate_weights(values.config, storage.at(values.workdir), values.checkpoint, _hints(values))


def _evaluate_flags(values: flags.FlagValues) -> None:
    _train_flags(values)
    _hints_flags(values)
    help_text = "Export, checkpoint or work folder; default WORKDIR/best."
    flags.DEFINE_string("checkpoint", "", help_text, flag_values=values)


def _reconstruct(values: Any, arguments: list[str], _started: float) -> None:
    _compile_cache()
    _find_devices()
    from videomae_jax.apps import reconstruct

    names = ("statistics", "mask", "mask_ratio", "start", "seed")
    panels = reconstruct.run(
        arguments[0],
        values.checkpoint,
        values.out,
        **{name: getattr(values, name) for name in names},
        hints=_hints(values),
    )
    figures = "  ".join(f"{name} {value:.2f} dB" for name, value in panels.psnr().items())
    print(f"{values.out}: {panels.statistics} statistics  {figures}")


def _reconstruct_flags(values: flags.FlagValues) -> None:
    define = flags.DEFINE_string
    define("checkpoint", None, "Export, checkpoint or work folder.", flag_values=values)
    define("out", None, "Picture to write: .gif, .mp4 or .png.", flag_values=values)
    help_text = "Mean and contrast of hidden tubelets: true, visible or raw; default by the model."
    define("statistics", "", help_text, flag_values=values)
    define("mask", "", "tube, random, frame or multi_block; default as trained.", flag_values=values)
    help_text = "Share of places hidden; default as trained."
    flags.DEFINE_float("mask_ratio", 0.0, help_text, flag_values=values)
    help_text = "Seconds into the video; default: its middle."
    flags.DEFINE_float("start", -1.0, help_text, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the mask.", flag_values=values)
    _hints_flags(values)
    _stride_flag(values, takes_zero=False)


def _embed(values: Any, arguments: list[str], _started: float) -> None:
    _compile_cache()
    _find_devices()
    from videomae_jax.apps import embed

    _say_which(values.checkpoint)
    names = ("step", "per_token", "batch", "split")
    options = embed.Options(**{name: getattr(values, name) for name in names}, hints=_hints(values))
    summary = embed.run(arguments, values.checkpoint, values.out, options)
    failed = f", {summary['videos_failed']} could not be decoded" if summary["videos_failed"] else ""
    print(f"{values.out}: {summary['windows']} windows of {summary['videos']} videos{failed}")


def _embed_flags(values: flags.FlagValues) -> None:
    number = flags.DEFINE_integer
    flags.DEFINE_string("checkpoint", None, "Weights of any layout.", flag_values=values)
    flags.DEFINE_string("out", None, "File to write: .npz or .parquet.", flag_values=values)
    number("step", 0, "Frames between windows; default: no overlap.", flag_values=values)
    flags.DEFINE_bool("per_token", False, "Every token, not their mean.", flag_values=values)
    number("batch", 8, "Windows at once.", flag_values=values)
    flags.DEFINE_string("split", "all", _SPLIT_HELP, flag_values=values)
    _hints_flags(values)
    _stride_flag(values, takes_zero=False)


def _predict(values: Any, arguments: list[str], _started: float) -> None:
    _compile_cache()
    _find_devices()
    from videomae_jax.apps import predict

    def say(row: dict[str, Any]) -> None:
        classes = "  ".join(f"{c['name']} {c['score']:.3f}" for c in row["classes"])
        text = classes or row["error"].removeprefix(f"{row['id']}: ")
        print(f"{row['id']}: {text}", flush=True)

    _say_which(values.checkpoint)
    names = ("top", "segments", "crops", "split")
    options = predict.Options(**{name: getattr(values, name) for name in names}, hints=_hints(values))
    predict.run(arguments, values.checkpoint, values.out, options, say)


def _predict_flags(values: flags.FlagValues) -> None:
    number = flags.DEFINE_integer
    flags.DEFINE_string("checkpoint", None, "Classifier of any layout.", flag_values=values)
    flags.DEFINE_string("out", "", "File to write too: .json, .csv or .parquet.", flag_values=values)
    flags.DEFINE_string("split", "all", _SPLIT_HELP, flag_values=values)
    _hints_flags(values)
    _stride_flag(values, takes_zero=True)
    number("top", 5, "Classes to name.", flag_values=values)
    number("segments", 5, "Clips spread over the video.", flag_values=values)
    number("crops", 3, "Crops of each clip.", flag_values=values)


def _convert(values: Any, arguments: list[str], _started: float) -> None:
    _find_devices()
    from videomae_jax.interop import weights

    source, target = arguments
    _say_which(source)
    how = (values.layout, values.dtype, values.position_resize)
    model = weights.convert(source, target, *how, hints=_hints(values))
    config = model.config
    classes = getattr(config, "classes", ())
    of = f" of {len(classes)} classes" if classes else ""
    clip = " x ".join(map(str, config.clip_size))
    print(
        f"{target}: {type(model).__name__}{of}, layout {values.layout}, encoder {config.encoder.width} x "
        f"{config.encoder.depth}, {config.encoder.num_heads} heads, clips of {clip}"
    )
    stride = weights.read_recipe(source, _hints(values)).get("stride")
    if values.layout == "official" and stride not in (None, weights.published_stride(model.config)):
        print(f"warning: {target} cannot tell how frames are sampled: pass --stride={stride} with it")


def _convert_flags(values: flags.FlagValues) -> None:
    help_text = "orbax (ours), hf (a Hugging Face folder) or official (a .safetensors file)."
    flags.DEFINE_string("layout", "orbax", help_text, flag_values=values)
    flags.DEFINE_string("dtype", "float32", "Or float16, bfloat16 (hf, official).", flag_values=values)
    help_text = "Positions for other clip sizes, recompute or interpolate; default as published."
    flags.DEFINE_string("position_resize", None, help_text, flag_values=values)
    _hints_flags(values)
    _stride_flag(values, takes_zero=True)


def _prepare(values: Any, arguments: list[str], _started: float) -> None:
    from videomae_jax.apps import prepare

    names = ("dataset", "videos", "codec", "short_side", "shard_videos", "processes", "part")
    names += ("head", "finish", "check", "allow_missing", "max_failed", "retry_failed", "beam_options")
    source, folder = arguments
    prepare.run(source, folder, prepare.Options(**{name: getattr(values, name) for name in names}))


def _prepare_flags(values: flags.FlagValues) -> None:
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
    text("dataset", "video_folder", "Known data set whose annotations SRC holds.", flag_values=values)
    text("videos", "", "Folder of the videos that annotations name; default SRC.", flag_values=values)
    text("codec", "jpeg", "jpeg, h264_intra, h264_gop, mjpeg or keep.", flag_values=values)
    number("short_side", 256, "Larger frames are shrunk to it, pixels.", flag_values=values)
    number("shard_videos", 256, "Videos per shard.", flag_values=values)
    number("processes", 0, "Encoders; default: the usable cores.", flag_values=values)
    text("head", "softmax", "What labels of a list are: softmax, multilabel, regression.", flag_values=values)
    text("part", "", "I/N: only every N-th shard from the I-th (from 0) on.", flag_values=values)
    switch("finish", False, "After all parts: write the manifest.", flag_values=values)
    switch("check", False, "Read DST (SRC is its source) again; write nothing.", flag_values=values)
    switch("allow_missing", False, "Go on without videos that are absent.", flag_values=values)
    help_text = "Share of the videos that may be left out; above it the work does not end."
    flags.DEFINE_float("max_failed", 0.1, help_text, flag_values=values)
    switch("retry_failed", False, "Try again what could not be decoded.", flag_values=values)
    text("beam_options", "", "Run as an Apache Beam pipeline with these options.", flag_values=values)


def _doctor(values: Any, _arguments: list[str], _started: float) -> None:
    _start_hosts(values.hosts)
    from videomae_jax import hosts
    from videomae_jax.apps import doctor
    from videomae_jax.config import UserError

    _end_at_sigterm()
    findings = doctor.run(values.data, values.workdir)
    if values.config:
        findings.append(_rehearsed(values))
    if values.out and hosts.is_writer():
        text = json.dumps([vars(found) for found in findings], indent=2) + "\n"
        storage.write_text(storage.at(values.out), text)
    broken = [found.check for found in findings if found.status == "fix"]
    if broken:
        raise UserError(f"doctor: {', '.join(broken)} must be mended, see above")


def _rehearsed(values: Any) -> Any:
    """Ten steps of a run, as a finding."""
    from videomae_jax.apps import doctor
    from videomae_jax.tasks import table
    from videomae_jax.training import rehearse

    found = rehearse.run(values.config, table.make_task, values.num_classes)
    print(f"{'ok':8} {'steps':12} {found['text']}\nfor docs/performance.md: {found['row']}", flush=True)
    return doctor.Finding("steps", "ok", found["text"])


def _doctor_flags(values: flags.FlagValues) -> None:
    text = "Ten steps of this run too, on clips that mean nothing: speed, and distance from the bound."
    config_flags.DEFINE_config_file("config", None, text, flag_values=values)
    flags.DEFINE_integer("num_classes", 400, "Classes of a classifier.", flag_values=values)
    flags.DEFINE_string("data", "", "Videos to look at, as in data.path.", flag_values=values)
    flags.DEFINE_string("workdir", ".", "Folder that a run would write.", flag_values=values)
    flags.DEFINE_string("out", "", "JSON file to write too.", flag_values=values)
    flags.DEFINE_string("hosts", "auto", _HOSTS_HELP, flag_values=values)


def _plan(values: Any, _arguments: list[str], _started: float) -> None:
    from videomae_jax.tasks import table
    from videomae_jax.training import ahead, plan, report

    ahead.without_devices()
    found = plan.run(
        values.config,
        table.make_task,
        ahead.topology(values.topology),
        videos=values.videos,
        classes=values.num_classes,
        fit=values.fit,
    )
    report.write_json(storage.at(values.out), found)


def _study(values: Any, _arguments: list[str], _started: float) -> None:
    from videomae_jax.study import carry_out

    if values.processes < 0:
        raise flags.Error(f"--processes={values.processes} must be 0 or more")
    if values.report is not None:
        if storage.is_remote(values.out):
            raise flags.Error(f"--out={values.out}: a report is written on this machine")
        carry_out.show(values.report, values.out)
    elif values.workdir is not None and storage.is_remote(values.workdir):
        raise flags.Error(f"--workdir={values.workdir}: a study's folder is of this machine")
    elif values.workdir is None:
        raise flags.Error("study needs --workdir=... to run, or --report=WORKDIR to report")
    else:
        carry_out.run(values.scale, pathlib.Path(values.workdir), values.processes)


def _study_flags(values: flags.FlagValues) -> None:
    text = flags.DEFINE_string
    text("scale", "laptop", "smoke (minutes), laptop (two cores, hours) or gpu.", flag_values=values)
    text("workdir", None, "Folder of all runs.", flag_values=values)
    text("report", None, "Report what this work folder or results file has; run nothing.", flag_values=values)
    text("out", "docs", "Folder that --report writes evidence.md into.", flag_values=values)
    help_text = "Runs at once; 0: one for each core, or four for each GPU."
    flags.DEFINE_integer("processes", 0, help_text, flag_values=values)


def _plan_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, flag_values=values)
    text = "Devices: v5e:4x4, v6e:2x4, v5p:2x2x1, v4:2x2x2, h100:8, h200:4x8, a100:1, b200:8, cpu:2."
    flags.DEFINE_string("topology", None, text, flag_values=values)
    flags.DEFINE_integer("videos", 0, "Training videos, for a run's length.", flag_values=values)
    flags.DEFINE_integer("num_classes", 400, "Classes of a classifier.", flag_values=values)
    text = "Find the smallest remat and the largest batch that fit: compiles some more."
    flags.DEFINE_bool("fit", False, text, flag_values=values)
    flags.DEFINE_string("out", "plan.json", "JSON file to write.", flag_values=values)


def _score_detections(values: Any, arguments: list[str], _started: float) -> None:
    from videomae_jax.apps import score_detections

    truth, found = arguments
    score_detections.run(truth, found, values.classes, values.excluded, values.out)


def _score_detections_flags(values: flags.FlagValues) -> None:
    text = flags.DEFINE_string
    text("classes", None, "List of the classes that count: AVA's .pbtxt, or number,name.", flag_values=values)
    text("excluded", "", "CSV of video,time: frames to leave out.", flag_values=values)
    text("out", None, "JSON file to write.", flag_values=values)


def _detect(values: Any, arguments: list[str], _started: float) -> None:
    _compile_cache()
    _find_devices()
    from videomae_jax.apps import detect

    _say_which(values.checkpoint)
    names = ("boxes", "every", "top", "least", "threshold")
    options = detect.Options(**{name: getattr(values, name) for name in names})
    detect.run(arguments[0], values.checkpoint, values.out, options, _hints(values))


def _detect_flags(values: flags.FlagValues) -> None:
    text, number = flags.DEFINE_string, flags.DEFINE_float
    text("checkpoint", None, "Detector of any layout.", flag_values=values)
    boxes = "whole, people (OpenCV), torchvision, onnx:FILE (as YOLO), or a CSV of video,time,corners."
    text("boxes", "people", boxes, flag_values=values)
    text("out", None, "Video to write, .mp4; the same as .json beside it.", flag_values=values)
    number("every", 1.0, "Seconds from one key frame to the next.", flag_values=values)
    flags.DEFINE_integer("top", 3, "Actions to name, of each box.", flag_values=values)
    number("least", 0.2, "Score that an action must have to be drawn.", flag_values=values)
    number("threshold", 0.4, "Least score of a box of torchvision or onnx:FILE.", flag_values=values)
    _hints_flags(values)


# command: (define its flags, names of its arguments, flags it cannot do without, run it)
COMMANDS: dict[str, tuple[Callable, Sequence[str], Sequence[str], Callable]] = {
    "train": (_train_flags, (), ("config", "workdir"), _train),
    "evaluate": (_evaluate_flags, (), ("config", "workdir"), _evaluate),
    "embed": (_embed_flags, ("VIDEOS...",), ("checkpoint", "out"), _embed),
    "predict": (_predict_flags, ("VIDEOS...",), ("checkpoint",), _predict),
    "convert": (_convert_flags, ("SRC", "DST"), (), _convert),
    "detect": (_detect_flags, ("VIDEO",), ("checkpoint", "out"), _detect),
    "doctor": (_doctor_flags, (), (), _doctor),
    "plan": (_plan_flags, (), ("config", "topology"), _plan),
    "prepare": (_prepare_flags, ("SRC", "DST"), (), _prepare),
    "score-detections": (
        _score_detections_flags,
        ("GROUNDTRUTH", "DETECTIONS"),
        ("classes", "out"),
        _score_detections,
    ),
    "study": (_study_flags, (), (), _study),
    "reconstruct": (_reconstruct_flags, ("VIDEO",), ("checkpoint", "out"), _reconstruct),
}


def _compile_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(storage.cache() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
