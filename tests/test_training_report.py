"""What a run writes down: lines, their order after a resume, and figures that leave compiling out."""

import json
import pty
import struct
import termios
import time

import jax
import pytest
from tensorboardX.proto import event_pb2

from videomae_jax import hardware, storage
from videomae_jax.config import UserError
from videomae_jax.training import report

METRICS = {"loss": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0, "clips": 4.0, "skipped": 0.0}


FIGURES = {"clips_per_second", "clips_per_second_per_device", "tflops_per_device", "data_wait", "memory_gib"}
FIGURES |= {"step_seconds_p50", "step_seconds_p95", "step_seconds_p100"}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_nth_and_the_last_step_are_logged(tmp_path, capsys):
    log = report.Report(
        storage.Growing(tmp_path, []), 0, 7, batch_size=4, every=3, flops_per_clip=1e9, dtype="float32"
    )
    for step in range(1, 8):
        log.step(step, METRICS, {})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 7]
    assert set(lines(tmp_path)[0]) == {"step", *METRICS, *FIGURES}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    for part in ("step 6/7", "loss 0.5000", "lr 1.00e-03", "clips/s", "waiting for data", "s left"):
        assert part in printed[1]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_tensorboard_events_read_back(tmp_path):
    log = report.Report(
        storage.Growing(tmp_path, []), 0, 2, batch_size=4, every=1, flops_per_clip=1e9, dtype="float32"
    )
    log.step(1, METRICS, {})
    log.step(2, {**METRICS, "loss": float("nan"), "skipped": 1.0}, {})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert "brain.Event:2" in {event.file_version for event in events}
    points = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    assert points[1, "loss"] == 0.5
    assert {tag for _, tag in points} == {*METRICS, *FIGURES}
    assert lines(tmp_path)[1]["loss"] is None  # NaN is not JSON


def test_the_first_step_is_not_throughput(tmp_path):
    log = report.Report(
        storage.Growing(tmp_path, []), 0, 3, batch_size=10, every=10, flops_per_clip=1e9, dtype="float32"
    )
    log.waited(5.0)
    time.sleep(0.3)
    log.step(1, METRICS, {})
    time.sleep(0.05)
    log.waited(0.02)
    log.step(2, METRICS, {})
    log.step(3, METRICS, {})
    time.sleep(0.3)  # what ends a run: no step of it
    totals = log.totals()
    log.close()
    assert totals["clips_per_second"] > 20 / 0.3
    (line,) = lines(tmp_path)
    assert line["clips_per_second"] > 20 / 0.3  # no compiling in the first line either
    assert totals["data_wait"] < 0.5
    each = totals["clips_per_second"] / jax.device_count()
    assert totals["clips_per_second_per_device"] == pytest.approx(each)
    assert totals["tflops_per_device"] == pytest.approx(each / 1e3)


def test_lines_beyond_a_checkpoint_and_broken_ones_are_removed(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert report.keep_lines(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert report.keep_lines(tmp_path / "none.jsonl", 2) == 0


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    with open(follower, "w") as terminal, open(leader, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stderr", terminal)
        log = report.Report(
            storage.Growing(tmp_path, []), 0, 4, batch_size=4, every=1, flops_per_clip=1e9, dtype="float32"
        )
        for step in range(1, 5):
            log.step(step, METRICS, {})
        log.close()
        terminal.write("end of the run")
        terminal.flush()
        shown = ""
        while "end of the run" not in shown:
            shown += screen.read(4096).decode()
    for part in ("4/4", "loss 0.5000", "clips/s", "left"):
        assert part in shown


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert report.memory_gib() > 0


def test_use_of_a_known_device(tmp_path, monkeypatch):
    monkeypatch.setattr(report.hardware, "peak_flops", lambda _: 1e12)
    log = report.Report(
        storage.Growing(tmp_path, []), 0, 2, batch_size=8, every=2, flops_per_clip=3e9, dtype="bfloat16"
    )
    log.step(1, METRICS, {})
    time.sleep(0.2)
    log.exclude(0.15)  # a validation
    log.step(2, METRICS, {})
    log.close()
    (line,) = lines(tmp_path)
    assert line["clips_per_second_per_device"] * jax.device_count() == pytest.approx(line["clips_per_second"])
    assert line["mfu"] == pytest.approx(line["clips_per_second_per_device"] * 3e9 / 1e12)
    assert 0.04 < line["step_seconds_p50"] < 0.15


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("cpu", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_peaks(kind, tflops):
    assert hardware.peak_flops(kind) == (tflops and tflops * 1e12)


def test_profile_covers_the_steps_asked_for(tmp_path, monkeypatch, capsys):
    now, traced = [0], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: traced.append(("from", now[0], folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append(("to", now[0])))
    profile = report.Profile(tmp_path, "3:4")
    for now[0] in range(8):
        profile.before(now[0], None)
    profile.close()
    assert traced == [("from", 2, str(tmp_path / "profile")), ("to", 4)]
    assert "profile from step 3 on" in capsys.readouterr().out
    report.Profile(tmp_path, "").before(0, None)
    for wrong in ("3", "4:3", "0:2", "a:b"):
        with pytest.raises(UserError, match="use FIRST:LAST"):
            report.check_profile(wrong)
