"""TensorBoard's step curves, gathered on the device and written in one go when a log line is printed."""

import torch

from util.distributed import all_reduce_mean, get_world_size


class StepCurves:
    """Scalars per optimizer step. x axis: int(1000 * fractional epoch), so that batch sizes line up.

    Args:
        log_writer: TensorBoard's SummaryWriter, or None.
    """

    def __init__(self, log_writer):
        self.writer, self.rows = log_writer, []

    def add(self, epoch: float, **values: float | torch.Tensor) -> None:
        """Adds a point per name at a fractional epoch; scalar tensors are not read now."""
        self.rows.append((int(epoch * 1000), values))

    def write(self) -> None:
        """Averages the tensors over the processes (all must call it) and writes what has gathered."""
        tensors = [
            value for _, values in self.rows for value in values.values() if isinstance(value, torch.Tensor)
        ]
        if tensors and (self.writer is not None or get_world_size() > 1):
            means = iter(all_reduce_mean(torch.stack(tensors)).tolist())
            for x, values in self.rows:
                for name, value in values.items():
                    value = next(means) if isinstance(value, torch.Tensor) else value
                    if self.writer is not None:
                        self.writer.add_scalar(name, value, x)
        self.rows.clear()
