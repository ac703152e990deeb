"""What became of each step: its figures, and those that changed nothing."""

import json
from typing import Any

import jax
import numpy as np

from videomae_jax import hosts, storage
from videomae_jax.data.sources import Source
from videomae_jax.training import report
from videomae_jax.training.feed import TrainingError


class Guard:
    """Fetches metrics and records steps that changed nothing because loss or gradient were not finite."""

    NAME = "skipped_steps.jsonl"

    def __init__(self, files: storage.Growing, source: Source, root: jax.Array, limit: int, start_step: int):
        self.path, self.source, self.limit = files.folder / self.NAME, source, limit
        self.place = files.place / self.NAME
        self.root = np.asarray(jax.random.key_data(root)).tolist()
        self.skipped = report.keep_lines(self.path, start_step) if hosts.is_writer() else 0
        self._in_a_row = 0

    def look(self, number: int, metrics: Any, host_fields: dict) -> dict[str, float]:
        """The metrics of step `number` (from 0) as numbers.

        Raises:
            TrainingError: the limit of skipped steps in a row is reached.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values["skipped"]:
            self._in_a_row = 0
            return values
        self.skipped += 1
        self._in_a_row += 1
        rows = hosts.gather([host_fields["record"].tolist(), host_fields["index"].tolist()])
        entry = {
            "step": number + 1,
            **{name: repr(values[name]) for name in ("loss", "grad_norm", "clips")},
            "videos": [self.source.ids[record] for records, _ in rows for record in records],
            "index": [place for _, index in rows for place in index],
            "root_key": self.root,
        }
        if hosts.is_writer():
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        report.say(
            f"step {number + 1} skipped: loss {values['loss']}, gradient norm {values['grad_norm']}, "
            f"{values['clips']:.0f} clips; its videos and keys are in {self.place}"
        )
        if self._in_a_row >= self.limit:
            raise TrainingError(
                f"{self._in_a_row} steps in a row had no usable gradient (optim.max_skipped), the last was "
                f"step {number + 1}: lower optim.lr or set optim.clip_norm; {self.place} names their videos"
            )
        return values
