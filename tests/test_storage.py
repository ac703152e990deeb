"""Work folders, exports and outputs in gs://: the same as on a disk, without appending or renaming."""

import json
import shutil
import time

import clips
import jax
import numpy as np
import pytest
from conftest import load_config
from etils import epath
from flax import nnx

import videomae_jax as vm
from videomae_jax import hosts, storage
from videomae_jax.apps import embed, predict, reconstruct
from videomae_jax.config import UserError
from videomae_jax.data import prepare, prepared, transcode
from videomae_jax.data.collection import Collection, Entry
from videomae_jax.interop import weights
from videomae_jax.tasks import evaluate, table
from videomae_jax.training import report

NAMES = ("step", "loss", "grad_norm", "learning_rate", "validation_top1", "validation_loss")


def run(config, place):
    return table.train(config, storage.at(place), time.time())


def params_of(path):
    return nnx.to_pure_dict(nnx.state(vm.load(path), nnx.Param))


def figures(log: str) -> list[list]:
    return [[json.loads(line).get(name) for name in NAMES] for line in log.splitlines()]


def dies_after(patch, stop):
    """Ends the process's run after a step, as a kill does: nothing is written on the way out."""
    plain = report.Report.step

    def dying(self, step, metrics, validated):
        plain(self, step, metrics, validated)
        if step == stop:
            patch.setattr(storage.Growing, "push", lambda *_, **__: None)
            raise KeyboardInterrupt

    patch.setattr(report.Report, "step", dying)


@pytest.fixture(scope="module")
def finetuned(shapes, endpoint, tmp_path_factory):
    """The same finetuning run on a disk and, killed once, in the store; (local folder, URL)."""

    def config():
        c = load_config("debug", f"data={shapes},task=finetune")
        c.optim.update(duration=12, ema=0.9)
        return c

    local, url = tmp_path_factory.mktemp("runs") / "run", "gs://bucket/runs/run"
    summary = run(config(), local)
    with pytest.MonkeyPatch.context() as patch:
        dies_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            run(config(), url)
    again = run(config(), url)
    assert (again["best"], again["test"]) == (summary["best"], summary["test"])
    return local, url


@pytest.mark.slow
def test_a_run_in_a_store_is_the_run_on_a_disk(finetuned, bucket):
    local, url = finetuned
    for part in ("", "best"):
        jax.tree.map(np.testing.assert_array_equal, params_of(f"{url}/{part}"), params_of(local / part))
    remote = bucket / "runs/run"
    assert figures((remote / "log.jsonl").read_text()) == figures((local / "log.jsonl").read_text())
    assert len(figures((local / "log.jsonl").read_text())) == 12
    for name in ("config.json", "summary.json", "evaluation.json", "predictions.csv", "confusion.png"):
        assert (remote / name).stat().st_size > 100
    assert (remote / "predictions.csv").read_bytes() == (local / "predictions.csv").read_bytes()
    assert list((remote / "tensorboard").glob("events.*"))
    assert [path.name for path in (remote / "best").iterdir()] == [
        str(json.loads((remote / "summary.json").read_text())["best"]["step"])
    ]
    assert not (remote / ".lock").exists()
    assert not list(bucket.rglob(f"*{storage.PARTIAL}*"))


@pytest.mark.slow
def test_a_checkpoint_without_its_marker_is_not_there(finetuned, bucket):
    shutil.copytree(bucket / "runs/run", bucket / "runs/cut", dirs_exist_ok=True)
    steps = sorted(int(path.name) for path in (bucket / "runs/cut/checkpoints").iterdir())
    assert json.loads((bucket / "runs/cut/checkpoints" / str(steps[-1]) / "meta/metadata").read_text())
    for marker in (bucket / "runs/cut/checkpoints" / str(steps[-1])).glob("commit_success.txt"):
        marker.unlink()
    found = vm.interop.export.find("gs://bucket/runs/cut")
    assert str(found) == f"gs://bucket/runs/cut/checkpoints/{steps[-2]}"
    shutil.rmtree(bucket / "runs/cut")


