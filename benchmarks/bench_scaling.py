"""Training in several processes: measured on 1 and 2, bytes sent per step, and what follows for 8 to 512.

    python benchmarks/bench_scaling.py --json scaling.json                 # gloo on CPU, NCCL where GPUs are
    python benchmarks/bench_scaling.py --model mae_vit_large_patch16 --batch_size 64 --step_ms 250

Starts itself once alone and once as several processes (one a GPU; on CPU with one thread each), which train
on batches in memory through DistributedDataParallel as main_pretrain.py sets it up. Steps with the gradients
exchanged and without (as in a micro-step of an accumulation window that is not its last) take turns, so that
what the exchange costs is seen at equal load. A hook on the gradient buckets counts what DDP sends.

The table is computed, not measured: from the step's time (measured, or `--step_ms`), the counted bytes and
the assumptions that it prints, all of which are flags. A ring all-reduce over n GPUs sends and receives
2 (n - 1) / n times the gradients' bytes at each; it runs beside the backward pass, but for the last bucket.
"""

import argparse
import contextlib
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Parser, finish, paired_ratio, positive, print_table, run_benchmark, say, take_turns
from timm.optim import param_groups_weight_decay
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn
from workload import noise_batch, pretrain_args, synchronize

import main_pretrain
from util.cli.parser import errors_in_one_line
from util.compute import precision
from util.compute.compile import compile_model
from util.data.transforms import normalize_batch
from util.processes import watch
from util.processes.collectives import barrier, get_world_size
from util.processes.parallel import without_gradient_traffic, wrap_model

BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once
SIZES = (8, 16, 32, 64, 128, 256, 512)


@errors_in_one_line("bench_scaling.py")
def worker(rank: int, options: argparse.Namespace, processes: int, port: int, path: Path) -> None:
    """Process `rank` of several, or the only one. The first writes {"step_seconds": those of each segment,
    with and without exchange, "bucket_bytes": those that DDP sends, ...} to `path`.
    """
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    args = pretrain_args(options, names=["model", "input_size", "batch_size", "device"])
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    amp_dtype = precision.resolve_amp_dtype(args.amp_dtype, device)
    precision.prepare_device(device, amp_dtype)
    torch.manual_seed(0)
    model = bare = main_pretrain.build_model(args).to(device)
    compile_model(model, "forward", args, device)
    buckets: dict[int, int] = {}

    def count(state, bucket: dist.GradBucket):
        if bucket.index() == 0:  # DDP makes its buckets anew after the first step
            buckets.clear()
        buckets[bucket.index()] = bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    if args.distributed:
        model = wrap_model(model, device)
        model.register_comm_hook(None, count)
    groups, fused = param_groups_weight_decay(bare, 0.05), precision.has_fused_adamw(device)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=fused)
    images = noise_batch((options.batch_size, 3, options.input_size, options.input_size))[0].to(device)

    def steps(count: int, exchange: bool) -> float:
        barrier()
        start = time.perf_counter()
        for _ in range(count):
            with without_gradient_traffic(model, not exchange), precision.autocast(device, amp_dtype):
                loss = model(normalize_batch(images, device), mask_ratio=0.75)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        return (time.perf_counter() - start) / count

    steps(2, True)
    ways = {"without": partial(steps, options.steps, False), "with": partial(steps, options.steps, True)}
    result = {
        "processes": get_world_size(), "step_seconds": take_turns(options.rounds, ways),
        "bucket_bytes": list(buckets.values()), "device": str(device),
        "precision": str(amp_dtype or torch.float32),
        "parameters": sum(p.numel() for p in bare.parameters() if p.requires_grad),
    }  # fmt: skip
    if rank == 0:
        path.write_text(json.dumps(result), encoding="utf-8")
    if args.distributed:
        barrier()
        with contextlib.suppress(Exception):
            watch.stop()
        dist.destroy_process_group()


