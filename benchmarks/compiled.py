"""What XLA makes of our steps for devices that are not there: the figures of docs/performance.md.

    EXTRAS=plan,cuda launch/local.sh doctor                     (once: installs the compilers)
    .venv/bin/python benchmarks/compiled.py --topologies=v5e:2x2,h100:1
    .venv/bin/python benchmarks/compiled.py --topologies=h100:1 --rows=base,base-unrolled,finetune

Rows: pretraining of small, base, large and huge, finetuning, and other methods, at the batch per device that
the table here names. Each is planned as the command `plan` does it, and is in its cache afterwards. Nothing
here is a time.

Prints one table and one JSON line for each row. A compile takes half a minute for a GPU, three for a TPU.
"""

import argparse
import json
from typing import Any, NamedTuple

from methods import settings

from videomae_jax.tasks import table
from videomae_jax.training import ahead, plan


class Row(NamedTuple):
    """A config, clips per device on a TPU and on a GPU, and what is set beside it."""

    config: str
    argument: str
    tpu: int
    gpu: int
    changes: dict[str, Any]


ROWS = {
    "small": Row("pretrain", "size=small,data=k400", 16, 64, {}),
    "base": Row("pretrain", "size=base,data=k400", 16, 64, {}),
    "base-unrolled": Row("pretrain", "size=base,data=k400", 16, 64, {"model.unroll": 12}),
    "large": Row("pretrain", "size=large,data=k400", 8, 32, {}),
    "huge": Row("pretrain", "size=huge,data=k400", 8, 16, {}),
    "base-v2": Row("pretrain_v2", "size=base,data=k400", 16, 64, {}),
    "finetune": Row("finetune", "size=base,data=k400", 8, 16, {}),
    "moco": Row("moco", "size=base,data=k400", 8, 32, {}),
}


def planned(name: str, topology: ahead.Topology) -> dict[str, Any]:
    """What `plan` says of a row."""
    row = ROWS[name]
    config = settings(row.config, row.argument)
    per_device = row.gpu if topology.platform == "cuda" else row.tpu
    config.data.batch_size = per_device * len(topology.devices)
    for key, value in row.changes.items():
        section, _, field = key.partition(".")
        config[section][field] = value
    return {"row": name} | plan.run(config, table.make_task, topology)


def main() -> None:
    """Plans every row for every topology, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--topologies", default="v5e:2x2,h100:1")
    parser.add_argument("--rows", default=",".join(ROWS))
    arguments = parser.parse_args()
    ahead.without_devices()
    found = [
        planned(name, ahead.topology(topology))
        for topology in arguments.topologies.split(",")
        for name in arguments.rows.split(",")
    ]
    print(
        f"\n{'':16}{'on':10}{'clips':>6}{'GiB':>8}{'fits':>6}{'GB/clip':>9}{'on chip':>9}{'bound, cl/s':>14}"
    )
    for row in found:
        total = row["argument_gib"] + row["temporary_gib"]
        rate = row["bound_clips_per_second_per_device"] or 0
        print(
            f"{row['row']:16}{row['topology']:10}{row['clips_per_device']:6.0f}{total:8.2f}{row['fits']!s:>6}"
            f"{row['bytes_per_clip'] / 1e9:9.2f}{row['on_chip_bytes_per_clip'] / 1e9:9.2f}{rate:9.0f} "
            f"{row['bound_by']}"
        )
    for row in found:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
