"""The order of samples, and the loader that fetches them."""

import atexit
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.errors import TrainingError, out_of_memory
from util.processes import signals
from util.processes.collectives import warn

PREFETCH = 2  # batches that each worker works ahead
IN_USE = 3  # batches beside those: under way to the device, in the step, and held until its flags are read


class Batch(NamedTuple):
    """A batch of our loaders: its type tells it from a client's, whose third entry may be anything."""

    images: torch.Tensor  # (N, C, H, W), or features (N, D)
    labels: torch.Tensor  # int64 (N,), or masks (N, H, W)
    indices: torch.Tensor  # int64 (N,), places in the data set


def open_batch(batch: Sequence | torch.Tensor) -> tuple:
    """(images, labels, indices) of a batch. Of a client's, images alone or a sequence, the first and the last
    entry are taken, as the reference's evaluation does, and None for what it has not.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, torch.Tensor):
        return batch, None, None
    return batch[0], batch[-1] if len(batch) > 1 else None, None


def collate(samples: list[tuple]) -> Batch:
    """[(image (C, H, W), label or mask, index), ...] -> a batch.

    Images with the channels innermost in memory are stacked as they lie, which is three times as fast.
    """
    images, *others = zip(*samples, strict=True)
    if images[0].dim() == 3 and images[0].permute(1, 2, 0).is_contiguous():
        stacked = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    else:
        stacked = default_collate(list(images))
    tensors = (torch.stack(c) if isinstance(c[0], torch.Tensor) else torch.tensor(c) for c in others)
    return Batch(stacked, *tensors)


def _init_worker(worker_id: int) -> None:
    """One thread a worker, because there is one worker a core; signals are for the main process to handle.

    Schedulers signal all processes of a job: a worker that died of it would take the saving process with it.
    Workers end when their loader closes, when the main process ends (`_end_workers`), or when it is gone.
    """
    torch.set_num_threads(1)
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Ends what is left of workers before multiprocessing does, with a SIGTERM that they ignore."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a worker's failure
    for process in children:
        process.kill()


_saver_is_there = False  # a RunGuard, which saves and ends the run when a worker is lost
_lost_worker = ""


def go_on_without_workers(active: bool) -> None:
    """Whether a loader that loses a worker reads on by itself, until `lost_worker` is seen and the run saved;
    else (and at first) it raises. Forgets what was lost.
    """
    global _saver_is_there, _lost_worker
    _saver_is_there, _lost_worker = active, ""


def lost_worker() -> str:
    """What happened to a worker of this process, for an error's line; "" when none was lost."""
    return _lost_worker


class ImageLoader(DataLoader):
    """A DataLoader that outlives its workers, and asks them to leave when the interpreter exits while it is
    still in use, as an error's traceback keeps it. Torch would wait 5 s for each then, if batches are pinned.

    Where a worker dies (killed when memory runs out), batches come on from this process, the same ones and
    slowly, for a run to be saved (`go_on_without_workers`).

    Raises:
        TrainingError: a worker died, and there is no run to save.
    """

    _alone = False  # a worker was lost

    def __iter__(self) -> Iterator:
        if self.num_workers == 0:
            return super().__iter__()
        iterator = None
        try:
            iterator = None if self._alone else self._start_workers()
        except Exception as error:  # an idle worker died since the last epoch
            self._part_with_workers(error)
        return self._batches(iterator)

    def _start_workers(self) -> Iterator:
        main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
        handler = signal.getsignal(signal.SIGCHLD) if main else None
        iterator = super().__iter__()
        if main:  # torch's handler would raise wherever the main process is, also amid an optimizer step
            of_torch = getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if of_torch else handler or signal.SIG_DFL)
        if not hasattr(iterator, "stopped_at_exit"):
            iterator.stopped_at_exit = True
            atexit.register(_stop_workers, weakref.ref(iterator), os.getpid())  # the last one runs first
        return iterator

    def _batches(self, iterator: Iterator | None) -> Iterator[list[torch.Tensor]]:
        done = 0
        while not self._alone:
            try:
                batch = next(iterator, None)
            except Exception as error:
                self._part_with_workers(error)
                break
            if batch is None:
                return
            done += 1
            yield batch
        read = getattr(self.dataset, "__getitems__", lambda batch: [self.dataset[key] for key in batch])
        for batch in itertools.islice(self.batch_sampler, done, None):
            yield self.collate_fn(read(batch))

    def _part_with_workers(self, error: Exception) -> None:
        """Ends the workers where one has died or has no more memory; raises any other `error` of theirs."""
        global _lost_worker
        iterator, self._iterator = self._iterator, None
        workers = getattr(iterator, "_workers", [])
        if dead := [worker for worker in workers if not worker.is_alive()]:
            known = {-9: "was killed (SIGKILL), as when memory runs out",
                     -7: "died of SIGBUS, as when /dev/shm is full"}  # fmt: skip
            how = known.get(dead[0].exitcode, f"ended with status {dead[0].exitcode}")
            text = f"loader worker {dead[0].pid} {how}"
        elif out_of_memory(error) and _saver_is_there:
            text = "a loader worker has no more memory"
        else:
            raise error
        advice = "take fewer --num_workers or a smaller --batch_size"
        if not _saver_is_there:
            raise TrainingError(f"{text}; {advice}") from None
        _lost_worker, self._alone = f"{text}; {advice}", True
        warn(f"{text}; this process reads on alone, until the run is saved")
        for worker in workers:
            worker.kill()
        if iterator is not None:
            iterator._shutdown_workers()


