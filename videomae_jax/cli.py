"""The command line: parses flags, runs one command, and turns user errors into one line and status 2."""

import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from videomae_jax import storage

_USAGE = """usage: python -m videomae_jax COMMAND [--flag=value ...]

  train        --config=configs/small.py --workdir=DIR     train any task; resumes by itself
  evaluate     --config=... --workdir=DIR                  multi-view test of a finetuned classifier
  reconstruct  VIDEO --checkpoint=PATH --out=FILE          picture of a masked clip (.gif, .mp4, .png)
  embed        VIDEOS... --checkpoint=PATH --out=FILE      features of windows (.npz, .parquet)
  predict      VIDEOS... --checkpoint=PATH [--out=FILE]    classes by name (.json, .csv, .parquet)
  convert      SRC DST --layout=orbax|hf|official          weights from and to other layouts
  prepare      SRC DST                                     videos to shards that are fast to read; --check
  doctor       --data=PATH --workdir=DIR                   what this machine has, and whether it works
  plan         --config=... --topology=v5e:4x4             compiles for devices that are not there; bounds

COMMAND --help lists its flags; --debug shows the traceback of an error."""


_SPLIT_HELP = "Part of a divided folder: train, validation, test, or all."
_HOSTS_HELP = "Processes of the run: auto, tpu, slurm, or I/N@HOST:PORT (this one is I of N)."


def _train(values: Any, _arguments: list[str], started: float) -> None:
    _compile_cache()
    _start_hosts(values.hosts)
    from videomae_jax.tasks import table

    table.train(values.config, storage.at(values.workdir), started)


def _train_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Settings: FILE.py or FILE.py:name=value,...", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string("hosts", "auto", _HOSTS_HELP, flag_values=values)


def _start_hosts(hosts: str) -> None:
    from videomae_jax import sharding

    try:
        sharding.start_hosts(hosts)
    except ValueError as error:
        raise flags.Error(str(error)) from None
    _find_devices()


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
    number("decoder_num_heads", None, "Heads of the decoder, likewise.", flag_values=values)
    text("clip_size", "", "FRAMES,HEIGHT,WIDTH of a clip, likewise.", flag_values=values)
    text(
        "classes",
        "",
        "Names of the classes, A,B,... or a file with one a line, likewise.",
        flag_values=values,
    )
    help_text = "Frames from one frame of a clip to the next; 0: one of each equal part; default as trained."
    number("stride", None, help_text, flag_values=values)


def _hints(values: Any) -> Any:
    from videomae_jax.interop import weights

    sizes = tuple(int(size) for size in re.findall(r"\d+", values.clip_size))
    if values.clip_size and (len(sizes) != 3 or not re.fullmatch(r"\d+,\d+,\d+", values.clip_size)):
        raise flags.Error(f"--clip_size={values.clip_size} is not understood: use FRAMES,HEIGHT,WIDTH")
    for name in ("num_heads", "decoder_num_heads", "stride"):
        value, least = getattr(values, name), int(name != "stride")
        if value is not None and value < least:
            raise flags.Error(f"--{name}={value} must be at least {least}")
    names = values.classes.split(",") if values.classes else []
    if os.path.isfile(values.classes):
        names = pathlib.Path(values.classes).read_text(encoding="utf-8").splitlines()
    classes = tuple(name.strip() for name in names if name.strip())
    size = (sizes[0], sizes[1], sizes[2]) if sizes else None
    return weights.Hints(values.num_heads, values.decoder_num_heads, size, classes or None, values.stride)


