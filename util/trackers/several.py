"""`--tracker`: what TensorBoard's writer is told, told to other trackers of experiments as well.

A tracker is a module of this room with five functions over a handle that the first returns:

    start(settings, folder, name, run_id) -> handle     run_id: of the run, None without --output_dir
    scalars(handle, values, epoch)                      {name: number} at a fractional epoch
    picture(handle, name, image, epoch)                 uint8 (H, W, 3)
    checkpoint(handle, path)                            a file of the run, for --track_checkpoints
    finish(handle)

A tracker that fails is left out from then on, with a warning; training goes on.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from util.errors import UserError
from util.processes.collectives import is_main_process, warn
from util.weights.names import is_inside_epoch, list_checkpoints

PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow-skinny"}  # tracker: what pip installs


def check_installed(names: list[str]) -> None:
    """Raises UserError for a tracker whose package is not there, and for others beside none."""
    if "none" in names and len(set(names)) > 1:
        raise UserError(f"--tracker {' '.join(names)}: none stands alone")
    for name in names:
        # A mere folder of that name is found too, but has no origin
        if name in PACKAGES and not getattr(importlib.util.find_spec(name), "origin", None):
            raise UserError(f"--tracker {name}: is not installed; pip install {PACKAGES[name]}")


class Several:
    """A log writer as `util.run.run_log.CurveWriter`, for all of `writers`."""

    def __init__(self, writers: list):
        self.writers = writers

    def __getattr__(self, name: str) -> Callable:
        def tell(*args, **kwargs) -> None:
            for writer in self.writers:
                getattr(writer, name)(*args, **kwargs)

        return tell


class Tracked:
    """The part of a log writer's calls that the scripts make, for the tracker `name`.

    Args:
        run_id: of the run. output_dir: its folder, "" for none. log_dir: where the tracker may keep files.
        checkpoints: also hand over the checkpoints of whole epochs that the run writes.
    """

    def __init__(self, name: str, run_id: str | None, output_dir: str, log_dir: str, checkpoints: bool):
        self.name, self.run_id, self.handle, self.values, self.x = name, run_id, None, {}, None
        self.failed = False
        self.output_dir, self.log_dir = output_dir, log_dir or output_dir or "."
        self.checkpoints, self.sent = checkpoints, set()

    def _try(self, function: str, *args):
        """What the tracker's `function` returns; after the first failure nothing is called any more."""
        if self.failed:
            return None
        try:
            return getattr(importlib.import_module(f"util.trackers.{self.name}"), function)(*args)
        # Other people's code, on a network: whatever it is, training goes on
        except (Exception, SystemExit) as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            warn(f"--tracker {self.name}: no more of it from here on ({text})")
            self.failed = True

    def add_run(self, text: str, settings: dict, metrics, step: int) -> None:
        """Starts the run there, or goes on with it if it is the run of the same id."""
        if self.checkpoints:
            self.sent = set(self._checkpoints())  # what was there before is an earlier start's
        name = Path(self.output_dir).resolve().name if self.output_dir else "run"
        folder = Path(self.log_dir).resolve()
        self.handle = self._try("start", settings, folder, name, self.run_id)

    def add_scalar(self, name: str, value: float, x: float) -> None:
        """A point of a curve; those of one x go together. x: 1000 epochs; of "perf/" curves the epoch."""
        x = x if name.startswith("perf/") else x / 1000
        if x != self.x:
            self._send()
        self.x, self.values[name] = x, float(value)

    def add_image(self, name: str, image: np.ndarray, x: float, dataformats: str = "HWC") -> None:
        """A picture, uint8 (H, W, 3)."""
        self._send()
        self._try("picture", self.handle, name, image, x / 1000)

    def flush(self) -> None:
        self._send()
        for path in self._checkpoints() if self.checkpoints else ():
            if path not in self.sent:
                self.sent.add(path)
                self._try("checkpoint", self.handle, path)

    def close(self) -> None:
        self.flush()
        self._try("finish", self.handle)

    def _send(self) -> None:
        values, self.values = self.values, {}
        if values:
            self._try("scalars", self.handle, values, self.x)

    def _checkpoints(self) -> list[Path]:
        there = list_checkpoints(Path(self.output_dir)) if self.output_dir else []
        return [path for path in there if not is_inside_epoch(path)]


def open_writers(log_dir: str | Path | None, purge_step: int | None, args, run_id: str | None):
    """The writer of curves on the first process: TensorBoard's, or what `args.tracker` names; None elsewhere
    and where nothing is to be written.

    `purge_step`: x from which a resumed run draws again; what an earlier one drew there is hidden.

    Raises:
        UserError: the folder cannot be written.
    """
    names = [name for name in getattr(args, "tracker", ["tensorboard"]) if name != "none"]
    if not is_main_process():
        return None
    writers = []
    if log_dir and "tensorboard" in names:
        from util.trackers.tensorboard import CurveWriter

        try:
            writers.append(CurveWriter(log_dir, purge_step))
        except OSError as error:
            raise UserError(f"--log_dir {log_dir}: cannot be written ({error.strerror})") from None
    for name in names:
        if name != "tensorboard":
            writers.append(Tracked(name, run_id, args.output_dir, log_dir, args.track_checkpoints))
    return Several(writers) if len(writers) > 1 else next(iter(writers), None)
