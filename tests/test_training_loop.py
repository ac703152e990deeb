"""Training as users have it: killed anywhere, on bad videos, in the wrong folder."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_config, task_of
from flax import nnx

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax import sharding
from videomae_jax.data import pipeline
from videomae_jax.interop import export
from videomae_jax.tasks import table
from videomae_jax.tasks.pretrain import Pretrain
from videomae_jax.training import compute, feed, loop, splits, trainer
from videomae_jax.training.guard import Guard

STEPS = 40


def command(shapes, workdir, *flags) -> list[str]:
    return [
        *(sys.executable, "-m", "videomae_jax", "train", f"--workdir={workdir}"),
        f"--config={ROOT / 'configs' / 'debug.py'}:data={shapes}",
        f"--config.optim.duration={STEPS}",
        *flags,
    ]


@pytest.fixture(scope="module")
def start(shapes, tmp_path_factory):
    """Starts a training process; its output goes to a pipe, its compiled step to a shared cache."""
    cache = tmp_path_factory.mktemp("xdg")
    running = []

    def run(workdir, *flags, kib_per_file="unlimited") -> subprocess.Popen:
        limit = ["bash", "-c", f'ulimit -f {kib_per_file}; exec "$@"', "bash"]
        process = subprocess.Popen(
            limit + command(shapes, workdir, *flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"},
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> pathlib.Path:
    """The work folder of a run without any trouble."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = start(workdir)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return workdir


def wait_for(process, happened) -> None:
    while process.poll() is None and not happened():
        time.sleep(0.002)


