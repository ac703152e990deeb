"""Checkpoints of a run: saved in the background, whole or not at all, restored where the mesh wants them.

Beside them the best weights so far, an export.
"""

import math
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from videomae_jax import hosts, storage
from videomae_jax.config import UserError
from videomae_jax.interop import export
from videomae_jax.storage import Place
from videomae_jax.training import report
from videomae_jax.training.step import TrainState


class Checkpoints:
    """WORKDIR/checkpoints/STEP: the items `params`, `optimizer` (all else of the state), `meta` (JSON).

    Use it as a context manager.

    Args:
        keep_last: how many of the newest to keep.
        keep_every: keep those of every so many steps for ever; 0: none.
        exported: parts of the parameters that are `params`, the others stand in `optimizer`; (): all.
    """

    def __init__(self, workdir: Place, keep_last: int, keep_every: int, exported: tuple[str, ...] = ()):
        self._exported = exported
        self.folder = storage.at(workdir) / "checkpoints"
        policies: list[Any] = [checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        # It would ask JAX with the numbers of steps, and JAX has one counter, which is `hosts.Interrupt`'s.
        self._manager.reached_preemption = lambda step: False

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None without one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts to save `state`; says whether the save before failed, which may have been for a moment.

        Raises:
            UserError: the folder cannot be written.
        """
        step = int(state.step)
        try:
            self.wait()
        except UserError as error:
            report.say(f"warning: {error}; trying step {step} now")
        if step == self.latest_step:
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(self._divided(state)[0]),
                    optimizer=ocp.args.StandardSave(self._divided(state)[1]),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except Exception as error:  # Orbax and TensorStore have no common error for a full disk
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when all that was saved is complete on disk.

        Raises:
            UserError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        reason = str(error).strip().split("\n")[0][:300]
        step = export.newest_step(self.folder)
        kept = f"step {step} is intact" if step is not None else "none was complete"
        return UserError(
            f"checkpoint not saved in {self.folder} ({type(error).__name__}: {reason}): free some space or "
            f"choose another --workdir, then run the same command again; of the earlier ones {kept}"
        )

    def restore(self, abstract: TrainState, shardings: Any) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint as (state, meta), each leaf placed by `shardings`."""
        shapes = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        restored = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(self._divided(shapes)[0]),
                optimizer=ocp.args.StandardRestore(self._divided(shapes)[1]),
                meta=ocp.args.JsonRestore(),
            ),
        )
        rest = restored["optimizer"]
        params = restored["params"] | rest.pop("other_params", {})
        return TrainState(params=params, **rest), restored["meta"]

    def _divided(self, state: TrainState) -> tuple[Any, dict[str, Any]]:
        """The items `params` and `optimizer` of a state."""
        rest = {name: tree for name, tree in state._asdict().items() if name != "params" and tree is not None}
        if not self._exported:
            return state.params, rest
        parts: tuple[dict, dict] = ({}, {})
        for name, tree in state.params.items():
            parts[name not in self._exported][name] = tree
        return parts[0], rest | ({"other_params": parts[1]} if parts[1] else {})

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Waits for a save in progress and releases the manager's threads."""
        self._manager.close()


class Best:
    """WORKDIR/best: an export of the weights whose validation was the best so far.

    In a store, where folders cannot be renamed, it is WORKDIR/best/STEP: `export.find` takes the newest.

    Attributes:
        found: {"step", "NAME"} of the best validation; None before the first. Checkpoints store it.
    """

    def __init__(self, workdir: Place, metric: str):
        self.folder, self.metric = storage.at(workdir) / "best", metric
        self._partial = self.folder.with_name("best.partial")
        self.found: dict[str, Any] | None = None

    def restore(self, found: dict[str, Any] | None) -> None:
        """Goes on from what a checkpoint stored, or from the weights that are there if they are better.

        A run that was killed after its last checkpoint may have left such; computed again on other devices
        they need not be. None are there that could be tested: what was found is found again.
        """
        if not self.metric:
            return
        kept = hosts.gather(self._kept() if hosts.is_writer() else {})[0]
        value = kept.get(f"validation_{self.metric}", -math.inf)
        self.found = found if kept else None
        if value > (self.found or {self.metric: -math.inf})[self.metric]:
            self.found = {"step": kept["step"], self.metric: value}

    def _kept(self) -> dict[str, Any]:
        """The validation of the weights that are there; ends a move that a kill interrupted."""
        is_half_moved = not export.is_whole(self.folder) and export.is_whole(self._partial)
        if is_half_moved and not storage.is_remote(self.folder):
            storage.remove_tree(self.folder)
            self._partial.rename(self.folder)
        try:
            return export.read_metadata(self.folder)["validation"]
        except export.ExportError:
            return {}

    def look(self, step: int, validated: dict[str, float], params: Any, meta: dict[str, Any]) -> None:
        """Keeps `params` if validation after `step` is better than ever; the first of equals stays.

        Weights with an output that is not finite are never kept.
        """
        value = validated[f"validation_{self.metric}"]
        if (
            validated.get("validation_not_finite")
            or not value > (self.found or {self.metric: -math.inf})[self.metric]
        ):
            return
        self.found = {"step": step, self.metric: value}
        is_remote = storage.is_remote(self.folder)
        new = self.folder / str(step) if is_remote else self._partial
        if hosts.is_writer():
            storage.remove_tree(new)
        hosts.wait("best, before")
        export.write(new, params, meta | {"validation": {"step": step, **validated}})
        if hosts.is_writer() and is_remote:
            for other in [place for place in self.folder.iterdir() if place.name != new.name]:
                storage.remove_tree(other)
        elif hosts.is_writer():
            storage.remove_tree(self.folder)
            new.rename(self.folder)
        hosts.wait("best, after")
