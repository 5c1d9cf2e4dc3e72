"""What probing does with its frozen encoder: features computed once, and the proof that it did not change."""

import hashlib
import time

import torch

from util.data.sampler import EvalSampler
from util.evaluate.exact import eval_loader
from util.evaluate.features import FeatureLoader, extract_features
from util.processes.collectives import get_rank, get_world_size, log
from util.run.start import train_loader


def encoder_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the bits of everything but the head, parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not name.startswith("head."):
            digest.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_features(
    model, train_set, val_set, args, device, pin_memory
) -> tuple[FeatureLoader, FeatureLoader]:
    """Runs the frozen encoder over both sets; loaders of features for training and evaluation."""
    start = time.time()
    model.eval()
    train_features = torch.empty(args.cache_views, len(train_set), model.embed_dim)
    for view in range(args.cache_views):
        images = eval_loader(train_set, args, pin_memory, epoch=view)
        train_features[view], train_labels = extract_features(
            model.forward_features, images, device, args, keep_all=True
        )
    val_loader = feature_loader(model, val_set, args, device, pin_memory)
    train_set.report_bad_images()
    size = (train_features.numel() + val_loader.features.numel()) * 4 / 2**20
    log(
        f"features: {args.cache_views} views of {len(train_labels)} and {len(val_set)} images, "
        f"{size:.0f} MB, in {time.time() - start:.1f} s"
    )
    _, sampler = train_loader(train_set, args, pin_memory)
    return FeatureLoader(train_features, train_labels, sampler, args.batch_size, drop_last=True), val_loader


def feature_loader(model, dataset, args, device, pin_memory=False) -> FeatureLoader:
    """Features of an evaluation's images, computed once."""
    images = eval_loader(dataset, args, pin_memory)
    features, labels = extract_features(model.forward_features, images, device, args, keep_all=True)
    sampler = EvalSampler(len(labels), get_world_size(), get_rank())
    return FeatureLoader(features[None], labels, sampler, args.batch_size, dataset=dataset)