def _stop_workers(reference: weakref.ref, owner: int) -> None:
    """Lets an iterator's workers finish what they are at and leave; not in processes forked off its owner."""
    iterator = reference()
    if iterator is not None and os.getpid() == owner:
        iterator._shutdown_workers()


def _that_fit(dataset: Dataset, batch_size: int, num_workers: int, pin_mem: bool) -> tuple[int, int, bool]:
    """Workers, batches that each may work ahead, and whether batches are page-locked, in the memory there is
    for each of the processes of this machine: /dev/shm (64 MB in a container by default), where with more the
    workers would die of a bus error, and half of what is free, as locked pages cannot be moved out. Warns
    where they are fewer than `num_workers`, or not locked.
    """
    batch = dataset[0][0].nbytes * batch_size if num_workers or pin_mem else 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = locked = math.inf
    if num_workers and os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        room = free // (batch * processes) - 2
    if pin_mem:
        from util.compute.memory import free_memory  # a CPU does without

        left, block = free_memory(), 1 << (batch - 1).bit_length()  # as torch rounds each up
        locked = left // (2 * block * processes) - IN_USE
    for pin, room_now in ((pin_mem, min(room, locked)), (False, room)):
        for prefetch in range(PREFETCH, 0, -1):
            if num_workers * prefetch <= room_now:
                if pin_mem and not pin:
                    warn(
                        "batches are not page-locked, so copies to the GPU are slower: half of the free "
                        f"memory ({left / 1e9:.1f} GB) does not hold {num_workers + IN_USE} batches of "
                        f"{block / 1e6:.0f} MB for each of {processes} processes; take a smaller "
                        "--batch_size or fewer --num_workers"
                    )
                return num_workers, prefetch, pin
    workers = int(max(0, room))
    warn(
        f"--num_workers {num_workers}: {workers} are used, as /dev/shm ({free / 1e6:.0f} MB free) has "
        "room for no more: take a smaller --batch_size, or docker run --ipc=host or --shm-size"
    )
    return workers, 1, pin_mem and workers <= locked


def build_loader(
    dataset: Dataset,
    sampler: Sampler,
    batch_size: int,
    num_workers: int = 0,
    pin_mem: bool = False,
    drop_last: bool = False,
) -> DataLoader:
    """An `ImageLoader` over (image, label, index) samples, with the batches of `collate`.

    Workers live as long as the loader, work PREFETCH batches ahead and use one thread each. An unreadable
    image ends the iteration with BadImage, a UserError of one line, also out of a worker. The global random
    generators are neither read nor advanced.

    Args:
        num_workers: at most; fewer where their batches would not fit into shared memory.
        pin_mem: page-locked batches, for copies to a GPU that do not wait; where memory has the room.
    """
    num_workers, prefetch, pin_mem = _that_fit(dataset, batch_size, num_workers, pin_mem)
    return ImageLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_mem,
        drop_last=drop_last,
        collate_fn=collate,
        generator=torch.Generator(),  # its draw of worker seeds must not move the training's generator
        prefetch_factor=prefetch if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=_init_worker,
    )
