"""The launch scripts against stand-ins that record what they are asked."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

LAUNCH = ROOT / "launch"

# Answers with the lines of FOLDER/states, one for each question; statuses are the lines of FOLDER/fails.
GCLOUD = """#!/usr/bin/env bash
echo "$(printf '%q ' "$@")" >>"$FOLDER/calls"
next() { [[ -s "$1" ]] || return 0; head -n1 "$1"; sed -i 1d "$1"; }
case "$4" in
  describe) [[ "$*" == *ipAddress* ]] && echo "10.0.0.1;10.0.0.2" || next "$FOLDER/states" ;;
  ssh) [[ "$*" == *hosts=tpu* ]] && exit "$(next "$FOLDER/fails" | grep . || echo 0)" ;;
  scp) [[ "$5" == *host.log ]] && next "$FOLDER/says" >"$6" ;;
  create) exit "${CREATE:-0}" ;;
esac
exit 0
"""
RECORD = """#!/usr/bin/env bash
echo "$(printf '%q ' "$@")" >>"$FOLDER/calls"
"""


@pytest.fixture
def stand_in(tmp_path):
    """Runs a launch script with such stand-ins first on its path; returns (result, their calls)."""
    folder = tmp_path / "stand_in"
    folder.mkdir()

    def run(script, *words, cwd=ROOT, states=(), fails=(), says=(), env=None, **executables):
        for name, text in executables.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "states").write_text("".join(f"{state}\n" for state in states))
        (folder / "fails").write_text("".join(f"{status}\n" for status in fails))
        (folder / "says").write_text("".join(f"{line}\n" for line in says))
        variables = {"PATH": f"{folder}:{os.environ['PATH']}", "FOLDER": str(folder), "PAUSE": "0"}
        variables |= {"LOGS": str(tmp_path / "logs"), "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [script, *words],
            env={**os.environ, **variables, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = folder / "calls"
        return done, [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


@pytest.mark.parametrize("script", [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_shellcheck(script):
    checker = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


POD = ("pod", "us-west4-a", "v5litepod-16")
TRAIN = (
    "train",
    "--config=configs/small.py:data=my videos",
    "--config.optim.betas=(0.9,0.95)",
    "--workdir=/w",
)


def test_tpu_dry_run_says_all_and_does_nothing(stand_in):
    done, calls = stand_in(LAUNCH / "tpu.sh", *POD, "--dry-run", *TRAIN, gcloud=GCLOUD)
    assert done.returncode == 0
    assert calls == []
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[4] for line in lines if line[0] == "gcloud"] == ["create", "scp", "ssh", "ssh", "scp"]
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"} <= set(lines[0])


def test_tpu_makes_installs_runs_and_collects(stand_in, tmp_path):
    done, calls = stand_in(LAUNCH / "tpu.sh", *POD, *TRAIN, gcloud=GCLOUD, env={"SPOT": "1"})
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in calls]
    assert verbs == ["describe", "create", "scp", "ssh", "ssh", "describe", "scp", "scp", "describe"]
    assert "--spot" in calls[1]
    assert all("--zone=us-west4-a" in call for call in calls)
    (command,) = (word.removeprefix("--command=") for word in calls[4] if word.startswith("--command="))
    # The flags arrive as they were given, and one more.
    words = shlex.split(command)
    start = words.index("launch/local.sh") + 1
    assert words[start : start + len(TRAIN) + 1] == [*TRAIN, "--hosts=tpu"]
    assert [call[5] for call in calls[6:8]] == [str(tmp_path / "logs" / f"host{i}.log") for i in (0, 1)]
    assert not list(tmp_path.glob("*.tar.gz"))


def test_tpu_begins_again_when_preempted(stand_in):
    done, calls = stand_in(
        LAUNCH / "tpu.sh",
        *POD,
        *TRAIN,
        states=["READY", "PREEMPTED", "PREEMPTED"],
        fails=[255],
        gcloud=GCLOUD,
    )
    assert done.returncode == 0, done.stderr
    assert "the slice is PREEMPTED, beginning again (1 of 100)" in done.stderr
    verbs = [call[3] for call in calls]
    assert verbs.index("delete") < verbs.index("create")
    assert sum("hosts=tpu" in " ".join(call) for call in calls) == 2


def test_tpu_begins_again_where_the_command_was_asked_to_stop(stand_in):
    says = ["SIGTERM: saving a checkpoint, then ending", "", "done", ""]
    states = ["READY", "PREEMPTED", "PREEMPTED", "READY"]
    done, calls = stand_in(LAUNCH / "tpu.sh", *POD, *TRAIN, states=states, says=says, gcloud=GCLOUD)
    assert done.returncode == 0, done.stderr
    assert sum("hosts=tpu" in " ".join(call) for call in calls) == 2


def test_tpu_begins_again_where_the_slice_was_gone_before_its_log_came(stand_in):
    unreachable = GCLOUD.replace('scp) [[ "$5"', 'scp) [[ "$5" == *host.log ]] && exit 1; [[ "$5"')
    states = ["READY", "PREEMPTED", "PREEMPTED", "READY"]
    done, calls = stand_in(LAUNCH / "tpu.sh", *POD, *TRAIN, states=states, gcloud=unreachable)
    assert done.returncode == 0, done.stderr
    assert sum("hosts=tpu" in " ".join(call) for call in calls) == 2


@pytest.mark.parametrize(
    ("states", "create", "text"),
    [(["STOPPED"], "0", "the slice pod is STOPPED: wait, or delete it"), ([], "1", "")],
)
def test_tpu_deletes_nothing_of_yours_and_does_not_insist(stand_in, states, create, text):
    done, calls = stand_in(
        LAUNCH / "tpu.sh", *POD, *TRAIN, states=states, gcloud=GCLOUD, env={"CREATE": create}
    )
    assert done.returncode == 1
    assert text in done.stderr
    assert not {"delete", "ssh"} & {call[3] for call in calls}
    assert len(calls) < 3


def test_tpu_does_not_run_old_sources(stand_in):
    """A failing copy ends it, whatever the commands after it would say."""
    failing = GCLOUD.replace('scp) [[ "$5"', 'scp) [[ "$5" == *tar.gz ]] && exit 7; [[ "$5"')
    done, calls = stand_in(LAUNCH / "tpu.sh", *POD, *TRAIN, states=["READY"], gcloud=failing)
    assert done.returncode == 7
    assert "ssh" not in [call[3] for call in calls]


def test_tpu_hands_on_the_failure_of_a_command(stand_in):
    done, calls = stand_in(
        LAUNCH / "tpu.sh", *POD, *TRAIN, states=["READY", "READY"], fails=[3], gcloud=GCLOUD
    )
    assert done.returncode == 3
    assert "the command failed with status 3" in done.stderr
    assert "create" not in [call[3] for call in calls]


def test_slurm_starts_every_task_and_requeues_what_was_interrupted(stand_in, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    env = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    words = ("train", "--config=c.py:data=my videos", f"--workdir={tmp_path}")
    run = lambda: stand_in(LAUNCH / "slurm.sh", *words, env=env, srun=RECORD, scontrol=RECORD)  # noqa: E731
    (tmp_path / "summary.json").write_text('{\n  "interrupted": false\n}')
    done, calls = run()
    assert done.returncode == 0, done.stderr
    python = [".venv/bin/python", "-m", "videomae_jax"]
    assert calls == [["--kill-on-bad-exit=1", *python, *words, "--hosts=slurm"]]
    (tmp_path / "summary.json").write_text('{\n  "interrupted": true\n}')
    _, calls = run()
    assert calls[-1] == ["requeue", "42"]


@pytest.mark.parametrize(
    ("script", "words", "env", "text"),
    [
        ("tpu.sh", ("pod", "zone"), {}, "use NAME ZONE TYPE"),
        ("slurm.sh", (), {"SLURM_SUBMIT_DIR": "/"}, "use sbatch"),
        ("slurm.sh", ("train",), {"SLURM_SUBMIT_DIR": "/"}, "no //.venv: run EXTRAS=cuda"),
        ("local.sh", ("--processes=none", "train"), {}, "is no number of processes"),
    ],
)
def test_wrong_uses(stand_in, script, words, env, text):
    done, calls = stand_in(LAUNCH / script, *words, env=env)
    assert done.returncode == 2
    assert text in done.stderr
    assert not calls


# As host 1 it fails with status 3 if asked to, else it waits for a SIGTERM where asked to.
PYTHON = """#!/usr/bin/env bash
[[ "$1" == -c ]] && { echo 4321; exit; }
echo "$(printf '%q ' "$@")" >>"$FOLDER/calls"
trap 'echo saved; exit 0' TERM
[[ "$*" == *fail*hosts=1/* ]] && exit 3
if [[ "$*" == *wait* ]]; then for _ in {1..200}; do sleep 0.05; done; exit 1; fi
exit 0
"""


@pytest.fixture
def project(tmp_path):
    """A folder with launch/local.sh and an environment that counts as installed."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "local.sh", tmp_path / "launch")
    shutil.copy(ROOT / "setup.py", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    stamp = subprocess.run("cksum <setup.py", shell=True, cwd=tmp_path, capture_output=True, text=True).stdout
    (tmp_path / ".venv" / ".installed").write_text(stamp)
    return tmp_path


@pytest.mark.parametrize(("word", "status"), [("fine", 0), ("fail", 3)])
def test_local_starts_processes_as_hosts(stand_in, project, word, status):
    done, calls = stand_in(project / "launch" / "local.sh", "--processes=3", "train", word)
    assert done.returncode == status, done.stderr
    expected = [["-m", "videomae_jax", "train", word, f"--hosts={i}/3@localhost:4321"] for i in range(3)]
    assert sorted(calls) == expected


def test_a_named_interpreter_is_the_one_or_refused(project):
    """Also with a space in its path; never another one in its place."""
    (project / ".venv" / ".installed").unlink()
    words, env = [project / "launch" / "local.sh", "doctor"], {**os.environ, "PYTHON": "/nowhere/my python"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "/nowhere/my python: no Python 3.11, 3.12 or 3.13" in done.stderr
    assert "making" not in done.stdout


def test_local_hands_on_sigterm(project):
    words = [project / "launch" / "local.sh", "--processes=2", "train", "wait"]
    env = {**os.environ, "FOLDER": str(project)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
    calls = project / "calls"
    while not (calls.exists() and calls.read_text().count("\n") == 2):
        time.sleep(0.02)
    time.sleep(0.2)  # the stand-in sets its trap after it has recorded
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\nsaved\n"
    assert process.returncode == 0