def logged(workdir) -> list[dict]:
    path = workdir / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_step(workdir) -> int:
    path = workdir / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def assert_same_run(workdir, other) -> None:
    """Bit for bit: parameters at the end, and every logged loss, norm and rate."""
    params = [nnx.to_pure_dict(nnx.state(vm.load(folder), nnx.Param)) for folder in (workdir, other)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    names = ("step", "loss", "grad_norm", "learning_rate", "clips")
    runs = [[[line[name] for name in names] for line in logged(folder)] for folder in (workdir, other)]
    assert runs[0] == runs[1]
    assert [line[0] for line in runs[0]] == list(range(1, STEPS + 1))


def test_a_run_leaves_what_it_promises(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["step"] == STEPS
    assert set(summary) >= {"loss", "clips_per_second", "data_wait", "bad_videos", "seconds"}
    assert set(summary["reconstruction"]) >= {"psnr_hidden", "psnr_mean", "psnr_nearest_visible"}
    assert set(summary["seconds"]) == {"set-up", "data", "restore", "first step", "steps", "pictures"}
    for name in ("reconstruction.gif", "reconstruction.png", "config.json"):
        assert (undisturbed / name).stat().st_size > 100
    assert list((undisturbed / "tensorboard").glob("events.*"))
    steps = sorted(int(d.name) for d in (undisturbed / "checkpoints").iterdir() if d.name.isdigit())
    assert steps == [STEPS - 5, STEPS]


def test_the_loss_falls(undisturbed):
    losses = [line["loss"] for line in logged(undisturbed)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.02


@pytest.mark.slow
def test_kill_at_several_steps_and_resume(start, undisturbed, tmp_path):
    """kill -9 after steps 3 (before any checkpoint), 13 and 27, then to the end."""
    workdir = tmp_path / "killed"
    for kill_after in (3, 13, 27):
        process = start(workdir)
        wait_for(process, lambda after=kill_after: last_step(workdir) >= after)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert kill_after <= last_step(workdir) < STEPS
    process = start(workdir)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "resuming from step" in output
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_kill_while_a_checkpoint_is_written(start, undisturbed, tmp_path):
    workdir = tmp_path / "killed"
    process = start(workdir)
    unfinished = lambda: list((workdir / "checkpoints").glob("*tmp*"))  # noqa: E731
    wait_for(process, lambda: last_step(workdir) > 8 and unfinished())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    # Whether or not the kill met the save, a checkpoint cut off in the middle must not be taken for one.
    half = workdir / "checkpoints" / "39.orbax-checkpoint-tmp-7"
    half.mkdir()
    (half / "params").mkdir()
    process = start(workdir)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert_same_run(workdir, undisturbed)
    assert not unfinished()


def test_sigterm_saves_and_ends_with_status_0(start, undisturbed, tmp_path):
    workdir = tmp_path / "preempted"
    process = start(workdir, "--config.checkpoint.every=1000")
    wait_for(process, lambda: last_step(workdir) >= 7)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "SIGTERM: saving a checkpoint" in output
    reached = last_step(workdir)
    assert json.loads((workdir / "summary.json").read_text())["interrupted"]
    assert (workdir / "checkpoints" / str(reached)).is_dir()
    output = start(workdir, "--config.checkpoint.every=1000").communicate(timeout=120)[0]
    assert f"resuming from step {reached}" in output
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(start, undisturbed, tmp_path):
    workdir = tmp_path / "full"
    process = start(workdir)
    wait_for(process, lambda: (workdir / "checkpoints" / "10").is_dir())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    process = start(workdir, "--config.checkpoint.keep_last=9", kib_per_file=20)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("videomae_jax: ")]
    assert "checkpoint not saved" in line
    assert "free some space" in line
    output = start(workdir).communicate(timeout=120)[0]
    assert "resuming from step" in output
    assert_same_run(workdir, undisturbed)


def test_resume_of_a_finished_run_changes_nothing(shapes, tmp_path, debug_config):
    debug_config.optim.duration = 6
    first = table.train(debug_config, tmp_path, time.time())
    params = nnx.to_pure_dict(nnx.state(vm.load(tmp_path), nnx.Param))
    again = table.train(debug_config, tmp_path, time.time())
    jax.tree.map(np.testing.assert_array_equal, params, nnx.to_pure_dict(nnx.state(vm.load(tmp_path))))
    assert again == first
    assert len(logged(tmp_path)) == 6
    # A session that was interrupted before the last one: its figures are not those of the run.
    (tmp_path / "summary.json").write_text(json.dumps(first | {"step": 3, "loss": 9.0, "interrupted": True}))
    last = table.train(debug_config, tmp_path, time.time())
    assert (last["step"], last["loss"], last["interrupted"]) == (6, first["loss"], False)


def test_a_disk_too_full_for_the_log_is_one_line_too(start, tmp_path):
    process = start(tmp_path / "full", "--config.checkpoint.every=1000", kib_per_file=3)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert "cannot be written" in output.splitlines()[-1]


@pytest.fixture
def with_a_broken_video(tmp_path) -> pathlib.Path:
    folder = tmp_path / "videos"
    rng = np.random.default_rng(0)
    for i in range(8):
        clips.write(folder / f"{i}.mp4", rng.integers(0, 256, (10, 40, 40, 3), dtype=np.uint8))
    (folder / "broken.mp4").write_bytes(b"nothing")
    return folder


def test_a_bad_video_stops_the_run_by_default(with_a_broken_video, tmp_path):
    c = load_config("debug", f"data={with_a_broken_video}")
    with pytest.raises(settings.UserError) as error:
        table.train(c, tmp_path / "run", time.time())
    text = str(error.value)
    assert "1 of 9 videos cannot be decoded" in text
    assert "broken.mp4" in text
    assert "--config.data.max_bad_fraction=0.12" in text


@pytest.mark.parametrize("clips_of_step", [8, 16])  # of 9 videos: fewer than there are, and more
def test_a_bad_video_is_named_counted_and_left_out(with_a_broken_video, tmp_path, capsys, clips_of_step):
    c = load_config("debug", f"data={with_a_broken_video}")
    c.data.batch_size = clips_of_step
    c.optim.duration, c.data.max_bad_fraction = 6, 0.12
    summary = table.train(c, tmp_path / "run", time.time())
    assert list(summary["bad_videos"]) == ["broken.mp4"]
    output = capsys.readouterr().out
    assert output.count("bad video, trained without it") == 1
    assert "9 videos are too few to hold any out" in output
    lost = sum(clips_of_step - line["clips"] for line in logged(tmp_path / "run"))
    assert 0 <= lost - 6 * clips_of_step // 9 <= 1
    assert summary["bad_held_out_videos"].keys() == {"broken.mp4"}


@pytest.mark.parametrize("epochs", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_what_was_trained_before_videos_went_bad_is_kept(debug_config, tmp_path, monkeypatch, epochs):
    """But not within the first epoch, of which a work folder must be free to begin anew on other videos."""
    look, c = Guard.look, debug_config
    a_while = epochs * 4 + 1
    c.optim.duration, c.checkpoint.every = a_while + 4, 1000

    def less(self, number, *rest):
        return look(self, number, *rest) | ({"clips": 0.0} if number == a_while else {})

    def too_many(_self, _failed, _epoch):
        raise feed.TooManyBadVideos("2 of 8 videos cannot be decoded")

    monkeypatch.setattr(Guard, "look", less)
    monkeypatch.setattr(feed.BadVideos, "count", too_many)
    with pytest.raises(settings.UserError, match="2 of 8 videos"):
        table.train(c, tmp_path, time.time())
    assert export.newest_step(tmp_path / "checkpoints") == (a_while + 2 if epochs else None)
    if epochs:
        monkeypatch.setattr(Guard, "look", look)
        assert table.train(c, tmp_path, time.time())["step"] == a_while + 4


@pytest.mark.slow
def test_real_files(real_videos, tmp_path, capsys):
    """Training on the folder of real files names the corrupted one; it stops by default."""
    c = load_config("debug", f"data={real_videos}")
    c.optim.duration, c.data.held_out = 8, 0
    with pytest.raises(settings.UserError, match=r"corrupted\.mp4.*--config\.data\.max_bad_fraction"):
        table.train(c, tmp_path / "default", time.time())
    c.data.max_bad_fraction = 0.1
    summary = table.train(c, tmp_path / "raised", time.time())
    assert list(summary["bad_videos"]) == ["corrupted.mp4"]
    # At most once in each of 5 epochs: its first 28 frames are whole, and clips from there are used.
    assert 1 <= sum(8 - line["clips"] for line in logged(tmp_path / "raised")) <= 5


def test_a_work_folder_of_another_run_is_refused(shapes, tmp_path, debug_config):
    debug_config.optim.duration = 5
    table.train(debug_config, tmp_path, time.time())
    other = load_config("debug", f"data={shapes}")
    other.optim.update(duration=5, lr=0.5)
    with pytest.raises(settings.UserError, match=r"other settings \(optim.lr: 0.032 -> 0.5\)"):
        table.train(other, tmp_path, time.time())
    fewer = load_config("debug", f"data={shapes / 'validation'}")
    fewer.optim.duration = 5
    fewer.data.path = debug_config.data.path
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"data": "', '"data": "0')
    )
    with pytest.raises(settings.UserError, match="a run on other data"):
        table.train(fewer, tmp_path, time.time())


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["auto", "bfloat16"])
def test_a_run_is_not_resumed_in_another_dtype(tmp_path, debug_config, stored, monkeypatch):
    """What "auto" meant is stored; of older runs it stands beside their weights."""
    monkeypatch.setattr(compute.jax, "default_backend", lambda: "gpu")
    debug_config.optim.update(duration=2, warmup=1)
    debug_config.model.attention = "xla"
    table.train(debug_config, tmp_path, time.time())
    path = tmp_path / "config.json"
    assert json.loads(path.read_text())["config"]["model"]["dtype"] == "bfloat16"
    path.write_text(path.read_text().replace('"dtype": "bfloat16"', f'"dtype": "{stored}"'))
    monkeypatch.undo()
    with pytest.raises(settings.UserError, match=r"other settings \(model.dtype: bfloat16 -> float32\)"):
        table.train(debug_config, tmp_path, time.time())
    debug_config.model.dtype = "bfloat16"
    assert table.train(debug_config, tmp_path, time.time())["step"] == 2


def test_skipped_steps_are_written_down_and_limited(shapes, tmp_path, debug_config, monkeypatch):
    debug_config.optim.max_skipped = 3
    plain = Pretrain.terms

    def broken(*args):
        terms = plain(*args)
        return terms._replace(total=terms.total * jnp.nan)

    monkeypatch.setattr(Pretrain, "terms", broken)
    with pytest.raises(loop.TrainingError, match="3 steps in a row had no usable gradient"):
        table.train(debug_config, tmp_path, time.time())
    lines = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert entries[1]["index"] == list(range(8, 16))
    assert len(entries[1]["videos"]) == 8
    root = jax.random.wrap_key_data(jnp.asarray(entries[1]["root_key"], jnp.uint32))
    assert root == jax.random.key(debug_config.seed)


@pytest.mark.slow
def test_checkpoints_kept(shapes, tmp_path, debug_config):
    debug_config.optim.duration = 12
    debug_config.checkpoint.update(every=2, keep_last=1, keep_every=6)
    table.train(debug_config, tmp_path, time.time())
    kept = {int(d.name) for d in (tmp_path / "checkpoints").iterdir() if d.name.isdigit()}
    assert {6, 12} <= kept
    assert not kept & {2, 4, 8, 10}


def test_a_run_that_saved_nothing_is_begun_anew(shapes, tmp_path, debug_config):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"ste')
    (tmp_path / "best").mkdir()
    debug_config.optim.duration = 4
    table.train(debug_config, tmp_path, time.time())
    assert not (tmp_path / "best").exists()
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]


