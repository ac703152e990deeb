"""Several processes, one run: real ones on this machine, talking through `jax.distributed`."""

import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, load_config, mesh_of, task_of
from flax import nnx

import videomae_jax as vm
from videomae_jax import hosts, sharding
from videomae_jax.config import UserError
from videomae_jax.data import prepared
from videomae_jax.training import checkpoint, step, trainer

STEPS, DEVICES = 16, 4


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def start(shapes, tmp_path_factory):
    """Starts the processes of a run, which share four devices; their output goes to files."""
    cache = tmp_path_factory.mktemp("xdg")
    running = []

    def run(workdir, count, *flags, task="pretrain", of_last=(), step_limit=60) -> list[subprocess.Popen]:
        port, started = free_port(), []
        for host in range(count):
            words = [
                *(sys.executable, "-m", "videomae_jax", "train", f"--workdir={workdir}"),
                f"--config={ROOT / 'configs' / 'debug.py'}:data={shapes},task={task}",
                *(f"--config.optim.duration={STEPS}", f"--config.mesh.step_limit={step_limit}"),
                f"--hosts={host}/{count}@localhost:{port}" if count > 1 else "--hosts=auto",
                *flags,
                *(of_last if host == count - 1 else ()),
            ]
            settings = {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
            settings["JAX_NUM_CPU_DEVICES"] = str(DEVICES // count)
            log = workdir.with_name(f"{workdir.name}.{len(running)}.log").open("w+")
            process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **settings})
            process.log = log
            started.append(process)
            running.append(process)
        return started

    yield run
    for process in running:
        process.kill()
        process.wait()
        process.log.close()


def output(process) -> str:
    process.log.seek(0)
    return process.log.read()


def finish(processes, seconds=120) -> list[int]:
    """The exit statuses, once all have ended."""
    end = time.monotonic() + seconds
    return [process.wait(timeout=max(end - time.monotonic(), 1)) for process in processes]


def logged(workdir) -> list[dict]:
    path = workdir / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(processes, workdir, step) -> None:
    while all(process.poll() is None for process in processes) and len(logged(workdir)) < step:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The work folder of a run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    processes = start(workdir, 1)
    assert finish(processes) == [0], output(processes[0])
    return workdir


def assert_same_run(workdir, other) -> None:
    for name in ("step", "loss", "grad_norm", "learning_rate", "clips"):
        found, expected = ([line[name] for line in logged(folder)] for folder in (workdir, other))
        assert len(found) == STEPS
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    params = [nnx.to_pure_dict(nnx.state(vm.load(folder), nnx.Param)) for folder in (workdir, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *params)


@pytest.mark.slow
def test_two_processes_are_one_run(start, alone, tmp_path):
    processes = start(tmp_path / "run", 2)
    assert finish(processes) == [0, 0], output(processes[0]) + output(processes[1])
    assert "on 4 x cpu (data 4) of 2 hosts" in output(processes[0])
    assert_same_run(tmp_path / "run", alone)
    assert (tmp_path / "run" / "reconstruction.gif").exists()
    # Host 0 alone speaks; of the other only what libraries say.
    assert "step 3/16" in output(processes[0])
    assert "step 3/16" not in output(processes[1])


@pytest.mark.slow
def test_pmap_over_two_processes_is_the_same_run(start, alone, tmp_path):
    processes = start(tmp_path / "run", 2, "--config.mesh.mapping=pmap")
    assert finish(processes) == [0, 0], output(processes[0]) + output(processes[1])
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_stopped_killed_and_resumed_on_other_numbers_of_processes(start, alone, tmp_path):
    """SIGTERM to one of 2, kill -9 of one of 4, then one process with another mesh: the same run."""
    workdir = tmp_path / "run"
    processes = start(workdir, 2)
    wait_for_step(processes, workdir, 3)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [0, 0], output(processes[0]) + output(processes[1])
    assert json.loads((workdir / "summary.json").read_text())["interrupted"]
    stopped = len(logged(workdir))
    assert 3 <= stopped < STEPS
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    processes = start(workdir, 4, step_limit=20)
    wait_for_step(processes, workdir, 11)
    processes[2].kill()
    statuses = finish(processes, seconds=60)
    assert 0 not in statuses, statuses
    assert f"resuming from step {stopped}" in output(processes[0])
    assert len(logged(workdir)) < STEPS

    processes = start(workdir, 1, "--config.mesh.fsdp=2", "--config.mesh.tensor=1")
    assert finish(processes) == [0], output(processes[0])
    assert "(data 2 x fsdp 2)" in output(processes[0])
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_fsdp_over_processes_and_finetuning(start, tmp_path):
    """Parts of the state live in other processes: best weights, tests and checkpoints still come out."""
    found = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        processes = start(workdir, count, "--config.mesh.fsdp=4", task="finetune")
        assert finish(processes) == [0] * count, "".join(map(output, processes))
        best = json.loads((workdir / "summary.json").read_text())["test"]["best"]
        found.append({name: best[name] for name in ("top1", "mean_class_accuracy", "loss", "videos")})
        assert (workdir / "predictions.csv").exists()
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    losses = [[line["loss"] for line in logged(tmp_path / str(count))] for count in (1, 2)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.slow
def test_detection_on_two_hosts(start, boxed, tmp_path):
    """The same losses and detections; each host tests its own key frames."""
    for count in (1, 2):
        workdir = tmp_path / str(count)
        processes = start(workdir, count, f"--config.data.path={boxed}", task="detect")
        assert finish(processes) == [0] * count, "".join(map(output, processes))
    losses = [[line["loss"] for line in logged(tmp_path / str(count))] for count in (1, 2)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    rows = [(tmp_path / str(count) / "detections.csv").read_text().splitlines() for count in (1, 2)]
    tables = [np.array([row.split(",")[1:] for row in found], float) for found in rows]
    np.testing.assert_allclose(*tables, atol=2e-5)  # what is written has 5 decimals


@pytest.mark.slow
def test_hosts_that_differ_are_named(start, tmp_path):
    processes = start(tmp_path / "run", 2, of_last=["--config.optim.lr=0.5"])
    assert finish(processes) == [2, 2]
    for process in processes:
        last = [line for line in output(process).splitlines() if line.startswith("videomae_jax:")][-1]
        assert "host 1 has other settings than host 0 (optim.lr: 0.032 -> 0.5)" in last
    other = f"--workdir={tmp_path / 'other'}"
    processes = start(tmp_path / "run", 2, of_last=[other])
    assert finish(processes) == [2, 2]
    assert "of its own: name a --workdir that all hosts share" in output(processes[0])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("code", "abc", "other code .*install the same sources"),
        ("videos", [3, "x"], "other videos.*data.path"),
    ],
)
def test_what_hosts_must_have_alike(shapes, tmp_path, monkeypatch, name, value, text):
    """As host 0 of two sees it, the other with another `name`."""
    source = prepared.open_source(str(shapes), "train")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        hosts, "gather", lambda facts: [facts, {**facts, name: value} if name in facts else facts]
    )
    with pytest.raises(UserError, match=f"host 1 has {text}"):
        hosts.check_agreement(load_config("debug", f"data={shapes}"), [source], tmp_path)


