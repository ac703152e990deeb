"""Wrong uses, each one line on stderr and status 2."""

import argparse
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from videomae_jax import cli, commands

ODD = ("--config.model.encoder.width=36", "--config.model.encoder.num_heads=2")
PMAP = ("--config.mesh.mapping=pmap",)
DEBUG = f"--config={ROOT / 'configs' / 'debug.py'}"


@pytest.fixture
def use(monkeypatch, capsys):
    """Runs the command line; returns (status, standard output, standard error)."""

    def run(*argv) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["videomae_jax", *argv])
        status = cli.main(0.0)
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "unknown command 'trian': use train, evaluate, embed, predict, convert, detect, doctor"),
        (["train", DEBUG], "train needs --workdir=...; see train --help"),
        (["train", "--workdir=W"], "train needs --config=..."),
        (["train", "--workdir=W", "--config=nowhere.py"], "no file nowhere.py"),
        (["train", "--workdir=W", f"{DEBUG}:data"], "config argument 'data' is not understood"),
        (["train", "--workdir=W", DEBUG, "--config.optim.lrr=1"], "--config: 'lrr' Did you mean \"lr\""),
        (["train", "--workdir=W", DEBUG, "--config.lr=1"], "use --config.optim.lr or --config.probe.lr"),
        (
            ["train", "--workdir=W", DEBUG, "--config.optim.learning_rate=1"],
            "there is no setting learning_rate there: videomae_jax/keys.py has all",
        ),
        (
            ["train", "--workdir=W", DEBUG, "--config.mesh.fsdp=3"],
            "mesh.fsdp=3 x mesh.tensor=1 does not divide",
        ),
        (["train", "--workdir=W", "--config", "nowhere.py"], "no file nowhere.py"),
        (["train", "--workdir=W", "--config.optim.lr=1"], "lr=1 edits the settings of a file: pass that too"),
        (
            ["train", "--workdir=W", f"{DEBUG}:task=finetune", "--config.debug.overfit=6"],
            "overfit=6 does not",
        ),
        (["convert", "SHAPES", "D", "--layout=onnx"], "'onnx' is unknown: use orbax, official or hf"),
        (["evaluate", "--workdir=W", f"{DEBUG}:task=finetune", "--stride=2"], "line flag 'stride'"),
        (["train", "--workdir=W", DEBUG, "--config.optim.lr=fast"], "lr"),
        (["train", "--workdir=W", DEBUG, "--wordkir=W"], "Unknown command line flag 'wordkir'"),
        (["train", "--workdir=W", DEBUG, "extra"], "train takes no argument, not extra"),
        (["train", "--workdir=W", f"{DEBUG}:data=/nowhere"], "/nowhere does not exist"),
        (["train", "--workdir=W", DEBUG, "--config.task=dance"], "task='dance' is unknown: use pretrain"),
        (["train", "--workdir=W", DEBUG, "--config.data.path="], "data.path is empty"),
        (["train", "--workdir=W", DEBUG, "--config.mask.ratio=1.0"], "mask.ratio=1.0 is out of range"),
        (["train", "--workdir=W", DEBUG, "--config.data.frames=7"], "(7, 32, 32) cannot be cut"),
        (["train", "--workdir=W", DEBUG, "--config.mesh.data=3"], "does not use the 8 devices"),
        (
            ["train", "--workdir=W", DEBUG, "--config.mesh.mapping=map"],
            "mesh.mapping='map' is unknown: use jit",
        ),
        (["train", "--workdir=W", DEBUG, *PMAP, "--config.mesh.fsdp=2"], "use --config.mesh.mapping=jit"),
        (
            ["train", "--workdir=W", DEBUG, "--config.mesh.tensor=4"],
            "does not divide model.encoder.num_heads=2",
        ),
        (
            ["train", "--workdir=W", DEBUG, "--config.mesh.tensor=3"],
            "does not divide the 8 devices of a host",
        ),
        (["train", "--workdir=W", DEBUG, *ODD, "--config.mesh.fsdp=8"], "does not divide axis 0 of params/"),
        (
            ["train", "--workdir=W", DEBUG, "--config.mesh.step_limit=-1"],
            "mesh.step_limit=-1 is out of range",
        ),
        (["train", "--workdir=W", DEBUG, "--config.log.profile=20:10"], "log.profile='20:10' is empty: use"),
        (
            ["train", "--workdir=W", DEBUG, "--config.model.remat=some"],
            "unknown remat 'some': use none, dots",
        ),
        (
            ["train", "--workdir=W", DEBUG, "--config.model.attention=cudnn"],
            "attention=cudnn does not work here",
        ),
        (["train", "--workdir=W", DEBUG, "--hosts=2/2@a:1"], "--hosts=2/2@a:1 is none of auto, tpu, slurm"),
        (
            ["train", "--workdir=/dev/null/x", f"{DEBUG}:data=SHAPES"],
            "/dev/null/x is no folder and cannot be",
        ),
        (["train", "--workdir=W", DEBUG, "--config.optim.lr=nan"], "optim.lr=nan is out of range"),
        (["train", "--workdir=W", DEBUG, "--config.data.size=32"], "data.size=[32] must be 2 numbers"),
        (["embed", "v.mp4", "--checkpoint=C", "--out=f.npz", "--clip_size=8"], "use FRAMES,HEIGHT,WIDTH"),
        (["predict", "v.mp4", "--checkpoint=C", "--stride=-1"], "--stride=-1 must be at least 0"),
        (["predict", "--checkpoint=C"], "predict takes VIDEOS..., not none"),
        (["predict", "SHAPES", "SHAPES", "--checkpoint=C"], "name a video twice"),
        (["evaluate", DEBUG], "evaluate needs --workdir=..."),
        (["evaluate", "--workdir=W", DEBUG], "evaluate tests classifiers and detectors, not task=pretrain"),
        (["evaluate", "--workdir=W", f"{DEBUG}:task=finetune"], "W is not there, so it holds no model"),
        (["train", "--workdir=W", f"{DEBUG}:task=dance"], "task='dance' is unknown: use pretrain"),
        (
            ["train", "--workdir=W", f"{DEBUG}:task=finetune", "--config.init_from=X"],
            "X is not there, so it holds no model",
        ),
        (["train", "--workdir=W", f"{DEBUG}:task=probe"], "a probe needs trained weights: set --config.init"),
        (
            ["train", "--workdir=W", DEBUG, "--config.augment.mixup=0.5"],
            "only finetune and distill would read it",
        ),
        (["prepare", "a"], "prepare takes SRC DST, not a"),
        (["prepare", "/nowhere", "D"], "/nowhere does not exist: pass a folder of videos"),
        (["prepare", "SHAPES", "D", "--codec=vp9"], "--codec=vp9 is unknown: use jpeg, h264_intra"),
        (["prepare", "SHAPES", "D", "--dataset=ssv2"], "holds no labels file (labels.json or"),
        (["prepare", "-", "D", "--check"], "D holds no manifest.json"),
        (["reconstruct", "--checkpoint=C", "--out=o.gif"], "reconstruct takes VIDEO, not none"),
        (["reconstruct", "v.mp4", "--checkpoint=C"], "reconstruct needs --out=..."),
        (["reconstruct", "v.mp4", "--checkpoint=C", "--out=o.jpeg"], "unknown suffix: use .gif, .mp4, .png"),
        (["reconstruct", "v.mp4", "--checkpoint=C", "--out=o.gif"], "C is not there, so it holds no model"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(use, monkeypatch, tmp_path, shapes, argv, text):
    monkeypatch.chdir(tmp_path)
    status, _, error = use(*(word.replace("SHAPES", str(shapes)) for word in argv))
    assert text in error
    assert error.startswith("videomae_jax: ")
    assert error.count("\n") == 1
    assert status == 2
    assert list(tmp_path.rglob("*")) == []  # nothing half-made is left behind


def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    """In a process of its own: JAX has chosen its devices here."""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    for argv in (["doctor"], ["train", DEBUG, f"--workdir={tmp_path / 'W'}"], ["convert", "a", "b"]):
        words = [sys.executable, "-m", "videomae_jax", *argv]
        found = subprocess.run(words, env=environment, capture_output=True, text=True)
        (line,) = found.stderr.splitlines()[-1:]
        assert line.startswith("videomae_jax: JAX finds no device for JAX_PLATFORMS=cuda ("), found.stderr
        assert "EXTRAS=cuda" in line
        assert found.returncode == 2


def test_help(use):
    for argv, text in (
        (("--help",), "train"),
        (("reconstruct", "--help"), "--mask_ratio"),
        (("reconstruct", "--help"), "needs VIDEO --checkpoint=... --out=..."),
    ):
        status, output, _ = use(*argv)
        assert status == 0
        assert text in output


def test_a_failure_of_ours_has_status_1_and_says_how_to_see_more(use, monkeypatch):
    def fail(*_args):
        raise RuntimeError("boom")

    monkeypatch.setitem(cli.COMMANDS, "train", (commands._train_flags, (), (), fail))
    status, _, error = use("train", DEBUG, "--workdir=W")
    assert (status, error) == (1, "videomae_jax: RuntimeError: boom (--debug shows where)\n")
    status, _, error = use("train", DEBUG, "--workdir=W", "--debug")
    assert status == 1
    assert "Traceback" in error


def test_a_mark_of_byte_order_is_no_part_of_a_class(tmp_path):
    (tmp_path / "classes.txt").write_text("speed\nheight\n", encoding="utf-8-sig")
    sizes = {"num_heads": None, "decoder_num_heads": None, "clip_size": "", "stride": None}
    given = argparse.Namespace(classes=str(tmp_path / "classes.txt"), **sizes)
    assert commands._hints(given).classes == ("speed", "height")


def test_which_weights_of_a_work_folder_are_taken_is_said(use, tmp_path):
    """The test at the end of training, and evaluate, take the best ones."""
    for name in ("run", "run/best"):
        (tmp_path / name).mkdir()
    for path, is_said in (("run", True), ("run/best", False)):
        status, _, error = use("predict", "SHAPES", f"--checkpoint={tmp_path / path}")
        assert status == 2
        assert ("run/best has the weights that were tested" in error) == is_said