def test_batches_must_divide_over_the_devices(tmp_path, debug_config):
    debug_config.data.batch_size = 12
    with pytest.raises(settings.UserError, match=r"batch_size=12 does not divide over .* = 8"):
        table.train(debug_config, tmp_path, time.time())


def test_prefetch_hands_over_batches_in_order(shapes, debug_config):
    task = task_of(debug_config)
    source = splits.open_splits(debug_config).train
    dataset = pipeline.clips(source, task.clip_transform, seed=0, batch_size=8)
    ahead = feed.prefetch(dataset, source, 8, sharding.make_mesh(-1, 1, 1), workers=0, threads=1)
    for number in range(4):
        batch, host_fields = next(ahead)
        np.testing.assert_array_equal(host_fields["index"], np.arange(8) + 8 * number)
        expected = [dataset[8 * number + row]["video"][0] for row in range(8)]
        np.testing.assert_array_equal(batch["video"], expected)
        assert set(batch) == {"video", "index", "label", "weight"}
    ahead.close()


def test_a_killed_loader_process_ends_the_run_with_one_line(debug_config):
    """Grain notices the death of a worker (tests/test_data_pipeline.py); the user is told what to do."""

    def dying():
        yield {}
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    iterator = dying()
    assert feed._next(iterator) == {}
    with pytest.raises(feed.TrainingError, match="a loader process was killed, perhaps for want of memory"):
        feed._next(iterator)


