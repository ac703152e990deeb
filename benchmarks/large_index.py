"""What it takes to open prepared data of very many videos: seconds and memory, of an index without videos.

    .venv/bin/python benchmarks/large_index.py --rows=10000000

A folder with the manifest and index of that many records is written to a temporary place. A fresh process
opens it, holds 256 videos out and hashes what is left, as every run does; then it sends it to two loader
processes, which look up records in the shuffled order. Private memory is what a process has for itself;
mapped files are everybody's. Prints one JSON line.
"""

import argparse
import json
import multiprocessing
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import grain

from videomae_jax import storage
from videomae_jax.data import index, prepared, sources

_SHARD = 4096  # records


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Lines of the table of records, as far as the index has them: names as long as those of Kinetics."""
    for i in range(count):
        yield {
            "id": f"class_{i % 700:03d}/{i * 2654435761 % 2**32:08x}_000010.mp4",
            "label": i % 700,
            "place": str(i % _SHARD * 2_500_000),
            "length": "2500000",
            "check": str(i % 2**32),
        }


def write(folder: pathlib.Path, count: int) -> None:
    """A manifest and an index of `count` records."""
    index.write(folder, "train", index.make(rows(count)))
    lengths = [min(_SHARD, count - start) for start in range(0, count, _SHARD)]
    manifest = {
        "format": prepared.FORMAT,
        "name": "large",
        "splits": {"train": {"records": count, "shard_lengths": lengths}},
        "classes": [f"class_{i:03d}" for i in range(700)],
        "head": "softmax",
        "hash": f"{count:064d}",
    }
    storage.write_text(folder / prepared.MANIFEST, json.dumps(manifest))


def private_mb() -> float:
    """Memory that this process has written and shares with no other, in MB."""
    text = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"Private_Dirty: +(\d+) kB", text)) / 1e3


def look_up(packed: bytes, results: Any) -> None:
    """A loader process: names of a thousand videos in the shuffled order."""
    start, before = time.perf_counter(), private_mb()
    source: sources.Source = pickle.loads(packed)
    order = grain.MapDataset.range(len(source)).seed(0).shuffle()
    names = {source.ids[int(order[i])] for i in range(1000)}  # pyright: ignore[reportArgumentType]
    results.put((len(names), time.perf_counter() - start, private_mb() - before))


def measure(folder: str) -> dict[str, Any]:
    """Opens a folder as a run does."""
    base, times, clock = private_mb(), {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        times[name], clock = time.perf_counter() - clock, time.perf_counter()

    source = prepared.open_source(folder, "train")
    lap("open_s")
    kept, held = sources.hold_out(source, 256)
    lap("hold_out_s")
    kept.fingerprint(), held.fingerprint()
    lap("fingerprint_s")
    packed = pickle.dumps(kept)
    lap("pickle_s")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=look_up, args=(packed, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {
        "rows": len(source),
        **times,
        "opened_s": sum(times.values()),
        "private_mb": private_mb() - base,
        "worker_s": max(seconds for _, seconds, _ in found),
        "worker_private_mb": max(memory for _, _, memory in found),
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", help="measure one that is there")
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps({k: round(v, 3) for k, v in measure(arguments.folder).items()}))
        return
    with tempfile.TemporaryDirectory() as name:
        write(pathlib.Path(name), arguments.rows)
        files = sum(file.stat().st_size for file in (pathlib.Path(name) / index.FOLDER).iterdir())
        print(f"index: {files / 1e6:.0f} MB on disk", flush=True)
        subprocess.run([sys.executable, __file__, f"--folder={name}"], check=True)


if __name__ == "__main__":
    main()
