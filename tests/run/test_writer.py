"""The thread that writes checkpoints."""

import threading

import torch

from util.run import writer


def test_d14_on_a_slow_disk_there_is_one_copy(monkeypatch):
    """The next save waits for the disk before it copies, and holds the state of that moment."""
    events, disk, weight = [], threading.Event(), torch.zeros(3)

    def snapshot(content):
        events.append("copied")
        return {name: tensor.clone() for name, tensor in content.items()}

    def write(content):
        disk.wait(60)
        events.append(f"wrote {content['weight'].tolist()[0]:.0f}")

    monkeypatch.setattr(writer, "snapshot", snapshot)
    background = writer.BackgroundWriter()
    background.start(write, {"weight": weight})
    threading.Timer(0.2, disk.set).start()
    weight.add_(1)
    background.start(write, {"weight": weight})
    weight.add_(1)
    background.wait()
    assert events == ["copied", "wrote 0", "copied", "wrote 1"] and not background.failed