def test_nothing_is_compiled_or_fetched_after_the_first_step(tmp_path, debug_config, monkeypatch):
    """Counted at each step; fetched are only the metrics, by name. (A CPU never trips the transfer guard.)"""
    compiled, counts, fetched = [], [], []

    def heard(event, *_args, **_kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def step(self, *args, plain=trainer.report.Report.step):
        counts.append(len(compiled))
        return plain(self, *args)

    def device_get(tree, plain=jax.device_get):
        fetched.append(sorted(tree) if isinstance(tree, dict) else tree)
        return plain(tree)

    monkeypatch.setattr(trainer.report.Report, "step", step)
    monkeypatch.setattr(jax, "device_get", device_get)
    jax.monitoring.register_event_duration_secs_listener(heard)
    debug_config.optim.duration, debug_config.checkpoint.every = 8, 3
    try:
        with jax.transfer_guard_device_to_host("disallow"):
            table.train(debug_config, tmp_path, time.time())
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert counts[0] > 0
    assert counts == [counts[0]] * 8
    assert fetched[:8] == [["clips", "grad_norm", "learning_rate", "loss", "skipped"]] * 8


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mapping": "pmap"}, {"fsdp": 4}, {"tensor": 2}], ids=str)
def test_meshes_train_alike_and_resume_each_other(mesh, tmp_path, debug_config):
    """Half of the run on another mesh: the log is that of a run that never changed it."""
    debug_config.optim.duration, debug_config.checkpoint.every = 10, 5
    debug_config.model.decoder.num_heads = 2
    table.train(debug_config, tmp_path / "plain", time.time())
    debug_config.mesh.update(mesh)
    plain = feed.prefetch

    def stop_after_five(*args, **kwargs):
        batches = plain(*args, **kwargs)
        yield from (next(batches) for _ in range(5))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "prefetch", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            table.train(debug_config, tmp_path / "other", time.time())
    debug_config.mesh = settings.defaults().mesh
    table.train(debug_config, tmp_path / "other", time.time())
    losses = [[line["loss"] for line in logged(tmp_path / name)] for name in ("plain", "other")]
    assert len(losses[1]) == 10
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_results_without_their_checkpoints_are_not_trained_over(shapes, tmp_path):
    config = load_config("debug", f"data={shapes}")
    config.optim.update(duration=2, warmup=0)
    table.train(config, tmp_path, time.time())
    before = (tmp_path / "log.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(settings.UserError, match="results of a run whose checkpoints are gone"):
        table.train(config, tmp_path, time.time())
    assert (tmp_path / "log.jsonl").read_text() == before
