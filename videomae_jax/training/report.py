"""What a run says: progress bar or lines, log.jsonl, TensorBoard, and the figures behind them."""

import contextlib
import json
import math
import pathlib
import re
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm
from tensorboardX import summary as board_summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from videomae_jax import hardware, storage
from videomae_jax.config import UserError
from videomae_jax.storage import Place
from videomae_jax.training import reference


def write_json(path: Place, data: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; a number that is not finite, which JSON lacks, is null."""
    storage.write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same data with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines(path: pathlib.Path, last_step: int) -> int:
    """Removes the lines of a .jsonl file whose `step` lies beyond `last_step`; returns how many stay.

    They come from a run that was killed after its last checkpoint, and will be written again.
    """
    if not path.exists():
        return 0
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= last_step]
    storage.write_text(path, "".join(line + "\n" for line in kept))
    return len(kept)


def say(text: str) -> None:
    """One line for the user, also while a progress bar is on show; of several hosts, from host 0."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def check_profile(steps: str) -> tuple[int, int]:
    """First and last step of "FIRST:LAST", from 1 on; (0, 0) of "".

    Raises:
        UserError: anything else.
    """
    if not re.fullmatch(r"(\d+:\d+)?", steps):
        raise UserError(f"log.profile={steps!r} is no range of steps: use FIRST:LAST, such as 10:20")
    first, last = (int(x) for x in steps.split(":")) if steps else (0, 0)
    if steps and not 1 <= first <= last:
        raise UserError(f"log.profile={steps!r} is empty: use FIRST:LAST, from 1 on, such as 10:20")
    return first, last


class Profile:
    """A profile of some steps of host 0 in FOLDER/profile, which TensorBoard and xprof open.

    Args:
        steps: see `check_profile`; both are included.
    """

    def __init__(self, folder: pathlib.Path, steps: str):
        self.folder, self._is_on = folder / "profile", False
        self._first, self._last = check_profile(steps)
        if jax.process_index():
            self._last = 0

    def before(self, number: int, results: Any) -> None:
        """Called before step `number` (from 0), with the results of the one before, if any."""
        if self._last and not self._is_on and number + 1 == self._first:
            jax.profiler.start_trace(str(self.folder))
            self._is_on = True
        elif self._is_on and number == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
            say(f"profile from step {self._first} on: tensorboard --logdir={self.folder}")


def memory_gib() -> float:
    """Peak memory of the busiest local device in GiB; of this process where devices do not tell (CPU)."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
    if max(peaks) > 0:
        return max(peaks) / 2**30
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().split("\n") if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


# Made by protobuf at import, so type checkers cannot see them.
_Event, _SessionLog = (getattr(event_pb2, name) for name in ("Event", "SessionLog"))


class _Board:
    """Scalars for TensorBoard, on disk when the call returns.

    Not tensorboardX's own SummaryWriter: on a full disk its thread dies unseen and then blocks the caller.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._write(step=first_step, file_version="brain.Event:2")
        # What an earlier process wrote from here on is superseded.
        self._write(step=first_step, session_log=_SessionLog(status=_SessionLog.START))

    def _write(self, **fields: Any) -> None:
        self._events.write_event(_Event(wall_time=time.time(), **fields))
        self._events.flush()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Writes one point of each curve."""
        points = board_summary.scalar("", 0.0)
        del points.value[:]
        for name, value in values.items():
            points.value.add(tag=name, simple_value=value)
        self._write(step=step, summary=points)

    def close(self) -> None:
        """Ends the file."""
        self._events.close()


class Report:
    """Turns metrics of finished steps into lines; counts time spent waiting for data.

    The log of a resumed run is that of an undisturbed one: see `keep_lines`. Only host 0 writes.

    Args:
        files: those of the work folder that grow.
        every: steps from one logged step to the next.
        batch_size: clips per step, over all hosts.
        flops_per_clip: of the forward and backward pass, for the figures of use.
        dtype: of the matmuls; the use is told as a share of the peak only in bfloat16.
        curves: what lines compare the loss with.
    """

    def __init__(
        self,
        files: storage.Growing,
        start_step: int,
        total_steps: int,
        batch_size: int,
        every: int,
        flops_per_clip: float,
        dtype: str,
        curves: reference.Reference | None = None,
    ):
        self.files, self.path = files, files.folder / "log.jsonl"
        self.total, self.batch_size, self.every = total_steps, batch_size, every
        self._flops, self._peak, self._curves = flops_per_clip, None, curves
        if dtype == "bfloat16":
            self._peak = hardware.peak_flops(jax.local_devices()[0].device_kind)
        self.last: dict[str, Any] = {}
        self._log = self._board = None
        if jax.process_index() == 0:
            keep_lines(self.path, start_step)
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            self.last = json.loads(lines[-1]) if lines else {}
            self._log = self.path.open("a")
            self._board = _Board(files.folder / "tensorboard", start_step + 1)
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=None if self._log else True,  # no bar unless the output is a terminal
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n}/{total} [{remaining} left] {postfix}",
        )
        self._start, self._waited = time.perf_counter(), 0.0
        self._steps, self._window_waited = 0, 0.0
        self._window_start, self._window_steps = self._start, 0
        self._before, self._step_seconds = self._start, []

    def waited(self, seconds: float) -> None:
        """Adds time that the loop spent waiting for a batch."""
        self._waited += seconds
        self._window_waited += seconds

    def exclude(self, seconds: float) -> None:
        """Leaves time that was not training out of every speed."""
        self._start += seconds
        self._window_start += seconds
        self._before += seconds

    def step(self, step: int, metrics: dict[str, Any], validated: dict[str, float]) -> None:
        """Records that step number `step` (from 1) is done, with its metrics as numbers.

        `validated` are the figures of a validation after it, if there was one; such a step is always logged.
        """
        self._steps += 1
        self._window_steps += 1
        self._bar.update()
        now = time.perf_counter()
        is_logged = step % self.every == 0 or step == self.total or bool(validated)
        if self._steps == 1:  # what the first step compiles says nothing about speed
            self._start, self._waited = now, 0.0
            if not is_logged:  # else it is all that its line can tell
                self._window_start, self._window_steps, self._window_waited = now, 0, 0.0
        else:
            self._step_seconds.append(now - self._before)
        self._before = now
        if not is_logged:
            return
        seconds = max(now - self._window_start, 1e-9)
        clips_per_second = self._window_steps * self.batch_size / seconds
        self.last = {
            "step": step,
            **{name: float(value) for name, value in metrics.items()},
            "clips_per_second": clips_per_second,
            **self._use(clips_per_second),
            **self._evenness(),
            "data_wait": self._window_waited / seconds,
            "memory_gib": memory_gib(),
            **validated,
        }
        self._window_start, self._window_steps, self._window_waited = now, 0, 0.0
        self._step_seconds = []
        try:
            self._write(step)
        except OSError as error:
            raise UserError(
                f"the log in {self.files.place} cannot be written ({error.strerror or error}): free some "
                f"space, then run the same command again"
            ) from error
        use = f"  MFU {self.last['mfu']:.1%}" if "mfu" in self.last else ""
        text = (
            f"loss {self.last['loss']:.4f}  lr {self.last['learning_rate']:.2e}  "
            f"{clips_per_second:.1f} clips/s{use}  waiting for data {self.last['data_wait']:.1%}"
        )
        usual = self._curves.at("loss", step) if self._curves else None
        text += "" if usual is None else f"  reference loss {usual:.4f}"
        text += "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in validated.items())
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            speed = self.totals().get("clips_per_second")
            left = f"  {(self.total - step) * self.batch_size / speed:.0f} s left" if speed else ""
            say(f"step {step}/{self.total}  {text}{left}")

    def _use(self, clips_per_second: float) -> dict[str, float]:
        """What each device does; the share of its peak where that is known (MFU)."""
        per_device = clips_per_second / jax.device_count()
        found = {
            "clips_per_second_per_device": per_device,
            "tflops_per_device": per_device * self._flops / 1e12,
        }
        if self._peak:
            found["mfu"] = per_device * self._flops / self._peak
        return found

    def _evenness(self) -> dict[str, float]:
        """Percentiles of the seconds of a step since the last line of the log."""
        seconds = self._step_seconds
        return {f"step_seconds_p{p}": float(np.percentile(seconds, p)) for p in (50, 95, 100) if seconds}

    def _write(self, step: int) -> None:
        if self._log is None or self._board is None:
            return
        # A skipped step's loss is not a number, and NaN is not JSON.
        self._log.write(json.dumps(finite(self.last)) + "\n")
        self._log.flush()
        self._board.scalars({name: value for name, value in self.last.items() if name != "step"}, step)
        self.files.push()

    def totals(self) -> dict[str, float]:
        """Speeds and data_wait (share of time) after the first step of this process, if any."""
        if self._steps < 2:
            return {}
        seconds = max(self._before - self._start, 1e-9)  # to the last step: what ends a run is not its speed
        speed = (self._steps - 1) * self.batch_size / seconds
        return {"clips_per_second": speed, "data_wait": self._waited / seconds, **self._use(speed)}

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.close()
        for file in filter(None, (self._board, self._log)):
            with contextlib.suppress(OSError):  # each line was flushed, and its failure told, at once
                file.close()


def _step_of(line: str) -> int:
    """The step of a log line; a line cut off by a kill counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize


class Phases:
    """Seconds from the start of the process, divided by the phases that ended."""

    def __init__(self, started: float):
        self._last, self.seconds = started, {}

    def end(self, name: str) -> None:
        """The time since the last phase belongs to `name`."""
        now = time.time()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now
