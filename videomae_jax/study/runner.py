"""Carries out a plan of runs: each an ordinary `train`, several at once, resumable, one line of results."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from videomae_jax import storage
from videomae_jax.config import UserError
from videomae_jax.data import processes

RESULTS = "results.jsonl"
_SPENT = "# session:"  # a line of a run's log


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its folder, and what other runs call it.
        config: file and argument, as of `--config`.
        edits: (key, value), as of `--config.KEY=VALUE`.
        seed: of the run; of what it starts from too.
        start: name of the run whose weights it begins with; "": none.
        teacher: name of the run that it learns from; "": none.
    """

    name: str
    config: str
    edits: tuple[tuple[str, Any], ...]
    seed: int
    start: str = ""
    teacher: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the runs that come before it."""
        return tuple(filter(None, (self.start, self.teacher)))

    @property
    def command(self) -> str:
        """What identifies it: its flags, in a work folder called RUNS."""
        return shlex.join(["train", *self.flags(pathlib.Path("RUNS"))])

    @property
    def file_hash(self) -> str:
        """Of its config file: other settings under the same flags are another run."""
        return _short_hash(pathlib.Path(self.config.partition(":")[0]).read_text())

    def flags(self, workdir: pathlib.Path) -> list[str]:
        """What `train` is called with."""
        edits = [*self.edits, ("seed", self.seed)]
        edits += [("init_from", str(workdir / self.start))] if self.start else []
        edits += [("teacher", str(workdir / self.teacher))] if self.teacher else []
        return [
            f"--config={self.config}",
            *(f"--config.{key}={value}" for key, value in edits),
            f"--workdir={workdir / self.name}",
        ]


def lineage(run: Run, runs: Mapping[str, Run]) -> str:
    """A hash of what a run is, down to those that it needs: other steps of pretraining make another one."""
    return _short_hash([run.command, *(lineage(runs[name], runs) for name in run.needs)])


def trouble(line: Mapping[str, Any], run: Run, runs: Mapping[str, Run]) -> str:
    """Why a line is no result of a run of this plan; "": it is one. Old lines say less of themselves."""
    if line["command"] != run.command:
        return f"is of another plan ({line['command']})"
    if line.get("lineage", lineage(run, runs)) != lineage(run, runs):
        return f"began from another {run.needs[0]} than this plan's"
    return ""


class Results:
    """The lines of results.jsonl, by run; a line is written when its run has ended."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                name = found["run"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(
                    f"{path}:{number} is no result of a run: remove the line, and its run is made again"
                ) from None
            if name in self.lines:
                raise UserError(f"{path}:{number} is a second result of {name}: remove one of the two")
            self.lines[name] = found
        self._writing = threading.Lock()

    def add(self, line: dict[str, Any]) -> None:
        """Keeps a line, whole or not at all."""
        with self._writing:
            self.lines[line["run"]] = line
            storage.write_text(self.path, "".join(json.dumps(kept) + "\n" for kept in self.lines.values()))


