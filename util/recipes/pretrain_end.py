"""What ends an epoch of pre-training; the loop itself stands in the script."""

import argparse
from collections.abc import Callable

from util.data.loader import build_loader
from util.data.sampler import EvalSampler
from util.processes.collectives import get_rank, get_world_size, is_main_process, log
from util.processes.parallel import full_copy
from util.run.run_log import write_log
from util.run.start import Run


class EpochEnd:
    """What comes after an epoch's training and its checkpoint: validation loss, k-NN, card, figures, log.

    Args:
        evaluate: `engine_pretrain.evaluate`.
        state: `RunState`, of which the bare model and, with --ema, the average of its weights are measured.
        val_set: validation images, each of which counts once; or None.
    """

    def __init__(
        self, args: argparse.Namespace, run: Run, evaluate: Callable, state, dataset, val_set, log_writer
    ):
        self.args, self.device, self.state, self.log_writer = args, run.device, state, log_writer
        self.evaluate = evaluate
        self.val_loader = self.growth = self.pictures = None
        if val_set is not None:
            sampler = EvalSampler(len(val_set), get_world_size(), get_rank())
            loader = build_loader(val_set, sampler, args.batch_size, args.num_workers, run.pin_memory)
            self.val_loader = loader
        if args.knn_freq or args.card_freq:
            from util.evaluate.growth import Growth  # with the labelled sets, which all else does without

            self.growth = Growth(args, run.pin_memory)
        if args.vis_freq and is_main_process() and "pixels" in getattr(args, "target", "pixels"):
            from util.figures.training import pick_images

            size_of = args.epochs - 1 if getattr(args, "size_schedule", None) else 0
            self.pictures = pick_images(val_set or dataset, epoch=size_of)

    def finish(self, epoch: int, stats: dict[str, float], last: bool = False) -> None:
        """All processes call this when `epoch` is trained; `stats`: its averages; `last`: none follows."""
        args, log_writer, final = self.args, self.log_writer, last or epoch + 1 == self.args.epochs
        look = args.vis_freq and (final or epoch % args.vis_freq == 0)
        due = self.growth.due(epoch, final) if self.growth else []
        record = {**{f"train_{name}": value for name, value in stats.items()}, "epoch": epoch}
        if look or due:
            record |= self.measure(epoch, look, due)
        if self.state.ema and (due or (look and self.val_loader is not None)):
            log(f"Epoch: [{epoch}] with the average of the weights (--ema):")
            with self.state.ema.in_place():
                figures = self.measure(epoch, look, due, draws=False)
            record |= {f"{name}_ema": value for name, value in figures.items()}
        if log_writer is not None:
            for name in [name for name in record if name.startswith(("val_", "knn_", "card_"))]:
                log_writer.add_scalar(name, record[name], int((epoch + 1) * 1000))
            log_writer.flush()
        write_log(args.output_dir, record)

    def measure(self, epoch: int, look: bool, due: list[str], draws: bool = True) -> dict[str, float]:
        """Figures of the model for log.txt; with `draws` also its pictures."""
        whole, figures = full_copy(self.state.model), {}
        if look and self.val_loader is not None:
            figures["val_loss"] = self.evaluate(self.val_loader, whole, self.device, self.args)
            log(f"Epoch: [{epoch}] held-out loss: {figures['val_loss']:.4f}")
        if look and draws and self.pictures is not None:
            from util.figures.training import write_pictures

            write_pictures(whole, self.pictures, self.args, epoch, figures.get("val_loss"), self.log_writer)
        if due:
            figures |= self.growth.measure(whole, self.device, epoch, due)
        return figures
