"""Meters and log lines. Tensors stay on the device until a line is printed, so no step waits for them."""

import datetime
import math
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator

import torch

from util.processes.collectives import all_reduce_sum, get_world_size, is_main_process, log


class SmoothedValue:
    """Tracks a series: its last `window_size` values and its average over everything.

    Args:
        window_size: how many values `median`, `avg` and `max` look at.
        fmt: how it prints, from median, avg, global_avg, max, value.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None):
        self.recent: deque = deque(maxlen=window_size)
        self.pending: list = []  # tensors not read yet, with their counts
        self.total, self.count, self.fmt = 0.0, 0, fmt or "{median:.4f} ({global_avg:.4f})"

    def update(self, value: float | torch.Tensor, n: int = 1) -> None:
        """Adds `value` (a number or a scalar tensor on any device) as it is, unread, with weight `n`."""
        # A copy on the device, which nobody waits for: the caller may go on computing in place
        self.pending.append((value.detach().clone() if isinstance(value, torch.Tensor) else float(value), n))

    def flush(self) -> None:
        """Reads the pending values, one copy from the device for all; drops what is not finite."""
        tensors = [value for value, _ in self.pending if isinstance(value, torch.Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        for value, n in self.pending:
            value = next(numbers) if isinstance(value, torch.Tensor) else value
            if not math.isfinite(value):  # handled, and counted, elsewhere; here it would hide all others
                continue
            self.recent.append(value)
            self.total += value * n
            self.count += n
        self.pending.clear()

    def synchronize_between_processes(self) -> None:
        """Makes the average that of all processes; the recent values stay this process's own."""
        self.flush()
        if get_world_size() == 1:
            return
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        sums = torch.tensor([self.total, self.count], dtype=torch.float64, device=device)
        self.total, self.count = all_reduce_sum(sums).tolist()
        self.count = int(self.count)

    @property
    def deque(self) -> "deque[float]":
        """The last values, up to date."""
        self.flush()
        return self.recent

    def _recent(self) -> list[float]:
        return list(self.deque) or [math.nan]

    @property
    def median(self) -> float:
        return statistics.median_low(self._recent())

    @property
    def avg(self) -> float:
        values = self._recent()
        return sum(values) / len(values)

    @property
    def global_avg(self) -> float:
        self.flush()
        return self.total / self.count if self.count else math.nan

    @property
    def max(self) -> float:
        return max(self._recent())

    @property
    def value(self) -> float:
        return self._recent()[-1]

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


class MetricLogger:
    """Named meters and the loop that prints them.

    `images_per_step`: images of all processes in one step, for the rate in the log line; 0 leaves it out.
    """

    def __init__(self, delimiter: str = "  ", images_per_step: int = 0):
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter, self.images_per_step = delimiter, images_per_step

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, **values: float | torch.Tensor | None) -> None:
        """Adds one value to each named meter; None is left out."""
        for name, value in values.items():
            if value is not None:
                self.meters[name].update(value)

    def state_dict(self) -> dict[str, list]:
        """{name: [total, count, recent values]}, to go on inside an epoch."""
        for meter in self.meters.values():
            meter.flush()
        return {name: [m.total, m.count, list(m.recent)] for name, m in self.meters.items()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        for name, (total, count, recent) in state.items():
            meter = self.meters[name]
            meter.total, meter.count = total, count
            meter.recent.extend(recent)

    def __getattr__(self, name: str) -> SmoothedValue:
        meters = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"no meter {name}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        for name in sorted(self.meters):
            self.meters[name].synchronize_between_processes()

    def averages(self) -> dict[str, float]:
        """{name: average over the epoch}, of all processes, which must all call this; prints them."""
        self.synchronize_between_processes()
        log(f"Averaged stats: {self}")
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def log_every(
        self, iterable: Iterable, print_freq: int, header: str | None = None, start: int = 0
    ) -> Iterator:
        """Yields from `iterable`; prints a line every `print_freq` items and a total at the end.

        A line has the time to go, the meters, images/s, seconds per step, the share of time spent waiting for
        data and the peak memory. On a terminal a progress bar stands in for the lines. `start`: number of the
        first item of `iterable` when it goes on inside an epoch; its length stays that of the epoch.
        """
        length, header = len(iterable), header or ""
        bar = None
        if is_main_process() and sys.stdout.isatty():
            from util.cli.progress import progress_bar  # a log file does without

            bar = progress_bar(length, "it", sys.stdout, initial=start, desc=header, mininterval=0.5)
        clock = _Clock()
        iterator = iter(iterable)
        try:
            for number in range(start, length):
                asked = time.perf_counter()
                item = next(iterator, self)  # itself: there is no more
                clock.waited += time.perf_counter() - asked
                if item is self:
                    break
                clock.steps += 1  # before the loop may be left: at the end its steps are done
                yield item
                if bar is not None:
                    bar.update()
                if number % print_freq == 0 or number == length - 1:
                    self._print_line(header, number, length, clock, bar)
        finally:  # also when the loop is left early
            if bar is not None:
                bar.close()
            seconds, steps = clock.total, max(clock.steps, 1)
            log(
                f"{header} Total time: {datetime.timedelta(seconds=int(seconds))} ({seconds / steps:.4f} s "
                f"/ it, data wait {clock.wait_percent:.1f} %)  {self}"
            )

    def _print_line(self, header: str, number: int, length: int, clock, bar) -> None:
        # Reading the meters waits for the device: the rate that follows is that of finished steps
        text = str(self)
        rate = clock.rate(self.images_per_step)
        if bar is not None:
            bar.set_postfix_str(self.delimiter.join([text, *rate]), refresh=False)
            return
        eta = datetime.timedelta(seconds=int(clock.seconds_per_step * (length - 1 - number)))
        place = f"[{number:>{len(str(length))}}/{length}]"
        log(self.delimiter.join([header, place, f"eta: {eta}", text, *rate]))


def epoch_metrics(data_loader: Iterable, saved: dict[str, list]) -> MetricLogger:
    """The meters of a training epoch, filled with what an interrupted one had `saved`."""
    metrics = MetricLogger(images_per_step=(getattr(data_loader, "batch_size", 0) or 0) * get_world_size())
    metrics.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    metrics.load_state_dict(saved)
    return metrics


class _Clock:
    """Where the time of a loop goes."""

    def __init__(self):
        self.start = self.last_read = time.perf_counter()
        self.steps = self.last_steps = 0
        self.waited = self.seconds_per_step = 0.0

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start

    @property
    def wait_percent(self) -> float:
        return 100 * self.waited / max(self.total, 1e-9)

    def rate(self, images_per_step: int) -> list[str]:
        """Texts on speed since the last call."""
        now, steps = time.perf_counter(), max(self.steps - self.last_steps, 1)
        self.seconds_per_step = (now - self.last_read) / steps
        self.last_read, self.last_steps = now, self.steps
        texts = [f"time: {self.seconds_per_step:.4f}", f"data wait: {self.wait_percent:.1f} %"]
        if images_per_step:
            texts.insert(0, f"images/s: {images_per_step / max(self.seconds_per_step, 1e-9):.1f}")
        peak = peak_memory_mb()
        return [*texts, *([] if peak is None else [f"max mem: {peak:.0f} MB"])]


def peak_memory_mb() -> float | None:
    """Peak memory in MB (2^20 bytes): the GPU's allocations or the resident memory; None: unknown."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
