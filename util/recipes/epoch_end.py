"""What ends an epoch of fine-tuning and of probing: evaluation, checkpoint, log.

The loops themselves stand in the scripts.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from util.data.labelled import LabelledImages
from util.evaluate.exact import eval_loader
from util.evaluate.metrics import SMALLER_IS_BETTER, best_metric
from util.evaluate.report import choose_thresholds, evaluate_and_report
from util.processes.collectives import get_world_size, log
from util.processes.parallel import full_copy
from util.recipes.labels import threshold_set
from util.recipes.probe import feature_loader
from util.run.guard import RunGuard
from util.run.run_log import write_log
from util.run.start import RunState


@dataclass
class ClassifierEpochEnd:
    """Evaluates, saves and logs.

    trained: bare, what is trained and evaluated: the model of `state`, or its head where `val_loader` gives
    features. val_set: the images of `val_loader`. log_writer: TensorBoard writer, or None.
    """

    args: argparse.Namespace
    state: RunState
    trained: torch.nn.Module
    val_loader: Iterable
    val_set: LabelledImages
    device: torch.device
    log_writer: object

    def __post_init__(self):
        self.held_loader = held = threshold_set(self.args, self.val_set)
        if held and self.trained is self.state.model:
            self.held_loader = eval_loader(held, self.args)
        elif held:
            self.held_loader = feature_loader(self.state.model.eval(), held, self.args, self.device)

    def end(self, epoch: int, stats: dict[str, float], guard: RunGuard) -> None:
        """All processes call this after `epoch`, which was perhaps left inside: `guard` then ends the run.
        stats: averages of the epoch, for the log.
        """
        guard.dataset.report_bad_images()
        if guard.inside_epoch:
            return
        if guard.signal_came():  # there may be little time: evaluate after resuming
            return self.state.save(epoch, stats=stats)
        self.finish(epoch, stats)
        if epoch + 1 < self.args.epochs:  # one that came during the evaluation ends the run now
            guard.signal_came()

    def finish(self, epoch: int, stats: dict[str, float]) -> None:
        """All processes call this when `epoch` is trained; `stats`: its averages, for the log."""
        args, state = self.args, self.state
        # Each process has updated BatchNorm's statistics with its own batches; the first one's are saved
        for buffer in self.trained.buffers() if get_world_size() > 1 else ():
            dist.broadcast(buffer, src=0)
        state.save(epoch, stats=stats)  # an evaluation may take longer than a scheduler waits
        test = self.evaluate(full_copy(self.trained), report=epoch + 1 == args.epochs)
        is_best, text = self.judge(test)
        state.save(epoch, best=is_best, stats=stats, evaluated=True)
        log(text)
        record = {f"train_{name}": value for name, value in stats.items()}
        record |= {f"test_{name}": value for name, value in test.items()}
        if state.ema:
            log("with the average of the weights (--ema):")
            info = state.model_info  # thresholds that are chosen now are the average's, not the model's
            with state.ema.in_place():
                test = self.evaluate(full_copy(self.trained), report=False)
            state.model_info = info
            record |= {f"test_{name}_ema": value for name, value in test.items()}
        n_parameters = count_trained(state.model)
        write_log(args.output_dir, {**record, "epoch": epoch, "n_parameters": n_parameters})
        if self.log_writer is not None:
            for name, value in record.items():
                if name.startswith("test_") and value is not None:  # None: not defined
                    self.log_writer.add_scalar(f"perf/{name}", value, epoch)
            self.log_writer.flush()

    def evaluate(self, model: torch.nn.Module, report: bool) -> dict[str, float | None]:
        """The figures of `model`, printed; with `report` also what is known per class and per image. Chooses
        thresholds before, with --thresholds auto, which go into the checkpoint.
        """
        if self.held_loader is not None:
            choose_thresholds(self.held_loader, model, self.device, self.args, self.val_set.targets)
            self.state.model_info = self.state.model_info | self.val_set.targets.info()
        return evaluate_and_report(self.val_loader, model, self.device, self.args, self.val_set, report)

    def judge(self, test: dict[str, float | None]) -> tuple[bool, str]:
        """(whether these figures are the best so far, what to say of it)."""
        metric, state = best_metric(self.args, self.val_set.targets.task), self.state
        if metric != "acc1":
            return self._compare(metric, test[metric])
        is_best, state.best_acc1 = test["acc1"] > state.best_acc1, max(state.best_acc1, test["acc1"])
        return is_best, f"best accuracy so far: {state.best_acc1:.3f} %\nMax accuracy: {state.best_acc1:.2f}%"

    def _compare(self, metric: str, value: float | None) -> tuple[bool, str]:
        """(whether `value` is the best so far, a line that says the best); checkpoints remember it."""
        info = self.state.model_info
        held = info.get("best") if isinstance(info.get("best"), dict) else {}
        best = held.get("value") if held.get("metric") == metric else None
        best = best if isinstance(best, float) else None
        sign = -1 if metric in SMALLER_IS_BETTER else 1
        is_best = best is None or (value is not None and sign * value > sign * best)
        best = value if is_best else best
        self.state.model_info = {**info, "best": {"metric": metric, "value": best}}
        text = "is not defined" if best is None else f"{best:.4f}"
        return is_best, f"best {metric} so far: {text}"


def count_trained(model: torch.nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