def _evaluate(values: Any, _arguments: list[str], _started: float) -> None:
    _compile_cache()
    _start_hosts(values.hosts)
    from videomae_jax.tasks import evaluate

    evaluate.run(values.config, storage.at(values.workdir), values.checkpoint, _hints(values))


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
    define("mask", "", "tube, random or frame; default as trained.", flag_values=values)
    help_text = "Share of places hidden; default as trained."
    flags.DEFINE_float("mask_ratio", 0.0, help_text, flag_values=values)
    help_text = "Seconds into the video; default: its middle."
    flags.DEFINE_float("start", -1.0, help_text, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the mask.", flag_values=values)
    _hints_flags(values)


def _embed(values: Any, arguments: list[str], _started: float) -> None:
    _compile_cache()
    _find_devices()
    from videomae_jax.apps import embed

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


def _predict(values: Any, arguments: list[str], _started: float) -> None:
    _compile_cache()
    _find_devices()
    from videomae_jax.apps import predict

    def say(row: dict[str, Any]) -> None:
        classes = "  ".join(f"{c['name']} {c['score']:.3f}" for c in row["classes"])
        print(f"{row['id']}: {classes or row['error']}", flush=True)

    names = ("top", "segments", "crops", "split")
    options = predict.Options(**{name: getattr(values, name) for name in names}, hints=_hints(values))
    predict.run(arguments, values.checkpoint, values.out, options, say)


def _predict_flags(values: flags.FlagValues) -> None:
    number = flags.DEFINE_integer
    flags.DEFINE_string("checkpoint", None, "Classifier of any layout.", flag_values=values)
    flags.DEFINE_string("out", "", "File to write too: .json, .csv or .parquet.", flag_values=values)
    flags.DEFINE_string("split", "all", _SPLIT_HELP, flag_values=values)
    _hints_flags(values)
    number("top", 5, "Classes to name.", flag_values=values)
    number("segments", 5, "Clips spread over the video.", flag_values=values)
    number("crops", 3, "Crops of each clip.", flag_values=values)


def _convert(values: Any, arguments: list[str], _started: float) -> None:
    _find_devices()
    from videomae_jax.interop import weights

    source, target = arguments
    how = (values.layout, values.dtype, values.position_resize)
    model = weights.convert(source, target, *how, hints=_hints(values))
    print(f"{target}: {type(model).__name__}, layout {values.layout}, {model.config}")


def _convert_flags(values: flags.FlagValues) -> None:
    help_text = "orbax (ours), hf (a Hugging Face folder) or official (a .safetensors file)."
    flags.DEFINE_string("layout", "orbax", help_text, flag_values=values)
    flags.DEFINE_string("dtype", "float32", "Or float16, bfloat16 (hf, official).", flag_values=values)
    help_text = "Positions for other clip sizes: recompute (published) or interpolate."
    flags.DEFINE_string("position_resize", "recompute", help_text, flag_values=values)
    _hints_flags(values)


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
    text("codec", "h264_intra", "h264_intra, h264_gop, mjpeg or keep.", flag_values=values)
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

    findings = doctor.run(values.data, values.workdir)
    if values.config:
        findings.append(_rehearsed(values))
    if values.out and hosts.is_writer():
        pathlib.Path(values.out).write_text(json.dumps([vars(found) for found in findings], indent=2) + "\n")
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


def _plan_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Settings: FILE.py or FILE.py:name=value,...", flag_values=values
    )
    text = "Devices: v5e:4x4, v6e:2x4, v5p:2x2x1, v4:2x2x2, h100:8, h200:4x8, a100:1, b200:8, cpu:2."
    flags.DEFINE_string("topology", None, text, flag_values=values)
    flags.DEFINE_integer("videos", 0, "Training videos, for a run's length.", flag_values=values)
    flags.DEFINE_integer("num_classes", 400, "Classes of a classifier.", flag_values=values)
    text = "Find the smallest remat and the largest batch that fit: compiles some more."
    flags.DEFINE_bool("fit", False, text, flag_values=values)
    flags.DEFINE_string("out", "plan.json", "JSON file to write.", flag_values=values)


# command: (define its flags, names of its arguments, flags it cannot do without, run it)
_COMMANDS: dict[str, tuple[Callable, Sequence[str], Sequence[str], Callable]] = {
    "train": (_train_flags, (), ("config", "workdir"), _train),
    "evaluate": (_evaluate_flags, (), ("config", "workdir"), _evaluate),
    "embed": (_embed_flags, ("VIDEOS...",), ("checkpoint", "out"), _embed),
    "predict": (_predict_flags, ("VIDEOS...",), ("checkpoint",), _predict),
    "convert": (_convert_flags, ("SRC", "DST"), (), _convert),
    "doctor": (_doctor_flags, (), (), _doctor),
    "plan": (_plan_flags, (), ("config", "topology"), _plan),
    "prepare": (_prepare_flags, ("SRC", "DST"), (), _prepare),
    "reconstruct": (_reconstruct_flags, ("VIDEO",), ("checkpoint", "out"), _reconstruct),
}


