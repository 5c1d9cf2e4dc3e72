"""Random numbers that depend on positions, not on history.

Every draw of a run is a function of (seed, where we are): a sample's augmentation of (seed, epoch, index), a
step's masking of (seed, rank, epoch, step). Nothing has to be saved to resume exactly, and the number of
loader workers cannot change a result.
"""

import contextlib
import inspect
import random
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

_MASK = (1 << 64) - 1


def derive_seed(*numbers: int) -> int:
    """Mixes integers into one seed of 63 bits (splitmix64 steps); other numbers or another order, another
    seed.
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seed_all(seed: int) -> None:
    """Seeds Python's, numpy's and torch's (all devices') global generators."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def seed_step(seed: int, rank: int, epoch: int, step: int, device: torch.device | None = None) -> None:
    """Seeds the global generators for one micro-step: masking, drop path, mixup.

    Called before each micro-step, it makes the step independent of everything drawn before, so that a resumed
    run draws what an undisturbed one would have drawn. No device synchronisation.

    Args:
        device: the one whose generator is drawn from, besides the CPU's: some ten microseconds. None: all
            there may be, which takes torch ten times as long. The draws are the same.
    """
    mixed = derive_seed(seed, rank, epoch, step)
    if device is None:
        return seed_all(mixed)
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(mixed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(mixed)  # of the current device, which the run computes on


@contextlib.contextmanager
def sample_seed(seed: int, epoch: int, index: int, *repeat: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's CPU generators for one sample and restores them afterwards.

    For transforms that draw from global generators (torchvision, timm), in a worker or in the main process.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    mixed = derive_seed(seed, epoch, index, *repeat)
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed would reseed the accelerators too
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def fixed_noise(rows: int | Sequence[int], length: int, seed: int) -> torch.Tensor:
    """Returns masking noise (n, length) float32 in [0, 1) on the CPU; `length` is the number of patches L.

    `rows`: the n row numbers, or n for 0 ... n-1. A row depends on `seed`, its number and `length` only: a
    picture keeps its mask when others join it. It is 0/L ... (L-1)/L shuffled: no ties: devices sort alike.
    """
    rows = range(rows) if isinstance(rows, int) else rows
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    generator = np.random.RandomState()  # the legacy one: its numbers are frozen across numpy's versions
    noise = np.empty((len(rows), length), dtype=np.float32)
    for shuffled, row in zip(noise, rows, strict=True):
        generator.seed([*words, row])  # ten times faster than a new generator
        shuffled[:] = generator.permutation(length)
    return torch.from_numpy(noise / np.float32(length))


def fixed_masks(model: torch.nn.Module, rows: int | Sequence[int], mask_ratio: float) -> torch.Tensor:
    """`fixed_noise` for a masked autoencoder's images, of the kind of masks that it trains with."""
    if hasattr(model, "mask_noise"):  # of `util.recipes.questions`
        return model.mask_noise(lambda length: fixed_noise(rows, length, seed=0), mask_ratio)
    return fixed_noise(rows, model.patch_embed.num_patches, seed=0)


def takes_noise(model: torch.nn.Module) -> bool:
    """Whether a masked autoencoder can be told its masks: not if a subclass's `forward`, `forward_encoder` or
    `random_masking` has the reference's arguments only.
    """
    for method in (model.forward, model.forward_encoder, model.random_masking):
        parameters = inspect.signature(method).parameters.values()
        if not any(p.name == "noise" or p.kind is p.VAR_KEYWORD for p in parameters):
            return False
    return True


def masked_by(noise: torch.Tensor, model: torch.nn.Module, imgs: torch.Tensor, mask_ratio: float) -> tuple:
    """What a masked autoencoder returns for `imgs` (N, C, H, W) with masks of `noise` (N, L): the same every
    time. One that cannot take it (`takes_noise`) draws its own masks, from generators that it seeds.
    """
    if takes_noise(model):
        return model(imgs, mask_ratio=mask_ratio, noise=noise)
    seed = zlib.crc32(noise.cpu().contiguous().numpy().tobytes())
    with sample_seed(seed, 0, 0), torch.random.fork_rng([imgs.device] if imgs.is_cuda else []):
        if imgs.is_cuda:
            torch.cuda.manual_seed(seed)
        return model(imgs, mask_ratio=mask_ratio)
