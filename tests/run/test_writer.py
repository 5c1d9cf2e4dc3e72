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


def test_a_folder_that_was_removed_is_made_again(tmp_path, capsys):
    """`rm -r` while a run is at work costs the older checkpoints, and not the run."""
    path = tmp_path / "gone" / "out" / "checkpoint-3.pth"
    writer.save_checkpoint(path, {"model": {"w": torch.ones(3)}, "epoch": 3})
    assert torch.load(path, weights_only=True)["epoch"] == 3
    assert "out: was removed; made again for checkpoint-3.pth" in capsys.readouterr().err
    writer.save_checkpoint(path, {"model": {"w": torch.ones(3)}, "epoch": 4})
    assert "removed" not in capsys.readouterr().err