def start(options: argparse.Namespace, processes: int) -> dict:
    """Runs `worker` in one or several new processes; the first one's result."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        try:
            spawn(worker, (options, processes, port, path), processes)
        except (ProcessExitedException, ProcessRaisedException) as error:
            sys.exit(f"a process failed: {error}")
        return json.loads(path.read_text(encoding="utf-8"))


def predict(options: argparse.Namespace, step: float, gradient_bytes: int, last_bucket: int) -> list[dict]:
    """Rows of the table: for each number of GPUs the step's seconds, and images/s against as many single
    ones.
    """
    rows = []
    for n in SIZES:
        inside = n <= options.gpus_per_node
        rate = (options.node_gbps if inside else options.network_gbps) * 1e9 * options.bandwidth_share
        ring = 2 * (n - 1) / n
        # Inside a machine a ring; between machines NCCL takes trees, whose depth grows with the logarithm
        hops = 2 * (n - 1) if inside else 2 * (options.gpus_per_node + math.ceil(math.log2(n)))
        latency = 1e-6 * options.hop_us * hops
        exchange = ring * gradient_bytes / rate + latency
        hidden = min(exchange - ring * last_bucket / rate, options.overlap * 2 / 3 * step)
        total = step + exchange - hidden
        rows.append({
            "gpus": n, "exchange_seconds": exchange, "step_seconds": total, "efficiency": step / total,
            "images_per_s": n * options.batch_size / total,
        })  # fmt: skip
    return rows


def report_step(n: int, seconds: dict[str, list[float]], batch_size: int) -> None:
    """Prints the row of what `n` processes measured."""
    both, alone = (statistics.median(seconds[kind]) for kind in ("with", "without"))
    costs = f"{100 * (paired_ratio(seconds['with'], seconds['without']) - 1):.1f} %" if n > 1 else ""
    cells = f"{1e3 * both:.1f} ms", f"{1e3 * alone:.1f} ms", costs, f"{n * batch_size / both:.1f}"
    print_table([f"{n:10d}", *cells], [], name=10, width=18)


def report(options: argparse.Namespace, results: dict[int, dict]) -> list[dict]:
    """Prints what was counted, what is assumed and the computed table; returns its rows."""
    alone, several = results[min(results)], results[max(results)]
    sizes, counted = several["bucket_bytes"], "counted"
    if not sizes:  # one process exchanges nothing
        left, counted = 4 * several["parameters"], "not counted, as DistributedDataParallel would make them"
        sizes = [BUCKET] * (left // BUCKET) + [left % BUCKET]
    step = options.step_ms / 1e3 if options.step_ms else statistics.median(alone["step_seconds"]["with"])
    source = "given by --step_ms" if options.step_ms else f"measured on {several['device']}"
    say(f"""
gradients: {several["parameters"] / 1e6:.1f} M, {sum(sizes) / 1e6:.1f} MB a step in {len(sizes)} buckets \
({counted}),
the last of {sizes[-1] / 1e6:.1f} MB; sent by each of n GPUs: 2 (n - 1) / n of it

computed, for a step of {1e3 * step:.1f} ms ({source}) on {options.batch_size} images a GPU, one micro-step
assumed: {options.node_gbps:g} GB/s between the {options.gpus_per_node} GPUs of a machine, \
{options.network_gbps:g} GB/s for each GPU between machines,
{options.bandwidth_share:.0%} of either reached; {options.hop_us:g} us a hop; the exchange hides behind \
{options.overlap:.0%} of the backward pass
(two thirds of the step), but not its last bucket; no waiting for slow processes or for data
""")
    rows = predict(options, step, sum(sizes), sizes[-1])
    print_table(["  GPUs", "exchange", "step", "efficiency", "images/s"], (
        (f"{r['gpus']:6d}", f"{1e3 * r['exchange_seconds']:.2f} ms", f"{1e3 * r['step_seconds']:.1f} ms",
         f"{100 * r['efficiency']:.1f} %", f"{r['images_per_s']:,.0f}") for r in rows
    ), name=6)  # fmt: skip
    return rows


def main(options: argparse.Namespace) -> int:
    gpus = torch.cuda.device_count()
    if options.device in ("auto", "cuda") and 0 < gpus < max(options.processes):
        options.processes = [n for n in options.processes if n <= gpus]
        say(f"{gpus} GPU here: measuring {options.processes} processes only")
        if not options.processes:
            sys.exit("pass other --processes, or --device cpu")
    heads = [" processes", "a step", "without exchange", "exchange costs", "images/s"]
    say()
    print_table(heads, [], name=10, width=18)
    results = {}
    for n in options.processes:
        results[n] = start(options, n)
        report_step(n, results[n]["step_seconds"], options.batch_size)
    return finish(options, {"measured": results, "computed": report(options, results)})


if __name__ == "__main__":
    parser = Parser(__doc__, input_size=224, batch_size=8, steps=(3, "of a segment"), rounds=5, device="auto")
    flag = parser.add_argument
    # fmt: off
    flag("--model", default="mae_vit_base_patch16", choices=main_pretrain.models_mae.MODELS, metavar="MODEL")
    flag("--processes", default=[1, 2], type=positive(), nargs="+")
    flag("--step_ms", type=positive(float), help="of a step, for the table (default: as measured)")
    flag("--gpus_per_node", default=8, type=positive())
    flag("--node_gbps", default=450.0, type=positive(float), help="GB/s one way (NVLink of an H100)")
    flag("--network_gbps", default=50.0, type=positive(float), help="GB/s per GPU (a 400 Gbit/s port each)")
    flag("--bandwidth_share", default=0.7, type=positive(float), help="of these that an all-reduce reaches")
    flag("--hop_us", default=10.0, type=positive(float, or_zero=True), help="latency of a hop of the ring")
    flag("--overlap", default=0.9, type=positive(float, or_zero=True), help="share of backward that hides it")
    # fmt: on
    run_benchmark(main, parser)
