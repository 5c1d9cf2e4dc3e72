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
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from harness import run_benchmark
from timm.optim import param_groups_weight_decay
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import main_pretrain
from util.cli.parser import ArgumentParser
from util.compute.compile import compile_model
from util.compute.precision import (
    autocast,
    has_fused_adamw,
    prepare_device,
    resolve_amp_dtype,
    resolve_device,
)
from util.data.transforms import normalize_batch
from util.processes import watch
from util.processes.collectives import get_world_size
from util.processes.fsdp import without_gradient_traffic, wrap_model
from util.processes.group import init_distributed_mode

BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once
SIZES = (8, 16, 32, 64, 128, 256, 512)


def worker(options: argparse.Namespace) -> dict:
    """One process: seconds of each segment's steps, with and without exchange, and the bytes of buckets."""
    flags = ["--model", options.model, "--input_size", str(options.input_size), "--device", options.device]
    args = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args(
        [*flags, "--batch_size", str(options.batch_size)]
    )
    init_distributed_mode(args)
    device = resolve_device(options.device, args.gpu)
    if device.type == "cpu":
        torch.set_num_threads(1)
    amp_dtype = resolve_amp_dtype(args.amp_dtype, device)
    prepare_device(device, amp_dtype)
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
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(bare, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=has_fused_adamw(device)
    )
    images = torch.randint(0, 256, (options.batch_size, 3, options.input_size, options.input_size))
    images = images.to(torch.uint8).to(device)

    def steps(count: int, exchange: bool) -> float:
        if args.distributed:
            dist.barrier()
        start = time.perf_counter()
        for _ in range(count):
            with without_gradient_traffic(model, not exchange), autocast(device, amp_dtype):
                loss = model(normalize_batch(images, device), mask_ratio=0.75)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    steps(2, True)
    seconds = {"with": [], "without": []}
    for _ in range(options.rounds):
        seconds["without"].append(steps(options.steps, False))
        seconds["with"].append(steps(options.steps, True))
    result = {
        "processes": get_world_size(), "step_seconds": seconds, "bucket_bytes": list(buckets.values()),
        "parameters": sum(p.numel() for p in bare.parameters() if p.requires_grad), "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "precision": str(amp_dtype or torch.float32),
    }  # fmt: skip
    if args.distributed:
        dist.barrier()
        with contextlib.suppress(Exception):
            watch.stop()
        dist.destroy_process_group()
    return result


def start(options: argparse.Namespace, processes: int, folder: str) -> dict:
    """Runs `worker` in one or several processes; the first one's result."""
    path = Path(folder) / f"{processes}.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runs = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--worker", str(path)]
        for name in ("model", "input_size", "batch_size", "steps", "rounds", "device"):
            command += [f"--{name}", str(getattr(options, name))]
        runs.append(subprocess.Popen(command, env=environment))
    if any([run.wait() for run in runs]):
        sys.exit("a process failed")
    return json.loads(path.read_text())


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


