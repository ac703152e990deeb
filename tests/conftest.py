"""Shared set-up: eight fake devices, parsed absl flags, and where the fixtures are."""

import importlib.util
import os
import pathlib
import shutil
import tempfile

import jax
import jaxtyping
import numpy as np
import pytest
import store
from absl import flags
from fsspec.registry import _registry
from jax.sharding import AxisType
from orbax.checkpoint._src.path import gcs_utils

from videomae_jax import config as settings
from videomae_jax import sharding
from videomae_jax.data import moving_scenes, moving_shapes
from videomae_jax.tasks import table
from videomae_jax.training import compute

# Compiling takes half as long, and nothing here is about speed.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_num_cpu_devices", 8)
# What one test compiled another need not, in whatever process; of this run of the tests only.
_IS_OURS = "JAX_COMPILATION_CACHE_DIR" not in os.environ  # not so in workers, which inherit it
COMPILED = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/compiled-{os.getpid()}"
)
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
flags.FLAGS.mark_as_parsed()


def pytest_sessionfinish():
    """Removes what was compiled."""
    if _IS_OURS:
        shutil.rmtree(COMPILED, ignore_errors=True)


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


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> pathlib.Path:
    """A few generated videos: SPLIT/CLASS/NUMBER.mp4."""
    spec = moving_shapes.MovingShapes(size=32, frames=16, videos=32, seed=0)
    return moving_shapes.generate(spec, tmp_path_factory.mktemp("cache"), processes=1)


@pytest.fixture(scope="session")
def boxed(tmp_path_factory) -> pathlib.Path:
    """A few generated videos with boxes, as `data.scenes` reads them."""
    spec = moving_shapes.MovingShapes(size=32, frames=16, videos=24, seed=0)
    return moving_scenes.generate(spec, tmp_path_factory.mktemp("cache"), processes=1)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """gs://bucket as a local folder; one for all tests, for libraries keep a file system that they opened."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "bucket").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for protocol in ("gs", "gcs"):
            patch.setitem(_registry, protocol, store.file_system(folder))
        yield folder / "bucket"


@pytest.fixture(scope="session")
def endpoint(bucket):
    """The same bucket for TensorStore, ArrayRecord and Orbax's remover of old checkpoints."""
    served = store.Endpoint(bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", served.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", served.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setattr(gcs_utils, "get_bucket", lambda _name: object())
        yield served
    served.close()


@pytest.fixture
def debug_config(shapes):
    """configs/debug.py on the generated videos."""
    return load_config("debug", f"data={shapes}")


def mesh_of(data: int, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over some of the fake devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh(
        (data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def task_of(config, train=None):
    """The task that a run with these settings trains."""
    return table.make_task(compute.on_this_machine(settings.checked(config)), train)


def finetune_config(shapes, **optim):
    """configs/debug.py:task=finetune on the generated videos, a few steps."""
    config = load_config("debug", f"data={shapes},task=finetune")
    config.optim.update(duration=12, **optim)
    return config


def load_config(name: str, arg: str = ""):
    """What `--config=configs/NAME.py:ARG` gives."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)