@pytest.mark.slow
def test_evaluate_embed_predict_reconstruct_and_convert(finetuned, bucket, shapes, tmp_path):
    local, url = finetuned
    c = load_config("debug", f"data={shapes},task=finetune")
    result = evaluate.run(c, storage.at(url), "")
    assert result["checkpoint"].startswith("gs://bucket/runs/run/best")
    video = str(next((shapes / "test").rglob("*.mp4")))
    written = []
    for folder in (str(tmp_path), "gs://bucket/out"):
        embed.run([video], f"{url}/best", f"{folder}/features.npz", embed.Options())
        rows = predict.run([video], url, f"{folder}/classes.csv", predict.Options(), lambda _row: None)
        assert rows[0]["classes"]
        written.append(epath.Path(folder))
    for name in ("features.npz", "features.npz.json", "classes.csv"):
        sides = [(folder / name).read_bytes() for folder in written]
        assert sides[0].replace(str(tmp_path).encode(), b"gs://bucket/out") == sides[1]
    weights.convert(f"{url}/best", "gs://bucket/out/export", "orbax")
    weights.convert(f"{url}/best", "gs://bucket/out/hf", "hf")
    weights.convert(f"{url}/best", str(tmp_path / "hf"), "hf")
    jax.tree.map(
        np.testing.assert_array_equal, params_of("gs://bucket/out/export"), params_of(local / "best")
    )
    for name in ("config.json", "model.safetensors"):
        assert (bucket / "out/hf" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    with pytest.raises(vm.interop.export.ExportError, match="copy them here first"):
        vm.load("gs://bucket/out/hf")
    with pytest.raises(vm.interop.export.ExportError, match="exists"):
        vm.save(vm.load(local / "best"), "gs://bucket/out/export")
    assert {path.name for path in (bucket / "out").iterdir()} == {
        *("features.npz", "features.npz.json", "classes.csv", "export", "hf"),
    }


@pytest.mark.slow
def test_pretraining_writes_its_pictures_and_a_probe_its_figures(endpoint, bucket, debug_config, shapes):
    debug_config.optim.update(duration=3, warmup=1)
    assert run(debug_config, "gs://bucket/runs/pretrained")["reconstruction"]
    assert (bucket / "runs/pretrained/reconstruction.gif").stat().st_size > 1000
    probe = load_config("probe", f"data={shapes}")
    probe.update(init_from="gs://bucket/runs/pretrained", evaluate={"batch_videos": 8, "segments": 1})
    probe.data.update(frames=4, size=(32, 32), workers=0)
    assert run(probe, "gs://bucket/runs/probe")["evaluation"]["videos"] > 0
    assert (bucket / "runs/probe/evaluation.json").exists()
    assert not (bucket / "runs/probe/features").exists()
    video = str(next((shapes / "test").rglob("*.mp4")))
    options = {"statistics": "", "mask": "", "mask_ratio": 0.0, "start": -1.0, "seed": 0}
    reconstruct.run(
        video, "gs://bucket/runs/pretrained", "gs://bucket/out/x.png", **options, hints=weights.Hints()
    )
    assert (bucket / "out/x.png").read_bytes()[1:4] == b"PNG"


def test_prepare_into_a_store(endpoint, bucket, tmp_path):
    videos = [clips.write(tmp_path / "in" / f"{i}.mp4", clips.numbered_frames(6 + i)) for i in range(5)]
    entries = [Entry(f"{i}.mp4", path, i % 2) for i, path in enumerate(videos)]
    collection = Collection("own", {"train": entries}, ("a", "b"))
    made = []
    for folder in (str(tmp_path / "set"), "gs://bucket/made"):
        job = prepare.Job(collection, folder, transcode.Form(), 2)
        prepare.claim(job)
        prepare.write(job, prepare.pending(job)[:1], 1)  # as one that was killed
        made.append(prepare.run(job, 1))
    assert made[0] == made[1]
    sides = []
    for side in (tmp_path / "set", bucket / "made"):
        files = (path for path in side.rglob("*") if path.is_file() and path.name != "dataset_info.json")
        sides.append({str(path.relative_to(side)): path.read_bytes() for path in files})
    # All but what TFDS finds by name, which needs "..".
    assert sides[1] == {name: data for name, data in sides[0].items() if not name.startswith("own/")}
    assert "index/train-places.npy" in sides[1]
    assert not list(prepared.damage("gs://bucket/made"))


def test_a_file_appears_whole_or_not_at_all(bucket, tmp_path):
    for folder in (tmp_path, epath.Path("gs://bucket/whole")):
        storage.write_text(folder / "a.txt", "before")
        with pytest.raises(ZeroDivisionError), storage.output(folder / "a.txt") as file:
            file.write_text(f"half {1 // 0}" if file.write_text("half") else "")
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("a.txt", "before")]
        with storage.output(folder / "a.txt") as file:
            file.write_text("after")
        assert (folder / "a.txt").read_text() == "after"


