"""Shared set-up: eight fake devices, parsed absl flags, and where the fixtures are."""

import os
import pathlib

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
flags.FLAGS.mark_as_parsed()

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = pathlib.Path(os.environ.get("VIDEOMAE_JAX_FIXTURES", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Numbers that the published code computed; see FIXTURES."""
    folder = FIXTURES / "golden" / "videomae_tiny"
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {FIXTURES}: set VIDEOMAE_JAX_FIXTURES")
    return folder


@pytest.fixture(scope="session")
def real_videos() -> pathlib.Path:
    """Real video files of many kinds; see FIXTURES."""
    folder = FIXTURES / "data" / "videos"
    if not folder.is_dir():
        pytest.skip(f"no videos at {FIXTURES}: set VIDEOMAE_JAX_FIXTURES")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def untyped():
    """Lets wrong types through to the code under test, as they come from users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
