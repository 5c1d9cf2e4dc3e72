"""The order of samples: of training, a permutation of each epoch; of evaluation, fixed groups."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from util.rng import derive_seed


class EpochSampler(Sampler):
    """Yields (epoch, index) for one process: its share of a permutation that depends on (seed, epoch) only.

    Process `rank` of R takes every R-th sample, so the first k batches of all processes are the first
    k * R * batch_size samples of the permutation, at any R. Nothing is padded: every process gets the same
    number of full batches, and the rest of the permutation is left out in this epoch.

    With `repeats` above 1 (repeated augmentation) it yields (epoch, index, repeat), repeat = 0, 1, ...: an
    image's samples follow each other and lie in one batch, and an epoch is `repeats` times as long.

    Args:
        length: of the data set, in images.
        batch_size: samples of a batch; a multiple of `repeats`.
        near: (shards, starts) of the images: the permutation is that of `near_order`, and of the images that
            all processes' batches take at a time, process `rank` takes a stretch and not every R-th.

    `len()` counts the samples of a whole epoch, also where `set_epoch` begins inside it.
    """

    def __init__(
        self,
        length: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        batch_size: int = 1,
        repeats: int = 1,
        near: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        if batch_size % repeats:
            raise ValueError(f"batches of {batch_size} samples do not hold whole images of {repeats} each")
        self.repeats, self.near = repeats, near
        self.length, self.num_replicas, self.rank = length, num_replicas, rank
        self.seed, self.batch_size, self.images = seed, batch_size, batch_size // repeats  # of a batch
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses the epoch and its first batch; those before are skipped without decoding."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return self.length // (self.num_replicas * self.images) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        rng = np.random.default_rng(derive_seed(self.seed, self.epoch))
        images, steps = self.images, len(self) // self.batch_size
        if self.near is None:
            order = rng.permutation(self.length)[self.rank :: self.num_replicas][: steps * images]
        else:
            order = near_order(*self.near, rng)[: steps * self.num_replicas * images]
            order = order.reshape(steps, self.num_replicas, images)[:, self.rank].ravel()
        epoch = self.epoch  # of this iteration, whatever is set while it runs
        for index in order[self.start_batch * images :]:
            if self.repeats == 1:
                yield epoch, int(index)
            else:
                yield from ((epoch, int(index), repeat) for repeat in range(self.repeats))


WINDOW, RUN = 16, 16  # shards that images are mixed in; neighbours that stay together


def near_order(shards: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation for stores that are slow to answer: neighbours are read together, at the price of one.

    Shards come in random order. Within each `WINDOW` of them, runs of `RUN` neighbours come at random, cut
    anew each time.

    Args:
        shards, starts: (n,), of each image: its shard and its place there, by which neighbours are known.

    Returns:
        int64 (n,).
    """
    places = np.lexsort((starts, shards))
    counts = np.bincount(shards)
    ends = np.cumsum(counts)
    present, order = rng.permutation(np.flatnonzero(counts)), []
    for first in range(0, len(present), WINDOW):
        runs = []
        for shard in present[first : first + WINDOW]:
            inside = places[ends[shard] - counts[shard] : ends[shard]]
            runs += np.split(inside, np.arange(rng.integers(1, RUN + 1), len(inside), RUN))
        order += [runs[i] for i in rng.permutation(len(runs))]
    return np.concatenate(order)


GROUP = 32  # samples per forward pass of an evaluation


class EvalSampler(Sampler):
    """Indices of one process's share of an evaluation: every num_replicas-th group of `GROUP`, in order.

    `epoch`: yields (epoch, index), for data sets whose augmentation depends on the epoch; None: plain
    indices.
    """

    def __init__(self, length: int, num_replicas: int = 1, rank: int = 0, epoch: int | None = None):
        self.epoch = epoch
        starts = range(rank * GROUP, length, num_replicas * GROUP)
        self.indices = [index for start in starts for index in range(start, min(start + GROUP, length))]

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        return iter(self.indices if self.epoch is None else [(self.epoch, index) for index in self.indices])

    def __len__(self) -> int:
        return len(self.indices)