def test_hosts_that_read_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    facts = []
    monkeypatch.setattr(hosts, "gather", lambda value: facts.append(value) or facts[-2:])
    weights = {"b": np.ones((2, 3), "float32"), "a": {"c": np.arange(4)}}
    hosts.check_weights(weights)
    hosts.check_weights({"a": {"c": np.arange(4)}, "b": np.ones((2, 3), "float32")})
    weights["b"][1, 2] += 1e-6
    with pytest.raises(UserError, match=r"host 1 has other weights .*name the same weights everywhere"):
        hosts.check_weights(weights)


def test_a_failure_of_one_host_is_that_of_all(monkeypatch):
    def fail():
        raise UserError("no videos")

    told = []
    monkeypatch.setattr(hosts, "gather", lambda value: [*told, told.append(value) or value])
    with pytest.raises(UserError, match="no videos"):
        hosts.agreed(fail)
    assert told == ["UserError: no videos"]
    with pytest.raises(UserError, match="host 0 stopped: UserError: no videos"):
        hosts.agreed(lambda: 1)
    told.clear()
    assert hosts.agreed(lambda: 1) == 1


def test_one_host_needs_nobody(shapes, tmp_path):
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    hosts.wait("nobody")
    hosts.check_agreement(load_config("debug"), [prepared.open_source(str(shapes), "train")], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_step_beyond_the_limit_ends_the_process():
    script = (
        "import time; from videomae_jax.hosts import Watchdog; w = Watchdog(1); w.beat();"
        "time.sleep(0.6); w.beat(); time.sleep(0.6);\n"
        "with w.paused(): time.sleep(1.5)\n"
        "print('alive', flush=True)\n"
        "def lost_in_a_sum(): time.sleep(60)\n"
        "lost_in_a_sum()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert "lost_in_a_sum" in done.stderr


@pytest.mark.parametrize("form", ["2/2@x:1", "0/2@x", "some", "1@x:1"])
def test_other_forms_of_hosts_are_refused(form):
    with pytest.raises(ValueError, match="I/N@HOST:PORT"):
        sharding.start_hosts(form)


@pytest.mark.parametrize(
    ("surroundings", "starts"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_auto_finds_slurm_and_tpu(surroundings, starts, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: called.append(args))
    sharding.start_hosts("auto")
    assert called == ([()] if starts else [])


def hold(path) -> subprocess.Popen:
    """Another process that holds a lock until it is ended."""
    script = (
        "import pathlib, sys, time\nfrom videomae_jax.hosts import Lock\n"
        "with Lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path, debug_config):
    """The second is refused and names the first; one that was killed is taken over at once."""
    from videomae_jax.tasks import table

    work = tmp_path / "run"
    other = hold(work / ".lock")
    debug_config.optim.update(duration=2, warmup=1)
    try:
        for _ in range(2):
            with pytest.raises(
                UserError, match=rf"process {other.pid} on {socket.gethostname()} works with .*run"
            ):
                table.train(debug_config, work, time.time())
        assert [path.name for path in work.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.communicate()
    assert (work / ".lock").exists()
    assert table.train(debug_config, work, time.time())["step"] == 2
    assert not (work / ".lock").exists()


def test_a_lock_that_another_process_took_is_left_alone(tmp_path, monkeypatch):
    """A process that stood still for long, so that another took over, ends and removes nothing."""
    monkeypatch.setattr(hosts.Lock, "_EVERY", 0.01)
    lost = threading.Event()
    monkeypatch.setattr(hosts.Lock, "_lose", lambda self: lost.set())
    with hosts.Lock(tmp_path / ".lock") as lock:
        lock.path.write_text("another's")
        assert lost.wait(10)
    assert lock.path.read_text() == "another's"


def test_a_stale_lock_is_taken_over_once(tmp_path, monkeypatch):
    """Of two processes that find it stale the slower one does not remove the lock of the faster."""
    path = tmp_path / ".lock"
    path.write_text("{")
    os.utime(path, (time.time() - 1000,) * 2)
    slow, found = hosts.Lock(path), hosts.Lock._set_aside

    def while_another_begins(self):
        monkeypatch.setattr(hosts.Lock, "_set_aside", found)
        fast.__enter__()
        found(self)

    monkeypatch.setattr(hosts.Lock, "_set_aside", while_another_begins)
    fast = hosts.Lock(path)
    with pytest.raises(UserError, match="another process has just begun"):
        slow.__enter__()
    assert path.read_text() == fast._text
    fast.__exit__()
    assert not path.exists()


def test_hosts_stop_together_also_in_a_resumed_run(monkeypatch):
    """JAX waits for the number after the largest one that it was asked; before the first that is 1."""
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    asked: list[int] = []

    def reached(number: int) -> bool:
        asked.append(number)
        return False

    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", reached)
    monkeypatch.setattr(hosts.Interrupt, "_asked", itertools.count(1))
    for _session in range(2):
        with hosts.Interrupt() as interrupt:
            for _step in range(2):
                interrupt.is_due()
    assert asked == [1, 2, 3, 4]


def test_saving_does_not_move_the_number_by_which_hosts_stop(tmp_path, monkeypatch):
    """JAX has one; Orbax would ask with the number of the step, and no later question would be answered."""
    asked: list[int] = []
    monkeypatch.setattr(
        hosts.multihost_utils, "reached_preemption_sync_point", lambda number: bool(asked.append(number))
    )
    config = load_config("debug", "task=pretrain")
    state, _ = step.init_state(trainer.recipe(config, task_of(config)), mesh_of(1), 0)
    with checkpoint.Checkpoints(tmp_path, 1, 0) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
    assert (tmp_path / "checkpoints" / "0").is_dir()
    assert asked == []


@pytest.mark.parametrize(
    ("other", "age", "is_held"),
    [
        ({"host": "elsewhere", "pid": 1, "started": "1"}, 10, True),
        ({"host": "elsewhere", "pid": 1, "started": "1"}, 1000, False),
        (
            {"host": socket.gethostname(), "pid": os.getpid(), "started": "another process with this number"},
            1,
            False,
        ),
        # Another container of this machine, whose processes are not seen from here.
        ({"host": socket.gethostname(), "pid": 1, "started": "1", "space": "pid:[1]"}, 10, True),
        ({"host": socket.gethostname(), "pid": 1, "started": "1", "space": "pid:[1]"}, 1000, False),
        (None, 10, True),  # just being written
        (None, 1000, False),
    ],
)
def test_locks_that_are_stale(tmp_path, other, age, is_held):
    path = tmp_path / "folder" / ".lock"
    path.parent.mkdir()
    path.write_text(json.dumps(other) if other else "{")
    os.utime(path, (time.time() - age,) * 2)
    if is_held:
        with pytest.raises(UserError, match="works with"), hosts.Lock(path):
            pass
        assert path.exists()
    else:
        with hosts.Lock(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()
        assert path.parent.exists()


def test_the_first_number_of_a_process_is_what_jax_begins_with():
    spec = importlib.util.find_spec("videomae_jax.hosts")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert next(fresh.Interrupt._asked) == 1
