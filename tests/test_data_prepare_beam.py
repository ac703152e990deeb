"""The Apache Beam pipeline gives the bytes of the plain run; needs an environment with the extra `[beam]`."""

import json
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("apache_beam")


def test_several_workers_give_the_same_bytes(tmp_path, real_videos):
    for name, extra in (("plain", ()), ("beam", ("--runner=DirectRunner", "--direct_num_workers=2"))):
        words = [sys.executable, "-m", "videomae_jax", "prepare", str(real_videos), str(tmp_path / name)]
        words += ["--shard_videos=3", "--processes=1"]
        if extra:
            words.append(f"--beam_options={' '.join(extra)} --direct_running_mode=multi_processing")
        subprocess.run(words, check=True, cwd=ROOT)
    plain, beam = (
        {path.name: path.read_bytes() for path in pathlib.Path(tmp_path, name).rglob("*") if path.is_file()}
        for name in ("plain", "beam")
    )
    assert plain == beam
    assert json.loads(plain["manifest.json"])["records"] == 13