def report(options: argparse.Namespace, results: dict[int, dict]) -> list[dict]:
    """Prints what was measured and the table; returns its rows."""
    print(
        f"\n{'processes':>10s}{'step':>12s}{'without exchange':>18s}{'exchange costs':>16s}{'images/s':>12s}"
    )
    medians = {}
    for n, result in results.items():
        both, alone = (statistics.median(result["step_seconds"][k]) for k in ("with", "without"))
        pairs = zip(result["step_seconds"]["with"], result["step_seconds"]["without"], strict=True)
        costs = statistics.median(100 * (a / b - 1) for a, b in pairs)
        medians[n] = both
        costs = f"{costs:.1f} %" if n > 1 else ""
        speed = n * options.batch_size / both
        print(f"{n:10d}{1e3 * both:9.1f} ms{1e3 * alone:15.1f} ms{costs:>16s}{speed:12.1f}")
    several = results[max(results)]
    sizes, counted = several["bucket_bytes"], "counted"
    if not sizes:  # one process exchanges nothing
        left, counted = 4 * several["parameters"], "not counted, as DistributedDataParallel would make them"
        sizes = [BUCKET] * (left // BUCKET) + [left % BUCKET]
    print(
        f"\ngradients: {several['parameters'] / 1e6:.1f} M, {sum(sizes) / 1e6:.1f} MB a step in {len(sizes)} "
        f"buckets ({counted}),\nthe last of {sizes[-1] / 1e6:.1f} MB; "
        "sent by each of n GPUs: 2 (n - 1) / n of it"
    )
    step = options.step_ms / 1e3 if options.step_ms else medians[1]
    source = "given by --step_ms" if options.step_ms else f"measured on {several['device']}"
    print(
        f"""
computed, for a step of {1e3 * step:.1f} ms ({source}) on {options.batch_size} images a GPU, one micro-step
assumed: {options.node_gbps:g} GB/s between the {options.gpus_per_node} GPUs of a machine, \
{options.network_gbps:g} GB/s for each GPU between machines,
{options.bandwidth_share:.0%} of either reached; {options.hop_us:g} us a hop; the exchange hides behind \
{options.overlap:.0%} of the backward pass
(two thirds of the step), but not its last bucket; no waiting for slow processes or for data"""
    )
    rows = predict(options, step, sum(sizes), sizes[-1])
    print(f"\n{'GPUs':>6s}{'exchange':>12s}{'step':>12s}{'efficiency':>12s}{'images/s':>12s}")
    for row in rows:
        print(
            f"{row['gpus']:6d}{1e3 * row['exchange_seconds']:9.2f} ms{1e3 * row['step_seconds']:9.1f} ms"
            f"{100 * row['efficiency']:10.1f} %{row['images_per_s']:12,.0f}"
        )
    return rows


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    flag = parser.add_argument
    flag("--model", default="mae_vit_base_patch16", choices=main_pretrain.models_mae.MODELS, metavar="MODEL")
    flag("--input_size", default=224, type=int)
    flag("--batch_size", default=8, type=int, help="images per process")
    flag("--steps", default=3, type=int, help="of a segment")
    flag("--rounds", default=5, type=int)
    flag("--processes", default=[1, 2], type=int, nargs="+")
    flag("--device", default="auto")
    flag("--step_ms", type=float, help="time of a step to compute the table with (default: the measured one)")
    flag("--gpus_per_node", default=8, type=int)
    flag("--node_gbps", default=450.0, type=float, help="GB/s in one direction (default: NVLink of an H100)")
    flag("--network_gbps", default=50.0, type=float, help="GB/s per GPU (default: a port of 400 Gbit/s each)")
    flag("--bandwidth_share", default=0.7, type=float, help="of these that an all-reduce reaches")
    flag("--hop_us", default=10.0, type=float, help="latency of a hop of the ring")
    flag("--overlap", default=0.9, type=float, help="share of the backward pass that can hide the exchange")
    flag("--json", metavar="FILE", help="write the figures to this file too")
    flag("--worker", metavar="FILE", help=argparse.SUPPRESS)
    return parser


def main(options: argparse.Namespace) -> None:
    if options.worker:
        result = worker(options)
        if os.environ.get("RANK", "0") == "0":
            Path(options.worker).write_text(json.dumps(result))
        return
    gpus = torch.cuda.device_count()
    if options.device in ("auto", "cuda") and 0 < gpus < max(options.processes):
        options.processes = [n for n in options.processes if n <= gpus]
        print(f"{gpus} GPU here: measuring {options.processes} processes only")
        if not options.processes:
            sys.exit("pass other --processes, or --device cpu")
    with tempfile.TemporaryDirectory() as folder:
        results = {n: start(options, n, folder) for n in options.processes}
    rows = report(options, results)
    if options.json:
        settings = {**vars(options), "torch": torch.__version__, "cores": os.cpu_count()}
        Path(options.json).write_text(
            json.dumps({"settings": settings, "measured": results, "computed": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
