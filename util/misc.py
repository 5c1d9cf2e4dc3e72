"""Names that forks import from here; each lives in a home of its own."""

from util.checkpoint import load_model, save_model
from util.distributed import all_reduce_mean, get_rank, get_world_size, init_distributed_mode, is_main_process
from util.metrics import MetricLogger, SmoothedValue
from util.precision import NativeScalerWithGradNormCount

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
