"""Names that forks import from here; each lives in a home of its own."""

from util.compute.precision import NativeScalerWithGradNormCount
from util.processes.collectives import all_reduce_mean, get_rank, get_world_size, is_main_process
from util.processes.group import init_distributed_mode
from util.run.checkpoint import save_model
from util.run.meters import MetricLogger, SmoothedValue
from util.run.resume import load_model

__all__ = [
    "MetricLogger",
    "NativeScalerWithGradNormCount",
    "SmoothedValue",
    "all_reduce_mean",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "is_main_process",
    "load_model",
    "save_model",
]
