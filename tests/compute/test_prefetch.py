"""Batches on the device: which come, in which order, and that CUDA's streams do not mix them up."""

import pytest
import torch

from util.compute.prefetch import DevicePrefetcher


class Loader(list):
    """A loader that notes what was fetched."""

    def __iter__(self):
        self.fetched = 0
        for item in super().__iter__():
            self.fetched += 1
            yield item


def batches(n, size=4, pin=False):
    made = [[torch.full((size,), float(i)), torch.tensor([i])] for i in range(n)]
    return Loader([[t.pin_memory() for t in batch] for batch in made] if pin else made)


def test_without_cuda_each_batch_is_moved_when_it_is_asked_for():
    loader = batches(3)
    on_device = DevicePrefetcher(loader, torch.device("cpu"), lambda batch: [batch[0] + 1])
    assert len(on_device) == 3
    for i, (batch, (moved,)) in enumerate(on_device):
        assert loader.fetched == i + 1 and batch is loader[i] and moved.eq(i + 1).all()
    assert i == 2
    assert [batch for batch, _ in on_device] == list.copy(loader)  # a second epoch
    assert list(DevicePrefetcher(batches(0), torch.device("cpu"), lambda batch: batch)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 50])
def test_on_cuda_the_next_batch_is_under_way_and_none_is_overwritten(count):
    device, size = torch.device("cuda", 0), 1 << 22
    loader = batches(count, size, pin=True)

    def move(batch):
        return [batch[0].to(device, non_blocking=True) * 2, batch[1].to(device, non_blocking=True)]

    seen, work = [], torch.ones(2048, 2048, device=device)
    for i, (batch, (images, label)) in enumerate(DevicePrefetcher(loader, device, move)):
        assert loader.fetched == min(i + 2, count) and batch is loader[i]
        for _ in range(10):
            work = work @ work * 1e-6  # the host runs far ahead of the device
        seen.append((images + 0 * work.sum()).amin() + label)
        seen.append((images + 0 * work.sum()).amax() + label)
        del images, label
    values = torch.stack(seen).flatten().tolist() if seen else []
    assert values == [3.0 * i for i in range(count) for _ in range(2)]
