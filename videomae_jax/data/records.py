"""A prepared record as TFDS has it: its features, its bytes, and the metadata of a folder of shards."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from videomae_jax import storage
from videomae_jax.data import transcode
from videomae_jax.data.collection import Collection, Entry


def features(collection: Collection) -> Any:
    """The features of a record, as TFDS has them."""
    import tensorflow_datasets as tfds

    kinds = tfds.features
    has_targets, count = collection.head != "softmax", len(collection.classes)
    names = list(collection.classes)
    label = kinds.ClassLabel(names=names) if names and not has_targets else np.int32
    return kinds.FeaturesDict(
        {
            "video": kinds.Tensor(shape=(), dtype=np.object_),
            "id": kinds.Text(),
            "label": label,
            **({"target": kinds.Tensor(shape=(count,), dtype=np.float32)} if has_targets else {}),
            "frames": np.int32,
            "fps": np.float32,
            "height": np.int32,
            "width": np.int32,
            "source_sha256": kinds.Text(),
            **{
                name: kinds.Tensor(shape=shape, dtype=np.dtype(dtype).type)
                for name, (shape, dtype) in collection.extra.items()
            },
        }
    )


def describe(collection: Collection) -> list[str]:
    """The features in one order, as the manifest has them."""
    return sorted(f"{name}: {feature}" for name, feature in features(collection).items())


def serialize(features: Any, collection: Collection, entry: Entry, video: transcode.Encoded) -> bytes:
    """A record's bytes, the same each time."""
    from tensorflow_datasets.proto import tf_example_pb2  # pyright: ignore

    example = {**dataclasses.asdict(video), "id": entry.id, "label": entry.label}
    del example["early"]  # in the table of records alone
    if collection.head != "softmax":
        example["target"] = np.asarray(entry.target, np.float32)
    for name, (shape, dtype) in collection.extra.items():
        example[name] = np.asarray(entry.extra[name], dtype).reshape([-1 if n is None else n for n in shape])
    # Serialised once more: the order of a protobuf map is not fixed by itself.
    data = features.serialize_example(example)
    message: Any = tf_example_pb2
    return message.Example.FromString(data).SerializeToString(deterministic=True)


def write_metadata(collection: Collection, folder: str, sizes: Mapping[str, tuple[list[int], int]]) -> None:
    """Writes what TFDS reads of a folder of shards; `sizes`: by split, the records of each, and all bytes.

    Once beside them, for `builder_from_directory(folder)`, and once in NAME/VERSION, where `tfds.load` and
    `tfds.data_source(NAME, data_dir=folder)` look. Stores (gs://) do not know "..": there only the first.
    """
    import tensorflow_datasets as tfds

    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=shards,
            num_bytes=num_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=epath.Path(folder),
                dataset_name=collection.name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, (shards, num_bytes) in sizes.items()
    ]
    identity = tfds.core.DatasetIdentity(
        name=collection.name, version=tfds.core.Version("1.0.0"), data_dir=folder, module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features(collection))
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)
    if not storage.is_remote(folder):
        place = storage.at(folder)
        about = json.loads((place / "dataset_info.json").read_text())
        for split in about["splits"]:
            split["filepathTemplate"] = f"../../{split['filepathTemplate']}"
        named = place / collection.name / about["version"]
        storage.write_text(named / "dataset_info.json", json.dumps(about, indent=2))
        for file in ("features.json", *(path.name for path in place.glob("*.labels.txt"))):
            storage.write_text(named / file, (place / file).read_text())
