"""Makes a curve of docs/reference from the log of a run, for `--config.log.reference`.

.venv/bin/python benchmarks/reference.py runs/small/log.jsonl docs/reference/small.jsonl
"""

import argparse
import pathlib

from videomae_jax.training import reference


def main() -> None:
    """Writes the thinned curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("log", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.out.write_text(reference.thinned(arguments.log.read_text()))


if __name__ == "__main__":
    main()
