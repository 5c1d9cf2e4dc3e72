"""Which settings a run must keep when it is resumed: one table and one rule for all training scripts."""

import math
from argparse import Namespace
from pathlib import Path

from util.errors import UserError
from util.files import shown
from util.processes.collectives import is_main_process, warn
from util.weights.names import is_inside_epoch, list_checkpoints
from util.weights.schema import comparable, in_words

# Every flag of the training scripts is in one group. PRETRAIN.md shows table and rules word for word
GROUPS = {
    "model": "model input_size patch_size in_chans mean std pixel_range registers decoder_embed_dim "
    "decoder_depth decoder_num_heads decoder global_pool nb_classes trainable_blocks mode layers init_freeze "
    "opt opt_args",
    "data": "data_path labels label_columns task group_column folds fold pages loader shuffle repeated_aug "
    "crop_scale no_aug cache_features cache_views color_jitter aa reprob remode recount",
    "recipe": "mask_ratio predict_ratio norm_pix_loss batch_size accum_iter epochs warmup_epochs blr lr "
    "min_lr weight_decay layer_decay clip_grad drop_path smoothing mixup cutmix cutmix_minmax mixup_prob "
    "mixup_switch_prob mixup_mode ignore_index class_weight thresholds best amp_dtype seed finetune init "
    "weights_key mask mask_file visible_loss target target_size teacher teacher_loss teacher_weight "
    "teacher_block schedule cooldown ema size_schedule",
    "machine": "world_size local_rank dist_on_itp dist_url dist_timeout fsdp device num_workers pin_mem "
    "compile compile_mode grad_checkpointing output_dir log_dir tracker track_checkpoints resume no_verify "
    "extend_from start_epoch max_steps save_freq save_minutes keep_checkpoints vis_freq knn_freq card_freq "
    "report print_freq skip_nonfinite bad_images eval split dist_eval save_predictions short_side resplit",
}
RULES = {
    "model": "a change is an error",
    "data": "a change is an error inside an epoch, a warning at its end",
    "recipe": "a change is an error inside an epoch, a warning at its end",
    "machine": "free",
}
_OF_TRAINING = ("trainable_blocks", "opt", "opt_args")  # weights alone fit any
_BY_SHAPE = ("model", "patch_size", "decoder_embed_dim", "decoder_depth")  # not given: the model's own


def check_changes(
    args: Namespace,
    content: dict,
    source: str,
    listing: dict | None = None,
    finished: bool = False,
    start_epoch: int = 0,
    flag: str = "--resume",
) -> None:
    """Compares a run's settings and data with those of the checkpoint that it goes on from.

    Args:
        args: of the run. content: of the checkpoint that `flag` names as `source`; older ones say less, and
            what they do not say is not compared.
        listing: `util.run.start.describe_data` of the run's data; None: of another loop than our scripts',
            whose settings need not be those of its model.
        finished: nothing is left to do, so that data and recipe must be the same.
        start_epoch: that was asked for, which the checkpoint decides; 0: none.

    Raises:
        UserError: a change that `RULES` calls an error.
    """
    saved = content.get("args") if isinstance(content.get("args"), dict) else {}
    saved = {"opt": "adamw", "opt_args": [], **saved} if saved else saved  # before the flags were
    weights_only = "optimizer" not in content
    for name, theirs, own in _changes("model", args, saved) if listing is not None else ():
        if (None in (theirs, own) and name in _BY_SHAPE) or (weights_only and name in _OF_TRAINING):
            continue
        own, theirs = in_words(name, own), in_words(name, theirs)
        raise UserError(f"--{name} {own}: {source} was trained with {theirs}; go on with that")
    if weights_only:
        return
    if finished:
        args = _as_many_processes(args, saved)
    run = content.get("run") if isinstance(content.get("run"), dict) else {}
    changed = _data_changes(run, listing) + [
        f"{name} {in_words(name, theirs)} -> {in_words(name, own)}"
        for group in ("data", "recipe")
        for name, theirs, own in _changes(group, args, saved)
        if name not in ("data_path", "labels") or "files" not in run or not listing
    ]
    if changed and content.get("step"):
        there = list_checkpoints(Path(source).parent) if "://" not in source else []
        whole = next((f" ({path})" for path in there if not is_inside_epoch(path)), "")
        raise UserError(
            f"{flag} {source}: was saved inside an epoch, and this command differs: {', '.join(changed)}; "
            f"keep to it until the epoch's end, or resume from a checkpoint of a whole epoch{whole}"
        )
    stored = run.get("held_out") if isinstance(run.get("held_out"), dict) else {}
    changed += [f"held-out {text}" for text in _data_changes(stored, (listing or {}).get("held_out"))]
    if start_epoch and start_epoch != content.get("epoch", -1) + 1:
        changed.append(f"start_epoch {content.get('epoch', -1) + 1} -> {start_epoch}")
    if changed and finished:
        raise UserError(
            f"{flag} {source}: is complete, so nothing is left to do, and this command differs: "
            f"{', '.join(changed)}; to train on, pass more --epochs; for a new run from its weights, --init "
            f"{source} (classifiers: --finetune) and another --output_dir"
        )
    if changed and is_main_process():
        warn(f"resume: settings differ from the checkpoint's: {', '.join(changed)}")


def _as_many_processes(args: Namespace, saved: dict) -> Namespace:
    """`args` as they would be with the processes of the checkpoint, on which the learning rate depends."""
    own, theirs = getattr(args, "world_size", None), saved.get("world_size")
    if type(own) is not int or type(theirs) is not int or not own:
        return args
    args = Namespace(**{**vars(args), "world_size": theirs})
    rates = getattr(args, "lr", None), saved.get("lr")
    if all(isinstance(rate, float) for rate in rates) and math.isclose(rates[0] * theirs / own, rates[1]):
        args.lr = rates[1]
    return args


def _data_changes(saved: dict, listing: dict | None) -> list[str]:
    if not listing or "files" not in saved:
        return []
    if saved["files"] == listing.get("files"):
        return [] if saved.get("labels") == listing.get("labels") else ["labels: others of the same images"]
    if saved.get("images") == listing["images"]:
        return [f"images: {listing['images']} as before, but of other names"]
    return [f"images {shown(saved.get('images'))} -> {listing['images']}"]


def _changes(group: str, args: Namespace, saved: dict) -> list[tuple]:
    """(name, value in the checkpoint, own value) of the settings of a group that differ."""
    saved, own = _joined(saved), _joined(vars(args))
    names = [*GROUPS[group].split(), *(["effective batch"] if group == "recipe" else [])]
    pairs = [(name, saved[name], own[name]) for name in names if name in saved and name in own]
    return [(name, theirs, ours) for name, theirs, ours in pairs if comparable(theirs) != comparable(ours)]


def _joined(settings: dict) -> dict:
    """Settings with what counts of some in their place: the effective batch, `lr` for `blr`, the digests of
    the teacher's tensors and of the mask for their files.
    """
    settings = dict(settings)
    for name, digest in (("teacher", "teacher_digest"), ("mask_file", "mask_digest")):
        settings |= {name: settings[digest]} if digest in settings else {}
    settings.pop("lr" if settings.get("lr") is None else "blr", None)
    parts = [settings.get(name) for name in ("batch_size", "accum_iter", "world_size")]
    if all(type(part) is int for part in parts):
        settings["effective batch"] = parts[0] * parts[1] * parts[2]
        del settings["batch_size"], settings["accum_iter"]
    return settings
