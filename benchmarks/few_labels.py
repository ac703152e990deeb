"""What pretraining is worth with few labels: 10 labelled videos per class, pretrained against from scratch.

    .venv/bin/python benchmarks/few_labels.py --pretrained=runs/small --workdir=runs/few_labels

Both sides are the same model, recipe and steps (configs/finetune.py:size=tiny on the generated data); only
`init_from` differs. Each is run with every seed; the figure is the top-1 of the multi-view test of the best
validated weights. Prints one table and one JSON line. A finished run is not repeated, so the same command
goes on after an interruption.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import time

from videomae_jax.tasks import table

_CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "finetune.py"


def config(per_class: int, steps: int, init_from: str, seed: int):
    """The settings of one run."""
    spec = importlib.util.spec_from_file_location("finetune", _CONFIG)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("size=tiny,data=moving_shapes")
    c.init_from, c.seed = init_from, seed
    c.data.max_videos_per_class = per_class
    c.optim.update(unit="steps", duration=steps, warmup=steps // 10)
    c.evaluate.every = c.checkpoint.every = max(steps // 5, 1)
    return c


def main() -> None:
    """Runs both sides with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--workdir", default="runs/few_labels")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    started, result = time.time(), {}
    for side, weights in (("pretrained", arguments.pretrained), ("scratch", "")):
        figures = []
        for seed in range(arguments.seeds):
            workdir = pathlib.Path(arguments.workdir, f"{side}_{arguments.per_class}_{seed}")
            settings = config(arguments.per_class, arguments.steps, weights, seed)
            summary = table.train(settings, workdir, time.time())
            figures.append(summary["test"]["best"]["top1"])
        result[side] = figures
    print(f"{'':12}{'mean':>8}{'spread':>8}  seeds")
    for side, figures in result.items():
        each = "  ".join(f"{x:.3f}" for x in figures)
        print(f"{side:12}{statistics.mean(figures):8.3f}{max(figures) - min(figures):8.3f}  {each}")
    gain = statistics.mean(result["pretrained"]) - statistics.mean(result["scratch"])
    print(f"pretraining is worth {100 * gain:+.1f} points with {arguments.per_class} videos per class")
    seconds = round(time.time() - started)
    print(json.dumps({**vars(arguments), **result, "gain": gain, "seconds": seconds}))


if __name__ == "__main__":
    main()
