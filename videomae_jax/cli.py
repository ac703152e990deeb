"""The command line: parses flags, runs one command, and turns user errors into one line and status 2."""

import itertools
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Sequence

from absl import flags

from videomae_jax import pages
from videomae_jax.commands import COMMANDS

_USAGE = """usage: python -m videomae_jax COMMAND [--flag=value ...]

  train        --config=configs/small.py --workdir=DIR     train any task; resumes by itself
  evaluate     --config=... --workdir=DIR                  test of a finetuned classifier, of a detector
  reconstruct  VIDEO --checkpoint=PATH --out=FILE          picture of a masked clip (.gif, .mp4, .png)
  embed        VIDEOS... --checkpoint=PATH --out=FILE      features of windows (.npz, .parquet)
  predict      VIDEOS... --checkpoint=PATH [--out=FILE]    classes by name (.json, .csv, .parquet)
  detect       VIDEO --checkpoint=PATH --out=FILE.mp4      what people do, box by box, drawn into the video
  convert      SRC DST --layout=orbax|hf|official          weights from and to other layouts
  score-detections TRUTH FOUND --classes=FILE --out=FILE   AVA's frame-mAP of files
  prepare      SRC DST                                     videos to shards that are fast to read; --check
  doctor       --data=PATH --workdir=DIR                   what this machine has, and whether it works
  plan         --config=... --topology=v5e:4x4             compiles for devices that are not there; bounds
  study        --scale=smoke|laptop|gpu --workdir=DIR      the paper's questions as runs; docs/evidence.md

COMMAND --help lists its flags; --debug shows the traceback of an error."""


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
    if argv[1] not in COMMANDS:
        return _complain(f"unknown command {argv[1]!r}: use {', '.join(COMMANDS)}")
    define, names, needed, command = COMMANDS[argv[1]]
    values = flags.FlagValues()
    flags.DEFINE_bool("debug", False, "Show tracebacks.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    define(values)
    if {"--help", "-h"} & set(argv):
        print(_help(argv[1], values))
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
        return _complain("interrupted: the same command goes on from what was saved", 130)
    except (flags.Error, *_user_errors()) as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error))
    except Exception as error:
        return _explain(error, debug)
    return 0


def _help(command: str, values: flags.FlagValues) -> str:
    """The command's line of the overview, what it cannot do without, and its flags."""
    _, names, needed, _ = COMMANDS[command]
    about = next(line for line in _USAGE.splitlines() if line.startswith(f"  {command} "))
    wanted = " ".join((*names, *(f"--{name}=..." for name in needed))) or "nothing"
    shown = values.get_help().partition("\nabsl.flags:")[0]
    return f"{about.strip()}\nneeds {wanted}\n{shown}".rstrip()


def _check_config_file(argv: Sequence[str]) -> None:
    named = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    named += [after for word, after in itertools.pairwise(argv) if word == "--config"]
    for path in (name.partition(":")[0] for name in named):
        if not os.path.isfile(path):
            raise flags.Error(f"--config: no file {path}; the configs are in the folder configs")
    edit = next((word for word in argv if word.startswith("--config.")), "")
    if edit and not named:
        raise flags.Error(f"{edit} edits the settings of a file: pass that too, --config=configs/...")


def _explain(error: Exception, debug: bool) -> int:
    """One line for what is not known to be the user's; config files raise what they like."""
    if debug:
        traceback.print_exc()
        return 1
    frames = traceback.extract_tb(error.__traceback__)
    in_config = any("config_flags" in frame.filename for frame in frames)
    if in_config and isinstance(error, AttributeError | KeyError | TypeError | ValueError | OSError):
        text: object = error
        while isinstance(text, AttributeError | KeyError) and text.args:  # an error of an error of a text
            text = text.args[0]
        if unknown := re.fullmatch(r"'?(\w+)'?", str(text)):
            from videomae_jax import config

            text = config.unknown(unknown[1])
        return _complain(f"--config: {text}")
    if isinstance(error, OSError):
        return _complain(str(error))
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return _complain("gs:// needs what the extra gcs installs: EXTRAS=gcs launch/local.sh COMMAND ...")
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
    pages.begin_again()
    status = main(_process_start())
    sys.stdout.flush()
    sys.exit(status)
