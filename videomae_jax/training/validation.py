"""When to validate, what became of it, and whether it is worth going on."""

import time

import jax

from videomae_jax.training import checkpoint, report, step
from videomae_jax.training.task import Run, Task, Validate


class Validation:
    """Validates the weights of a run, and keeps the best.

    Attributes:
        best: the best weights so far, where the task has such.
    """

    def __init__(self, run: Run, task: Task):
        self._run, self._task = run, task
        self._every, self._total = run.schedule.evaluate_steps, run.schedule.total_steps
        self.best = checkpoint.Best(run.workdir, task.best_by)
        self._validate: Validate | None = None
        if self._every or task.best_by:
            self._validate = task.validator(run)

    def is_due(self, done: int) -> bool:
        """Whether validation follows step number `done` (from 1)."""
        is_time = self._every > 0 and done % self._every == 0
        is_last = done == self._total
        return self._validate is not None and (is_time or is_last)

    def look(self, state: step.TrainState, log: report.Report) -> dict[str, float]:
        """Validates the weights, averaged ones where there are any; keeps them if they are the best."""
        assert self._validate
        params = jax.block_until_ready(state.params if state.ema is None else state.ema)
        started = time.perf_counter()
        found = self._validate(params, int(state.step))
        if self._task.best_by:
            parts = self._task.exported or tuple(params)
            kept = {name: params[name] for name in parts}
            self.best.look(int(state.step), found, kept, self._task.metadata())
        log.exclude(time.perf_counter() - started)
        return found

    def is_hopeless(self, done: int) -> bool:
        """Whether `optim.patience` validations in a row up to step `done` were no better than the best."""
        patience, best = self._run.config.optim.patience, self.best.found
        return bool(patience and best and done - best["step"] >= patience * self._every)
