"""What the encoder is worth while it is pre-trained: k-NN and small report cards every few epochs."""

from argparse import Namespace

import torch

from util.errors import UserError
from util.evaluate.card import Plan, make_column
from util.evaluate.knn import knn_accuracy, knn_loaders
from util.evaluate.layers import EveryBlock, extract_layers
from util.evaluate.tasks import one_class_each
from util.processes.collectives import gather, log

SMALL = ("knn", "linear_norm", "linear_dinov2")  # protocols whose figures go to log.txt
STEPS = 100


class Growth:
    """Measures with the labelled images of `train` and `val`; never, and says why, where there are none.

    Args:
        args: knn_freq, card_freq, seed, and as `knn_loaders` takes them.
    """

    def __init__(self, args: Namespace, pin_memory: bool):
        self.args, self.every = args, {"knn": args.knn_freq, "card": args.card_freq}
        self.loaders = knn_loaders(args, pin_memory)
        if self.loaders and self.every["card"]:
            try:
                self._plan(torch.as_tensor(self.loaders[0].dataset.files.labels)).split()
            except UserError as error:
                log(f"no report card: {error}")
                self.every["card"] = 0

    def _plan(self, labels: torch.Tensor, device="cpu") -> Plan:
        task = one_class_each(len(self.loaders[0].dataset.classes))
        return Plan(task, labels, self.args.seed, STEPS, device, low_shot=False)

    def due(self, epoch: int, final: bool) -> list[str]:
        """What is measured after `epoch`: "knn", "card"."""
        every = self.every.items() if self.loaders else ()
        return [name for name, number in every if number and (final or epoch % number == 0)]

    def measure(self, model: torch.nn.Module, device, epoch: int, due: list[str]) -> dict[str, float]:
        """Figures for log.txt, the same on all processes; `model`'s mode is restored."""
        record = {}
        if "knn" in due:
            record["knn_acc1"] = knn_accuracy(model, *self.loaders, device, args=self.args)["acc1"]
            log(f"Epoch: [{epoch}] k-NN accuracy: {record['knn_acc1']:.2f} %")
        if "card" in due:
            was_training = model.training
            source = EveryBlock(model.eval())
            train, val = (extract_layers(source, loader, device, self.args) for loader in self.loaders)
            model.train(was_training)
            figures = gather(None if train is None else self._card(train, val, device))[0]
            text = ", ".join(f"{name[5:]} {value:.2f}" for name, value in figures.items())
            log(f"Epoch: [{epoch}] report card: {text}")
            record |= figures
        return record

    def _card(self, train, val, device) -> dict[str, float]:
        column = make_column(train, val, self._plan(train.labels, device))
        figures = {f"card_{key}": column.rows[key].score for key in SMALL}
        figures["card_block"] = column.rows["linear_norm"].block
        figures["card_rank"] = column.depth["rank"][-1][2]
        return figures
