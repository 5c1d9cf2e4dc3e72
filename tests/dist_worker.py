"""What the processes of `test_distributed.py` run: gradients of one accumulation window, written by rank 0.

torchrun ... tests/dist_worker.py OUTPUT BATCH ACCUM_ITER DTYPE
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from golden_utils import TINY_MAE, fill

import models_mae
from util.processes import group, parallel


def main(output, batch, accum_iter, dtype):
    torch.set_num_threads(1)
    args = Namespace(device="cpu")
    group.init_distributed_mode(args)
    model = fill(models_mae.mae_vit(TINY_MAE, norm_pix_loss=True), seed=1, std=0.1, skip="pos_embed").to(
        dtype
    )
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if args.distributed else model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    noise = torch.rand(16, 16, generator=generator)
    size = batch * args.world_size
    for i in range(accum_iter):
        rows = torch.arange(i * size, (i + 1) * size)[args.rank :: args.world_size]
        with parallel.without_gradient_traffic(wrapped, i + 1 < accum_iter):
            (wrapped(images[rows], noise=noise[rows])[0] / accum_iter).backward()
    if args.rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, output)
    group.shut_down()


if __name__ == "__main__":
    argv = [arg for arg in sys.argv[1:] if not arg.startswith("--local")]  # passed by the old launcher
    main(argv[0], int(argv[1]), int(argv[2]), getattr(torch, argv[3]))
