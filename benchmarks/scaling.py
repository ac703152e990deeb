"""What devices say to each other in a training step, from compiled programs, and what that allows.

    EXTRAS=plan launch/local.sh doctor                          (once: installs the TPU compiler)
    .venv/bin/python benchmarks/scaling.py --size=base --cells=v5e:1x1/1x1x1,v5e:2x2/4x1x1,v5e:16x16/32x8x1
    .venv/bin/python benchmarks/scaling.py --size=small --batch-per-device=4 --cells=cpu:8/8x1x1,cpu:8/2x2x2

A cell is TOPOLOGY/DATAxFSDPxTENSOR. Needs no accelerator: the step is compiled for each, as the command
`plan` does it, and its collectives are read from the program. Bounds are those of data sheets: matmuls at the
peak, memory and links at full bandwidth, ring algorithms. Prints one table and one JSON line.
"""

import argparse
import json
from typing import Any

from methods import settings

from videomae_jax.config import Config
from videomae_jax.tasks import table
from videomae_jax.training import ahead, plan

CELLS = "v5e:1x1/1x1x1,v5e:2x2/4x1x1,v5e:2x2/1x4x1,v5e:2x2/1x2x2,v5e:16x16/256x1x1,v5e:16x16/32x8x1"


def meshed(config: Config, mesh: str, batch_per_device: int) -> Config:
    """The settings on a mesh "4x1x1", so many clips for each of its devices."""
    data, fsdp, tensor = (int(size) for size in mesh.split("x"))
    config.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    config.data.batch_size = batch_per_device * data * fsdp * tensor
    return config


def main() -> None:
    """Plans every cell, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="base", choices=["small", "base", "large", "huge"])
    parser.add_argument("--batch-per-device", type=int, default=16)
    parser.add_argument("--cells", default=CELLS)
    arguments = parser.parse_args()
    ahead.without_devices()
    rows: list[dict[str, Any]] = []
    for cell in arguments.cells.split(","):
        topology, _, mesh = cell.partition("/")
        config = settings("pretrain", f"size={arguments.size},data=k400")
        config = meshed(config, mesh, arguments.batch_per_device)
        rows.append({"cell": cell} | plan.run(config, table.make_task, ahead.topology(topology)))
    print(f"\nViT-{arguments.size} pretraining, {arguments.batch_per_device} clips per device; MiB per step")
    kinds = sorted({(each["kind"], *each["axes"]) for row in rows for each in row["collectives"]})
    print(
        f"{'topology/mesh':22}{'GiB':>7}"
        + "".join(f"{' '.join(kind):>30}" for kind in kinds)
        + f"{'bound':>20}"
    )
    for row in rows:
        cells = {(each["kind"], *each["axes"]): each for each in row["collectives"]}
        texts = [f"{cells[k]['times']} x, {cells[k]['mib']:.1f}" if k in cells else "-" for k in kinds]
        rate = row["bound_clips_per_second_per_device"]
        bound = f"{rate:.0f} cl/s {row['bound_by']}" if rate else ""
        total = row["argument_gib"] + row["temporary_gib"]
        print(f"{row['cell']:22}{total:7.2f}" + "".join(f"{text:>30}" for text in texts) + f"{bound:>20}")
    print(json.dumps({"size": arguments.size, "rows": rows}))


if __name__ == "__main__":
    main()
