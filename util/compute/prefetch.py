"""Batches on the device, the next one on its way while a step computes; results back, some steps late."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies to `device`. Freed memory serves its own stream only: with a new one for each
    epoch, each would keep some batches.
    """
    return torch.cuda.Stream(device)


class DevicePrefetcher:
    """Iterates over a loader and yields (batch, tensors): the loader's batch as it came, on the CPU, and what
    `move` made of it on the device.

    On CUDA, batch k + 1 is fetched and its copies and kernels are put on a stream of their own before batch k
    is handed out; the step on batch k waits for nothing but batch k. The host never waits if the batches are
    pinned. Elsewhere a batch is moved when it is asked for. Which batches come, and in which order, is the
    loader's affair alone; leaving the loop early loses one fetched batch, which draws nothing.

    Args:
        loader: batches, with a length.
        device: where `move` puts them.
        move: batch -> tensors on the device, with copies that do not block; draws no random numbers.
    """

    def __init__(self, loader: Iterable, device: torch.device, move: Callable[[list], Sequence]):
        self.loader, self.device, self.move = loader, device, move

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[list, Sequence[torch.Tensor]]]:
        if self.device.type != "cuda":
            for batch in self.loader:
                yield batch, self.move(batch)
            return
        side, ahead = side_stream(self.device), None
        for batch in self.loader:
            with torch.cuda.stream(side):
                following = batch, self.move(batch), side.record_event()
            if ahead is not None:
                yield self._hand_out(*ahead)
            ahead = following
        if ahead is not None:
            yield self._hand_out(*ahead)

    def _hand_out(self, batch: list, tensors: Sequence[torch.Tensor], copied: torch.cuda.Event) -> tuple:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)  # this batch's, not the next one's
        for tensor in tensors:
            tensor.record_stream(stream)  # its memory returns to the side stream, but not before it was used
        return batch, tensors


def on_host(results: Iterable[Sequence[torch.Tensor]], delay: int = 2) -> Iterator[list[torch.Tensor]]:
    """Yields the tensors of `results` on the CPU: those of a GPU `delay` items late, so that it is not waited
    for before the next ones are at work. They lie in page-locked memory then: copy what is kept.
    """
    pending = deque()
    for tensors in results:
        pending.append(start_copy(tensors))
        if len(pending) > delay or pending[-1][1] is None:
            yield finish_copy(*pending.popleft())
    while pending:
        yield finish_copy(*pending.popleft())


def start_copy(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
    """For `finish_copy`: the tensors on the CPU, those of a GPU on their way into page-locked memory."""
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is None:
        return [t.cpu() for t in tensors], None
    host = [
        torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) if t.is_cuda else t
        for t in tensors
    ]
    return host, torch.cuda.current_stream(device).record_event()


def finish_copy(host: list[torch.Tensor], copied: torch.cuda.Event | None) -> list[torch.Tensor]:
    """What `start_copy` has copied, when it is there."""
    if copied is not None:
        copied.synchronize()
    return host
