"""Does a data set ask for motion? A masked autoencoder against the same one that sees one time slice.

    .venv/bin/python benchmarks/one_slice.py --workdir=runs/one_slice
    .venv/bin/python benchmarks/one_slice.py --config=small --workdir=runs/one_slice

The second model is trained on clips of a single tubelet's frames, as many times more of them a step: as many
tokens, predicted as often, and none can look at another time. Where it fills in hidden places as well as the
full model, nothing about motion need be learnt. PSNR of held-out videos, mean loss of the last sixth. Prints
one table and one JSON line. A finished run is not repeated.
"""

import argparse
import json
import pathlib
import statistics
import time

from methods import settings, show, train


def run(name: str, steps: int, seed: int, slices: int, workdir: pathlib.Path) -> dict[str, float]:
    """One model on clips of so many slices; 0: as the config has it."""
    config = settings(name, "stage=pretrain" if name == "study" else "", seed)
    config.optim.update(unit="steps", duration=steps, warmup=steps // 20)
    config.checkpoint.every = steps
    kind = "full"
    if slices:
        times = config.data.frames // (slices * config.model.tubelet[0])
        config.data.frames = slices * config.model.tubelet[0]
        config.data.batch_size *= times
        config.optim.lr /= times  # the rate itself stays
        kind = "one slice"
    folder = workdir / f"{name}_{kind.replace(' ', '_')}_{steps}_{seed}"
    summary = train(config, folder)
    if summary["interrupted"]:
        raise SystemExit(f"{folder} was interrupted: remove its summary.json, then the same command goes on")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["step"] > steps * 5 // 6]
    return {
        f"{kind}, dB": summary["reconstruction"]["psnr_hidden"],
        f"{kind}, loss": statistics.fmean(losses),
    }


def main() -> None:
    """Both models with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", choices=("study", "small"), default="study")
    parser.add_argument("--workdir", default="runs/one_slice")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    started, workdir = time.time(), pathlib.Path(arguments.workdir).absolute()
    runs = [
        run(arguments.config, arguments.steps, seed, 0, workdir)
        | run(arguments.config, arguments.steps, seed, 1, workdir)
        for seed in range(arguments.seeds)
    ]
    show(runs, arguments, started)


if __name__ == "__main__":
    main()