def test_growing_files_are_copied_at_a_bounded_rate(bucket, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    place, copied = epath.Path("gs://bucket/growing"), []
    monkeypatch.setattr(
        storage, "_upload", lambda file, to: copied.append(file.name) or to.write_bytes(file.read_bytes())
    )
    with storage.Growing(place, ("log.jsonl",)) as files:
        for second in range(150):
            now[0] = float(second)
            with (files.folder / "log.jsonl").open("a") as log:
                log.write(f"{second}\n")
            files.push()
        assert copied == ["log.jsonl"] * 3  # at 0, 60 and 120 s
        files.push(now=True)
        files.push(now=True)  # nothing new
        assert copied == ["log.jsonl"] * 4
        (files.folder / "deep").mkdir()
        (files.folder / "deep" / "b").write_text("b")
    assert copied == ["log.jsonl"] * 4 + ["b"]
    assert len((place / "log.jsonl").read_text().splitlines()) == 150
    with storage.Growing(place, ("log.jsonl",)) as files, (files.folder / "log.jsonl").open("a") as log:
        log.write("more\n")
    assert (place / "log.jsonl").read_text().splitlines()[-2:] == ["149", "more"]


def test_a_copy_that_fails_is_made_the_next_time(bucket, monkeypatch):
    """Nothing is lost: the lines are on a disk here. Before a checkpoint and at the end it must not fail."""
    now, plain, fails = [0.0], storage._upload, [True]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])

    def upload(file, target):
        if fails[0]:
            raise RuntimeError("503")
        plain(file, target)

    monkeypatch.setattr(storage, "_upload", upload)
    place = epath.Path("gs://bucket/failing")
    with storage.Growing(place, ("log.jsonl",)) as files:
        (files.folder / "log.jsonl").write_text("a\n")
        files.push()
        with pytest.raises(RuntimeError, match="503"):
            files.push(now=True)
        fails[0], now[0] = False, 100.0
        files.push()
        assert (place / "log.jsonl").read_text() == "a\n"


def test_of_several_hosts_one_copies(bucket):
    """The others have what the store had, and would put it back."""
    place = epath.Path("gs://bucket/hosts")
    place.mkdir()
    (place / "log.jsonl").write_text("old\n")
    names = ("log.jsonl",)
    with storage.Growing(place, names) as ours, storage.Growing(place, names, is_writer=False) as theirs:
        with (ours.folder / "log.jsonl").open("a") as log:
            log.write("new\n")
        ours.push(now=True)
        theirs.push(now=True)
    assert (place / "log.jsonl").read_text() == "old\nnew\n"


def test_a_lock_in_a_store(bucket, monkeypatch):
    monkeypatch.setattr(hosts.Lock, "_SETTLED", 0.0)
    path = epath.Path("gs://bucket/locked/.lock")
    with hosts.Lock(path):
        with pytest.raises(UserError, match=r"works with gs://bucket/locked since"), hosts.Lock(path):
            pass
        assert path.exists()
    assert not path.exists()

    plain = type(path).write_text  # another process writes at the same moment, after this one

    def overtaken(self, text, *args, **kwargs):
        return plain(self, json.dumps({"host": "elsewhere", "pid": 1}) if self == path else text)

    monkeypatch.setattr(type(path), "write_text", overtaken)
    with pytest.raises(UserError, match="elsewhere"), hosts.Lock(path):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_refused_before_any_work(bucket, monkeypatch, finetuned, shapes):
    def refuse(*_args, **_kwargs):
        raise PermissionError("anonymous caller")

    monkeypatch.setattr(storage, "_upload", refuse)
    assert "gs://bucket/x cannot be written (PermissionError: anonymous caller)" in storage.trouble(
        storage.at("gs://bucket/x")
    )
    c = load_config("debug", f"data={shapes},task=finetune")
    with pytest.raises(UserError, match="anonymous caller"):
        evaluate.run(c, storage.at("gs://bucket/x"), finetuned[1])