def score(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a run that a study compares, by name; accuracies are shares."""
    found = {}
    if summary.get("reconstruction"):
        found["psnr"] = summary["reconstruction"]["psnr_hidden"]
    for kind in ("test", "evaluation"):
        tested = summary.get(kind) or {}
        tested = tested.get("best", tested)
        if "top1" in tested:
            found["top1"] = tested["top1"]
    return found


def code_version() -> str:
    """The commit of this checkout, with "+" where it has been changed since; the release without one."""
    root = pathlib.Path(__file__).parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return metadata.version("videomae_jax")
    return found.stdout.strip() if found.returncode == 0 else metadata.version("videomae_jax")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A share of the machine that one run at a time has; `device` is its kind, in words."""

    device: str
    environment: Mapping[str, str]
    cores: frozenset[int]


def slots(count: int) -> list[Slot]:
    """Divides the machine: by GPUs where JAX finds some, else by cores.

    Args:
        count: runs at once; 0: four on each GPU, which models this small do not fill, or one on each core.
    """
    question = (
        "import jax; d = jax.devices(); print(); print(len(d)); print(d[0].platform); print(d[0].device_kind)"
    )
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise UserError(f"JAX finds no device: {asked.stderr.strip()[-200:] or asked.returncode}")
    devices, backend, kind = asked.stdout.splitlines()[-3:]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if backend == "cpu":
        cores = cores[: processes.usable_cores()]
        count = count or processes.usable_cores()
        kind = f"{processes.usable_cores()} CPU cores"
        return [Slot(kind, {}, frozenset(cores[i::count] or cores)) for i in range(count)]
    if backend == "tpu":  # a process has all of them
        return [Slot(f"{devices} x {kind}", {}, frozenset(cores))]
    count, gpus = count or 4 * int(devices), int(devices)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else list(map(str, range(gpus)))
    share = f"{0.9 / -(-count // gpus):.3f}"
    return [
        Slot(
            f"{gpus} x {kind}",
            {"CUDA_VISIBLE_DEVICES": names[i % gpus], "XLA_PYTHON_CLIENT_MEM_FRACTION": share},
            frozenset(cores[i::count] or cores),
        )
        for i in range(count)
    ]


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """One study of a work folder at a time: two would write over each other's results.

    Raises:
        UserError: another one has it.
    """
    with (workdir / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError:
            raise UserError(f"{workdir} belongs to a study that is running: wait, or end it") from None
        yield


class Runner:
    """Carries out runs in an order that their needs allow.

    Args:
        workdir: folder of all runs, and of results.jsonl.
        scale: kept in every line.
    """

    def __init__(self, workdir: pathlib.Path, scale: str):
        self.workdir, self.scale = workdir, scale
        workdir.mkdir(parents=True, exist_ok=True)
        self.results = Results(workdir / RESULTS)
        self.failed: dict[str, str] = {}
        self._processes: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        self._machine = ""
        self._plan: dict[str, Run] = {}

    def run(self, runs: Sequence[Run], machine: Sequence[Slot]) -> None:
        """Carries out what has no result yet.

        Raises:
            UserError: runs that failed, after all others; naming the log of the first.
        """
        self._plan = {run.name: run for run in runs}
        for run in runs:
            line = self.results.lines.get(run.name)
            if line and (reason := trouble(line, run, self._plan)):
                raise UserError(
                    f"{self.results.path}: {run.name} {reason}: use another --workdir, or remove the lines "
                    f"and folders of it and of what began from it"
                )
            if line and line.get("config_file", run.file_hash) != run.file_hash:
                raise UserError(
                    f"{self.results.path}: {run.name} was made before its config file changed: use another "
                    f"--workdir, or put the old {run.config.partition(':')[0]} back"
                )
        waiting = [run for run in runs if run.name not in self.results.lines]
        self._machine, total = machine[0].device, len(waiting)
        print(f"{len(runs)} runs, {total} to do, {len(machine)} at once", flush=True)
        free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in machine:
            free.put(slot)
        with concurrent.futures.ThreadPoolExecutor(len(machine)) as pool:
            active: dict[concurrent.futures.Future, Run] = {}
            try:
                while waiting or active:
                    for run in [run for run in waiting if self._is_ready(run)][: len(machine) - len(active)]:
                        waiting.remove(run)
                        active[pool.submit(self._carry_out, run, free)] = run
                    if not active:
                        break
                    done, _ = concurrent.futures.wait(active, return_when="FIRST_COMPLETED")
                    for future in done:
                        run = active.pop(future)
                        future.result()
                        place = f"{total - len(waiting) - len(active)}/{total}"
                        left = self._expected(runs, [*waiting, *active.values()]) / len(machine)
                        print(f"{place}  {self._said(run)}  about {left / 60:.0f} min left", flush=True)
            except BaseException:
                self.stop()
                raise
        for run in waiting:
            lacking = [name for name in run.needs if name not in self.results.lines]
            self.failed[run.name] = f"{' and '.join(lacking)} failed"
        if self.failed:
            name, reason = next(iter(self.failed.items()))
            raise UserError(
                f"{len(self.failed)} of {len(runs)} runs failed, first {name}: {reason}; see "
                f"{self.workdir / name}.log; the same command tries them again"
            )

    def _is_ready(self, run: Run) -> bool:
        return all(name in self.results.lines for name in run.needs)

    def stop(self) -> None:
        """Ends the runs that are on; each saves a checkpoint first."""
        self._stopped.set()
        for process in list(self._processes):
            process.terminate()

    def _said(self, run: Run) -> str:
        if run.name in self.failed:
            return f"{run.name}: failed: {self.failed[run.name]}"
        line = self.results.lines[run.name]
        figures = "  ".join(f"{name} {value:.4g}" for name, value in line["figures"].items())
        return f"{run.name}: {figures}  {line['seconds']} s"

    def _expected(self, runs: Sequence[Run], left: Sequence[Run]) -> float:
        """Seconds that runs will take: as long as others of their kind, or as any, took so far."""
        took: dict[str, list[int]] = {}
        for run in runs:
            if run.name in self.results.lines:
                for kind in (_kind(run), ""):
                    took.setdefault(kind, []).append(self.results.lines[run.name]["seconds"])
        return sum((statistics.fmean(took.get(_kind(run)) or took.get("") or [0]) for run in left), 0.0)

    def _carry_out(self, run: Run, free: "queue.SimpleQueue[Slot]") -> None:
        """One run in a process of its own, with a share of the machine."""
        if self._stopped.is_set():
            return
        slot, started, code = free.get(), time.time(), code_version()
        log = self.workdir / f"{run.name}.log"
        try:
            status = self._train(run, slot, log)
        finally:
            free.put(slot)
        try:
            with log.open("a") as out:
                out.write(f"{_SPENT} {time.time() - started:.0f} s\n")
            self._finish(run, status, log, code)
        except (OSError, ValueError, KeyError) as error:  # it ends no other run
            self.failed[run.name] = f"{type(error).__name__}: {error}"

    def _finish(self, run: Run, status: int, log: pathlib.Path, code: str) -> None:
        """Keeps what a run has left, with the seconds of all its sessions, or why it failed."""
        path = self.workdir / run.name / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {"interrupted": True}
        lines = log.read_text().splitlines()
        if status or summary.get("interrupted"):
            said = [line for line in lines if line and not line.startswith(_SPENT)]
            self.failed[run.name] = said[-1] if said else f"exit status {status}"
            return
        seconds = sum(int(line.split()[-2]) for line in lines if line.startswith(_SPENT))
        self.results.add(self._line(run, summary, seconds, code))

    def _train(self, run: Run, slot: Slot, log: pathlib.Path) -> int:
        command = [sys.executable, "-m", "videomae_jax", "train", *run.flags(self.workdir)]
        with log.open("a") as out:
            out.write(f"$ {shlex.join(['launch/local.sh', *command[3:]])}\n")
            out.flush()
            process = subprocess.Popen(
                [sys.executable, "-c", _ON_CORES, ",".join(map(str, sorted(slot.cores))), *command[1:]],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment, "STUDY": str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches it once, by `stop`
            )
            self._processes.add(process)
            if self._stopped.is_set():
                process.terminate()
            try:
                return process.wait()
            finally:
                self._processes.discard(process)

    def _line(self, run: Run, summary: Mapping[str, Any], seconds: int, code: str) -> dict[str, Any]:
        folder = self.workdir / run.name
        about = next(path for name in ("config.json", "probe.json") if (path := folder / name).exists())
        of_run = json.loads(about.read_text())
        # Folders have other names elsewhere.
        of_run["config"] |= {"init_from": run.start, "teacher": run.teacher}
        data = of_run["config"].get("data", {})
        # Names of videos alone are the same for every seed of generated ones.
        of_data = [of_run["data"], data.get("path"), data.get("generate")]
        return {
            "run": run.name,
            "scale": self.scale,
            "seed": run.seed,
            "command": run.command,
            "figures": score(summary),
            "seconds": seconds,
            "config_file": run.file_hash,
            "lineage": lineage(run, self._plan),
            "config_hash": _short_hash(of_run["config"]),
            "data_hash": _short_hash(of_data),
            "code": code,
            "machine": self._machine,
        }


def _kind(run: Run) -> str:
    """Its config, whatever amount of labels it has: they cost nothing."""
    return re.sub(r"labels=\d+", "", run.config)


def _short_hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


# Runs `python ARGUMENTS` on some of the cores: XLA and the loader take as many threads as they may use.
_ON_CORES = """
import os, sys
from videomae_jax.data import processes
processes.die_with_parent(int(os.environ.pop("STUDY")))
if sys.argv[1] and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