def _compile_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.path.join(cache, "videomae_jax", "compiled")
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _user_errors() -> tuple[type[Exception], ...]:
    from videomae_jax.config import UserError
    from videomae_jax.data.decode import DecodeError
    from videomae_jax.data.prepare import PrepareError
    from videomae_jax.data.sources import SourceError
    from videomae_jax.evaluation.classification import OutputError
    from videomae_jax.interop.export import ExportError
    from videomae_jax.interop.torch_file import TorchFileError
    from videomae_jax.interop.torch_weights import WeightsError
    from videomae_jax.interop.transfer import TransferError

    weights = (ExportError, TorchFileError, TransferError, WeightsError)
    return UserError, DecodeError, OutputError, PrepareError, SourceError, *weights


def main(started: float) -> int:
    """Runs the command in `sys.argv`; returns its status: 0, 1 (it failed) or 2 (the user can mend it)."""
    argv = sys.argv  # config_flags reads it too
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0 if len(argv) > 1 else 2
    if argv[1] not in _COMMANDS:
        return _complain(f"unknown command {argv[1]!r}: use {', '.join(_COMMANDS)}")
    define, names, needed, command = _COMMANDS[argv[1]]
    values = flags.FlagValues()
    flags.DEFINE_bool("debug", False, "Show tracebacks.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    define(values)
    if {"--help", "-h"} & set(argv):
        print(f"{_USAGE.splitlines()[0]}\n\n{argv[1]} {' '.join(names)}\n{values.get_help()}")
        return 0
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's global flags
    debug = any(flag in argv for flag in ("--debug", "--debug=true"))
    try:
        _check_config_file(argv)
        arguments = values([argv[0], *argv[2:]])[1:]
        takes_more = bool(names) and names[-1].endswith("...")
        if len(arguments) < len(names) or (len(arguments) > len(names) and not takes_more):
            expected = " ".join(names) or "no argument"
            return _complain(f"{argv[1]} takes {expected}, not {' '.join(arguments) or 'none'}")
        missing = [f"--{name}=..." for name in needed if values[name].value is None]
        if missing:
            return _complain(f"{argv[1]} needs {' and '.join(missing)}; see {argv[1]} --help")
        command(values, arguments, started)
    except KeyboardInterrupt:
        return _complain("interrupted: the same command resumes from the last checkpoint", 130)
    except (flags.Error, *_user_errors()) as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error))
    except Exception as error:
        return _explain(error, debug)
    return 0


def _check_config_file(argv: Sequence[str]) -> None:
    for word in argv:
        if word.startswith("--config="):
            path = word.partition("=")[2].partition(":")[0]
            if not os.path.isfile(path):
                raise flags.Error(f"--config: no file {path}; the configs are in the folder configs")


def _explain(error: Exception, debug: bool) -> int:
    """One line for what is not known to be the user's; config files raise what they like."""
    if debug:
        traceback.print_exc()
        return 1
    frames = traceback.extract_tb(error.__traceback__)
    in_config = any("config_flags" in frame.filename for frame in frames)
    if in_config and isinstance(error, AttributeError | KeyError | TypeError | ValueError | OSError):
        text = error.args[0] if isinstance(error, KeyError) else error
        return _complain(f"--config: {text}")
    if isinstance(error, OSError):
        return _complain(str(error))
    return _complain(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _complain(text: str, status: int = 2) -> int:
    print("videomae_jax: " + " ".join(text.split()), file=sys.stderr)
    return status


def _process_start() -> float:
    """`time.time()` at the start of this process, before its imports; now where that is not known."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.time() - age


def entry() -> None:
    """The console script."""
    status = main(_process_start())
    sys.stdout.flush()
    sys.exit(status)
