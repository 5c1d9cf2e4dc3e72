"""Sizes on a command line: of images in pixels, and of the pool of loader processes."""

import os


def image_size(text: str) -> int | tuple[int, int]:
    """argparse type of image sizes in pixels: "224" is 224 x 224, "32x128" is 32 high and 128 wide."""
    numbers = [int(part) for part in text.lower().split("x")]
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(text)
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


image_size.__name__ = "image size (224, or 32x128 for height x width)"


def size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size as `image_size` returns it."""
    return (size, size) if isinstance(size, int) else tuple(size)


def default_workers(processes: int | None = None) -> int:
    """Loader processes by default: one for each usable core, which `processes` share, at most 16.

    A core gives some 500 images a second (benchmarks/bench_loader.py), and a large GPU takes more than 5,000.

    Args:
        processes: default: what torchrun started on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, cores // processes))
