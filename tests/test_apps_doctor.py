"""The doctor: every check on this machine, and what it says of broken ones."""

import json
import os
import subprocess
import sys

import pytest

from videomae_jax import pages
from videomae_jax.apps import doctor
from videomae_jax.data import decode


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv(pages.SETTING, "glibc.malloc.hugetlb=1")
    monkeypatch.setattr(doctor, "_seconds", lambda step, *arguments: (step(*arguments), 1e-3)[1])


def by_check(findings) -> dict[str, list]:
    return {name: [f for f in findings if f.check == name] for name in {f.check for f in findings}}


def test_a_sound_machine(shapes, tmp_path, capsys):
    found = by_check(doctor.run(str(shapes), str(tmp_path / "new" / "run")))
    assert set(found) == {
        "versions",
        "devices",
        "memory",
        "matmul",
        "attention",
        "decoder",
        "work folder",
    } | {
        "data",
        "hosts",
    }
    assert {f.status for name in found if name != "work folder" for f in found[name]} == {"ok"}
    assert "8 x cpu" in found["devices"][0].text
    assert "32 training videos, 8 classes" in found["data"][0].text
    assert "8 of the videos tried" in found["data"][1].text
    assert not (tmp_path / "new").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(map(len, found.values()))
    assert lines[0].startswith("ok       versions     Python 3.")


def test_what_is_wrong_on_another_host_is_told_everywhere(monkeypatch):
    mine = [doctor.Finding("data", "ok", "64 videos")]
    theirs = [doctor.Finding("data", "fix", "no such folder"), doctor.Finding("data", "ok", "else")]
    monkeypatch.setattr(doctor.hosts, "gather", lambda value: [value, [vars(each) for each in theirs]])
    assert doctor._of_all_hosts(mine) == [*mine, doctor.Finding("data", "fix", "host 1: no such folder")]


def test_what_is_broken_is_told_and_hides_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise decode.DecodeError("no codec")

    monkeypatch.setattr(decode, "read_clip", broken)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    found = by_check(doctor.run(str(tmp_path / "nothing"), str(tmp_path)))
    assert found["decoder"][0].status == "fix"
    assert "EXTRAS=cuda" in found["devices"][1].text
    assert "cannot be written" in found["work folder"][0].text
    assert found["data"][0].status == "fix"
    assert found["hosts"][0].status == "ok"


def test_a_bad_video_is_a_warning(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.mp4").write_bytes(b"nothing")
    (data,) = (
        f for f in doctor.run(str(tmp_path), str(tmp_path)) if f.status == "warning" and f.check == "data"
    )
    assert "1 of 1 videos cannot be decoded" in data.text
    assert "broken.mp4" in data.text


def test_the_command_fails_where_something_must_be_mended(tmp_path):
    words = [
        sys.executable,
        "-m",
        "videomae_jax",
        "doctor",
        f"--data={tmp_path / 'none'}",
        "--out=found.json",
    ]
    done = subprocess.run(words, cwd=tmp_path, env=None, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("videomae_jax: doctor: data must be mended")
    assert {f["check"]: f["status"] for f in json.loads((tmp_path / "found.json").read_text())}[
        "data"
    ] == "fix"
    assert "Traceback" not in done.stderr


def test_commands_take_huge_pages_unless_told_otherwise():
    """The process is replaced once, before JAX is imported, and keeps its command line."""
    code = "import os, sys; from videomae_jax import pages; pages.begin_again(); "
    code += "print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv, 'jax' in sys.modules)"
    plain = {name: value for name, value in os.environ.items() if name != pages.SETTING}
    for environment, wanted in ((plain, "glibc.malloc.hugetlb=1"), (plain | {pages.SETTING: "x=1"}, "x=1")):
        process = subprocess.Popen(
            [sys.executable, "-c", code, "an argument"], env=environment, text=True, stdout=subprocess.PIPE
        )
        found = process.communicate()[0].strip()
        assert found == f"{process.pid} {wanted} ['-c', 'an argument'] False"


def test_missing_huge_pages_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv(pages.SETTING, "x=1")
    assert "add glibc.malloc.hugetlb=1 to GLIBC_TUNABLES" in pages.trouble()
    monkeypatch.setenv(pages.SETTING, "glibc.malloc.hugetlb=1")
    monkeypatch.setattr(pages, "_KERNEL", tmp_path / "enabled")
    for text, is_wrong in (("always [madvise] never", False), ("always madvise [never]", True)):
        (tmp_path / "enabled").write_text(text)
        assert ("write madvise into" in pages.trouble()) == is_wrong


def test_a_generated_set_needs_no_place(tmp_path):
    found = {f.check: f for f in doctor.run("moving_shapes", str(tmp_path))}
    assert (found["data"].status, found["data"].text) == (
        "ok",
        "moving_shapes is generated when it is needed",
    )
