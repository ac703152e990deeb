"""What methods beside plain pretraining give on generated data, at laptop scale and with several seeds.

    .venv/bin/python benchmarks/methods.py --study=latent  --workdir=runs/methods
    .venv/bin/python benchmarks/methods.py --study=distill --workdir=runs/methods
    .venv/bin/python benchmarks/methods.py --study=contrast --workdir=runs/methods

latent: attentive probe of a student of latent targets (half of the steps a masked autoencoder, which is the
teacher, half the student) against as many steps of the masked autoencoder alone.
distill: a student of a quarter of the width, from scratch, with and without a teacher (configs/finetune.py
after configs/small.py), 12 epochs each.
contrast: k-NN on MoCo v3's features while it trains.

Prints one table and one JSON line. The same command goes on after an interruption.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable

from videomae_jax.config import Config
from videomae_jax.tasks import table

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def settings(name: str, arg: str, seed: int = 0) -> Config:
    """What `--config=configs/NAME.py:ARG` gives, with a seed."""
    spec = importlib.util.spec_from_file_location(name, _CONFIGS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    config.seed = seed
    return config


def train(config: Config, workdir: pathlib.Path) -> dict:
    """The summary of a run; of a finished one nothing but its end is done again."""
    summary = table.train(config, workdir, time.time())
    if summary.get("interrupted"):
        raise SystemExit(f"{workdir} was interrupted: the same command goes on")
    return summary


def pretrained(workdir: pathlib.Path, steps: int, seed: int) -> pathlib.Path:
    """A masked autoencoder of so many steps."""
    config = settings("small", "", seed)
    config.optim.update(duration=steps, warmup=steps // 20)
    config.checkpoint.every = steps
    folder = workdir / f"pretrained_{steps}_{seed}"
    train(config, folder)
    return folder


def probed(encoder: pathlib.Path, seed: int) -> float:
    """Top-1 of an attentive probe."""
    config = settings("probe", "kind=attentive,size=tiny,data=moving_shapes", seed)
    config.init_from = str(encoder)
    return train(config, encoder.with_name(f"{encoder.name}_probe"))["evaluation"]["top1"]


def latent(workdir: pathlib.Path, steps: int, seed: int) -> dict[str, float]:
    """Stage two against more of stage one."""
    teacher = pretrained(workdir, steps // 2, seed)
    config = settings("latent", f"size=tiny,data=moving_shapes,teacher={teacher}", seed)
    config.optim.update(duration=steps - steps // 2, warmup=steps // 20)
    config.checkpoint.every = steps
    student = workdir / f"latent_{steps}_{seed}"
    train(config, student)
    more = pretrained(workdir, steps, seed)
    return {
        "stage two": probed(student, seed),
        "more of stage one": probed(more, seed),
    }


def distill(workdir: pathlib.Path, steps: int, seed: int) -> dict[str, float]:
    """A small student with and without a teacher."""
    config = settings("finetune", "size=tiny,data=moving_shapes")
    config.init_from = str(pretrained(workdir, steps, 0))
    teacher = workdir / f"teacher_{steps}"
    found = {"teacher": train(config, teacher)["test"]["best"]["top1"]}
    plain = settings("finetune", "size=tiny,data=moving_shapes", seed)
    taught = settings("distill", f"size=tiny,data=moving_shapes,teacher={teacher / 'best'}", seed)
    for name, student in (("alone", plain), ("taught", taught)):
        student.model.encoder.update(width=32, depth=4, num_heads=2, mlp_dim=128)
        student.optim.duration = 12
        summary = train(student, workdir / f"{name}_{steps}_{seed}")
        found[name] = summary["test"]["best"]["top1"]
    return found


def contrast(workdir: pathlib.Path, steps: int, seed: int) -> dict[str, float]:
    """The first and the last k-NN accuracy of a run."""
    config = settings("moco", "size=tiny,data=moving_shapes", seed)
    config.optim.update(unit="steps", duration=steps, warmup=steps // 10)
    config.evaluate.every = config.checkpoint.every = max(steps // 6, 1)
    folder = workdir / f"contrast_{steps}_{seed}"
    train(config, folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line["knn_top1"] for line in lines if "knn_top1" in line]
    return {"knn first": found[0], "knn last": found[-1], "feature_std": lines[-1]["feature_std"]}


def show(runs: list[dict[str, float]], arguments: argparse.Namespace, started: float) -> None:
    """Prints the table of all seeds and the JSON line."""
    print(f"{'':20}{'mean':>8}{'spread':>8}  seeds")
    for name in runs[0]:
        figures = [run[name] for run in runs]
        each = "  ".join(f"{x:.3f}" for x in figures)
        print(f"{name:20}{statistics.mean(figures):8.3f}{max(figures) - min(figures):8.3f}  {each}")
    print(json.dumps({**vars(arguments), "runs": runs, "seconds": round(time.time() - started)}))


def main() -> None:
    """Runs one study with every seed."""
    studies: dict[str, Callable] = {"latent": latent, "distill": distill, "contrast": contrast}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--study", choices=studies, required=True)
    parser.add_argument("--workdir", default="runs/methods")
    parser.add_argument("--steps", type=int, default=4800, help="in all; of the contrast, or the pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    started = time.time()
    runs = [
        studies[arguments.study](pathlib.Path(arguments.workdir).absolute(), arguments.steps, seed)
        for seed in range(arguments.seeds)
    ]
    show(runs, arguments, started)


if __name__ == "__main__":
    main()
