"""Keeps a run from losing work: stop signals, saving by the clock, losses that are not finite, lost workers.

All processes must act at the same step, and no step may wait for a GPU. So after each optimizer step they
take the maximum of four flags (bad loss, stop, save, lost worker) in one small all-reduce. A CPU reads it at
once; on a GPU it is read two updates later, when it has long been there.
"""

import math
import signal
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from util.compute.precision import resolve_amp_dtype
from util.compute.prefetch import finish_copy, start_copy
from util.data.loader import collate, go_on_without_workers, lost_worker, open_batch
from util.errors import TrainingError, UserError
from util.files import some
from util.processes import signals
from util.processes.collectives import all_reduce_max, gather, get_rank, get_world_size, log, warn
from util.weights.schema import plain

BAD_LOSS = 2.0  # a flag; 1: a gradient alone
DELAY = 2  # optimizer steps after which a GPU's flags are read


class RunGuard:
    """Watches a training loop, which calls `watch` in each micro-step and `after_update` after each optimizer
    step.

    Args:
        args: if present accum_iter, max_steps, save_minutes, skip_nonfinite, output_dir, seed; for `epochs`
            also epochs, start_epoch, start_step.
        save: save(epoch, step, meters) writes a checkpoint inside an epoch, `step` micro-steps into it.
        dataset: has `path(index)`, to name the files of a bad batch, and is read again for it; or None.
        steps: micro-steps of an epoch.
        meters: of a checkpoint inside an epoch: states of the epoch's meters, one of each process.

    After the loop `stopped` says that the run shall end, `inside_epoch` that its state was saved in the
    epoch.
    """

    def __init__(
        self,
        args: Namespace,
        save: Callable | None = None,
        dataset=None,
        steps: int = 0,
        meters: list[dict] | None = None,
    ):
        self.args, self.save, self.dataset, self.steps, self.meters = args, save, dataset, steps, meters
        self.accum_iter, self.max_steps = getattr(args, "accum_iter", 1), getattr(args, "max_steps", 0)
        self.seed = getattr(args, "seed", None)
        self.output_dir = getattr(args, "output_dir", "")
        self.save_seconds = 60 * (getattr(args, "save_minutes", 0) or 0)
        self.allowed = getattr(args, "skip_nonfinite", 0) or 0
        self.start = self.last_save = time.monotonic()
        self.signum, self.stopped, self.inside_epoch, self.reached_max_steps = 0, False, False, False
        self.worker_lost = ""  # what happened to a loader's worker, of any process
        go_on_without_workers(save is not None)
        self.device = torch.device("cpu")
        self.scaled: bool | None = None  # whether a scaler, for fp16, handles gradients that are not finite
        self.bad_steps = self.bad_in_a_row = 0
        self.micro_steps: list[dict] = []  # since the last optimizer step
        self.pending: deque = deque()  # optimizer steps whose flags have not been read
        self.norms: deque = deque(maxlen=20)

    def epochs(self, sampler) -> Iterator[int]:
        """Yields the epochs from `args.start_epoch` to `args.epochs` while the run shall go on, each with
        `sampler` set to where it begins: the first one at micro-step `args.start_step`.
        """
        for epoch in range(self.args.start_epoch, self.args.epochs):
            start_step = self.args.start_step if epoch == self.args.start_epoch else 0
            if self.stopped or self.check_max_steps(epoch, start_step):
                return
            sampler.set_epoch(epoch, start_step)
            yield epoch

    def take_meters(self) -> dict:
        """This process's meters to go on with, once; none if there were other processes then."""
        meters, self.meters = self.meters or [], None
        return meters[get_rank()] if len(meters) == get_world_size() else {}

    def watch(self, batch: list, loss: torch.Tensor, epoch: int, step: int) -> None:
        """Notes a micro-step: its batch (see `util.data.loader.open_batch`) and its loss, a tensor not read
        now. Images are read again if need be; those without an index are kept of the last micro-step.
        """
        images, _, indices = open_batch(batch)
        indices = None if indices is None else indices.clone()  # not the loader's memory
        images = None if self._can_read(indices) else images
        for earlier in self.micro_steps:
            earlier["images"] = None
        entry = {"images": images, "indices": indices, "loss": loss, "epoch": epoch, "step": step}
        self.micro_steps.append(entry)

    def after_update(self, epoch: int, done: int, grad_norm: torch.Tensor | None, metrics) -> bool:
        """All processes call this after an optimizer step, `done` micro-steps into the epoch. True: leave the
        loop.

        Raises:
            TrainingError: more losses or gradients in a row were not finite than `skip_nonfinite` allows.
        """
        losses = torch.stack([entry["loss"] for entry in self.micro_steps])
        if self.scaled is None:
            amp_dtype = getattr(self.args, "amp_dtype", "auto")
            self.scaled = resolve_amp_dtype(amp_dtype, losses.device) == torch.float16
        self.device = losses.device
        late = bool(self.save_seconds) and time.monotonic() - self.last_save > self.save_seconds
        bad = BAD_LOSS * (~torch.isfinite(losses).all()).float()
        if grad_norm is not None and not self.scaled:  # a scaler finds its scale by gradients that overflow
            bad = torch.maximum(bad, (~torch.isfinite(grad_norm)).float())
        # Filled there: a copy of numbers from memory that is not pinned may wait for the device
        numbers = signals.requested() or 0, late, bool(lost_worker())
        own = [torch.full_like(bad, number) for number in numbers]
        flags = torch.stack([bad, *own])
        self.norms.append(grad_norm)
        self.pending.append((start_copy([all_reduce_max(flags)]), self.micro_steps))
        self.micro_steps = []
        save = False
        while len(self.pending) > (DELAY if losses.is_cuda else 0):
            save = self._read_oldest() or save

        self.check_max_steps(epoch, done)
        self.stopped = self.signum > 0 or self.reached_max_steps or bool(self.worker_lost)
        self.inside_epoch = self.stopped and done < self.steps
        if self.save is not None and (self.inside_epoch or (save and done < self.steps)):
            self.read_all()  # nothing is saved that has not been looked at
            self.save(epoch, done, gather(metrics.state_dict()))
            self.last_save = time.monotonic()
        return self.stopped

    def check_max_steps(self, epoch: int, done: int) -> bool:
        """Whether `max_steps` optimizer steps have been made, `done` micro-steps into an epoch."""
        updates = epoch * math.ceil(self.steps / self.accum_iter) + math.ceil(done / self.accum_iter)
        self.reached_max_steps = bool(self.max_steps) and updates >= self.max_steps
        return self.reached_max_steps

    def signal_came(self) -> bool:
        """Whether a signal has come to any process; all must ask. It ends the run."""
        signum = all_reduce_max(torch.tensor([float(signals.requested() or 0)], device=self.device))
        self.signum = max(self.signum, int(signum.item()))
        self.stopped = self.stopped or self.signum > 0
        return self.signum > 0

    def read_all(self) -> None:
        """Reads the flags that are still under way; call it before saving. Raises TrainingError as above."""
        while self.pending:
            self._read_oldest()

    def _read_oldest(self) -> bool:
        """Acts on the oldest flags that have not been read; returns whether it is time to save."""
        copy, micro_steps = self.pending.popleft()
        bad, signum, save, lost = finish_copy(*copy)[0].tolist()
        if signum and not self.signum:
            log(f"{signal.Signals(int(signum)).name}: saving and leaving")
        self.signum = int(max(self.signum, signum))
        if lost and not self.worker_lost:
            self.worker_lost = next(filter(None, gather(lost_worker())))
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if bad:
            self.bad_steps += 1
            self._report(micro_steps, bad == BAD_LOSS)
        return save > 0

    def _report(self, micro_steps: list[dict], of_loss: bool) -> None:
        """Writes what led to a loss (else a gradient) that is not finite, names files; stops at too many."""
        bad = [entry for entry in micro_steps if not torch.isfinite(entry["loss"])]
        # A gradient is that of all micro-steps: which one has spoilt it cannot be known
        entry = bad[0] if bad else micro_steps[-1]
        own = not of_loss or bool(bad)
        where = f"epoch {entry['epoch']}, step {entry['step']}"
        batches = [entry] if of_loss else micro_steps
        known = [e["indices"].tolist() for e in batches if self._can_read(e["indices"])]
        files = [self.dataset.path(index) for indices in known for index in indices]
        place = self._write(entry, files, micro_steps) if own else None
        tolerated = self.bad_in_a_row <= self.allowed
        if not own:
            text = f"{where}: the loss of another process is not finite"
        else:
            names = list(dict.fromkeys(files))  # each once: a batch may hold several crops of an image
            number = f" ({len(names)} in all)" if len(names) > 8 else ""
            value = entry["loss"].item()
            what = f"loss is {value}" if of_loss else f"gradient is not finite, though the loss is {value}"
            text = f"{where}: the {what}; no process made this step"
            text += f"; images: {some(names, 8)}{number}" if files else ""
            text += f"; the batch is in {place}" if place else ""
        if tolerated:
            warn(f"{text}; skipped ({self.bad_in_a_row} in a row, --skip_nonfinite {self.allowed})")
            return
        advice = "nothing was saved since; try a lower --blr, --clip_grad 1.0 or --amp_dtype bf16"
        if not own:  # leave the last word to the process that knows more
            time.sleep(2)
        raise TrainingError(f"{text}; {advice}, or --skip_nonfinite N")

    def _write(self, entry: dict, files: list[str], micro_steps: list[dict]) -> Path | None:
        """Writes `nonfinite-{step}.pth` (several processes: `-rank{r}`), loadable with weights_only."""
        if not self.output_dir:
            return None
        rank = f"-rank{get_rank()}" if get_world_size() > 1 else ""
        path = Path(self.output_dir) / f"nonfinite-{entry['step']}{rank}.pth"
        norms = [None if norm is None else float(norm) for norm in self.norms]
        # util.rng.seed_step with these four, and every draw of the step comes again
        rng = {"seed": self.seed, "rank": get_rank(), "epoch": entry["epoch"], "step": entry["step"]}
        content = {**entry, "loss": entry["loss"].item(), "files": files, "grad_norms": norms, "rng": rng}
        content["window"] = {e["step"]: e["indices"] for e in micro_steps}
        try:
            if self._can_read(entry["indices"]):
                content["images"] = self._read_again(entry)
            torch.save(plain(content), path)
        except (OSError, RuntimeError, UserError) as error:
            warn(f"{path}: not written: {error}")
            return None
        return path

    def _can_read(self, indices: torch.Tensor | None) -> bool:
        return indices is not None and hasattr(self.dataset, "path")

    def _read_again(self, entry: dict) -> torch.Tensor:
        """The images of a micro-step: a sample depends on seed, epoch and index alone."""
        repeats, epoch = getattr(self.args, "repeated_aug", 1), entry["epoch"]
        if getattr(self.args, "cache_features", False):
            epoch %= self.args.cache_views  # what the features were computed of
        keys = [(epoch, index, i % repeats) for i, index in enumerate(entry["indices"].tolist())]
        return collate([self.dataset[key] for key in keys])[0]

    def leave(self) -> None:
        """Call it when all is on disk. Raises `Interrupted` if a signal ended the run, and TrainingError (on
        the first process; others exit with 1) if a loader's worker was lost.
        """
        go_on_without_workers(False)
        if self.stopped and self.signum:
            raise signals.Interrupted(self.signum)
        if self.worker_lost:
            if getattr(self.args, "rank", 0) > 0:
                sys.exit(1)
            saved = (
                "saved; --resume auto goes on" if self.output_dir else "nothing is saved without --output_dir"
            )
            raise TrainingError(f"{self.worker_lost}; {saved}")
