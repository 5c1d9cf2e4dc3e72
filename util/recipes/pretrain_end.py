"""What ends an epoch of pre-training: validation loss, k-NN, figures, log.

The loop itself stands in the script.
"""

import argparse
from collections.abc import Callable

from util.data.loader import build_loader
from util.data.sampler import EvalSampler
from util.processes.collectives import get_rank, get_world_size, is_main_process, log
from util.processes.parallel import full_copy
from util.run.run_log import write_log
from util.run.start import Run


class EpochEnd:
    """What comes after an epoch's training and its checkpoint: validation loss, k-NN, figures, log.

    Args:
        evaluate: `engine_pretrain.evaluate`.
        model: bare.
        val_set: validation images, each of which counts once; or None.
    """

    def __init__(
        self, args: argparse.Namespace, run: Run, evaluate: Callable, model, dataset, val_set, log_writer
    ):
        self.args, self.device, self.model, self.log_writer = args, run.device, model, log_writer
        self.evaluate = evaluate
        self.val_loader = self.knn = self.pictures = None
        if val_set is not None:
            sampler = EvalSampler(len(val_set), get_world_size(), get_rank())
            loader = build_loader(val_set, sampler, args.batch_size, args.num_workers, run.pin_memory)
            self.val_loader = loader
        if args.knn_freq:
            from util.evaluate.knn import knn_loaders  # with the labelled sets, which all else does without

            self.knn = knn_loaders(args, run.pin_memory)
        if args.vis_freq and is_main_process():
            from util.figures.training import pick_images

            self.pictures = pick_images(val_set or dataset)

    def finish(self, epoch: int, stats: dict[str, float], last: bool = False) -> None:
        """All processes call this when `epoch` is trained; `stats`: its averages; `last`: none follows."""
        args, log_writer, final = self.args, self.log_writer, last or epoch + 1 == self.args.epochs
        look = args.vis_freq and (final or epoch % args.vis_freq == 0)
        measure = self.knn and (final or epoch % args.knn_freq == 0)
        whole = full_copy(self.model) if look or measure else None
        record = {**{f"train_{name}": value for name, value in stats.items()}, "epoch": epoch}
        if look and self.val_loader is not None:
            record["val_loss"] = self.evaluate(self.val_loader, whole, self.device, args)
            log(f"Epoch: [{epoch}] held-out loss: {record['val_loss']:.4f}")
        if look and self.pictures is not None:
            from util.figures.training import write_pictures

            write_pictures(whole, self.pictures, args, epoch, record.get("val_loss"), log_writer)
        if measure:
            from util.evaluate.knn import knn_accuracy

            record["knn_acc1"] = knn_accuracy(whole, *self.knn, self.device, args=args)["acc1"]
            log(f"Epoch: [{epoch}] k-NN accuracy: {record['knn_acc1']:.2f} %")
        if log_writer is not None:
            for name in record.keys() & {"val_loss", "knn_acc1"}:
                log_writer.add_scalar(name, record[name], int((epoch + 1) * 1000))
            log_writer.flush()
        write_log(args.output_dir, record)
