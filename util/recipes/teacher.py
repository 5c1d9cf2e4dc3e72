"""`--teacher`: pre-training in which the encoder also imitates another one, for small models (MAE-Lite, "A
Closer Look at Self-Supervised Lightweight Vision Transformers", arXiv 2205.14443).

The teacher's encoder, frozen, sees the visible patches that the student's sees, in the same order. One block
of each is compared: the maps of its attention (the paper's way), or the tokens that it returns. Where those
differ in width, a linear map, `teacher_map`, is trained and saved with the student, for resuming alone. The
teacher is no part of the model. The engine adds the distance to the loss of the reconstruction.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT, gather_tokens
from models_vit import VisionTransformer
from util.compute.blocks import run_blocks
from util.errors import UserError
from util.files import printable
from util.processes.collectives import log
from util.weights.build import build
from util.weights.describe import describe
from util.weights.files import digest, read_file
from util.weights.flags import warn_of_other_stats
from util.weights.size import at_size


def make_student(model: MaskedAutoencoderViT, args: Namespace, device: torch.device) -> None:
    """Makes a `Student` of `model`, in place, and reads its teacher; call it before the optimizer is made.

    Args:
        args: teacher; teacher_loss, _weight and _block, whose defaults are set where they are None; fsdp,
            no_verify, mean, std. Gets teacher_digest, by which a resumed run knows the teacher again.

    Raises:
        UserError: flags that cannot be together, a model that computes its own way, or a teacher that is
            unreadable or does not fit it.
    """
    depth, own = len(model.blocks), type(model)
    if not args.teacher:
        raise UserError("--teacher_loss, --teacher_weight and --teacher_block: need a --teacher FILE")
    if args.fsdp:
        raise UserError("--fsdp: not with --teacher, which is for small models; leave it out")
    for name in ("forward", "forward_encoder"):
        if getattr(own, name) is not getattr(MaskedAutoencoderViT, name):
            raise UserError(f"--teacher: {args.model} has a {name} of its own, which knows no teacher")
    args.teacher_loss, args.teacher_weight = args.teacher_loss or "attention", args.teacher_weight or 1.0
    args.teacher_block = args.teacher_block or depth
    if args.teacher_block > depth:
        raise UserError(f"--teacher_block {args.teacher_block}: the model has {depth} blocks")
    teacher = read_teacher(model, args)
    lesson = Lesson(teacher.to(device), args.teacher_loss == "features", args.teacher_block)
    if not lesson.features:
        check_attention(model.blocks[lesson.block - 1], teacher.blocks[-1])
    elif teacher.embed_dim != (width := model.cls_token.shape[2]):
        model.teacher_map = nn.Linear(width, teacher.embed_dim)
    model.__class__, model.lesson = type("Student", (Student, own), {}), lesson


def read_teacher(model: MaskedAutoencoderViT, args: Namespace) -> VisionTransformer:
    """The encoder in the file `args.teacher`, frozen, in eval mode, for the model's images; of its blocks
    those up to the one that stands where `args.teacher_block` stands in the model.
    """
    content = read_file(args.teacher, "--teacher", not args.no_verify, "")
    try:
        weights = at_size(describe(content, args.teacher, Namespace(), "encoder"), model.img_size)
        teacher = build(weights)
    except UserError as error:
        raise UserError(str(error).replace("--resume ", "--teacher ")) from None
    for name in ("patch_size", "in_chans"):
        if (theirs := weights.sizes[name]) != (ours := getattr(model, name)):
            raise UserError(f"--teacher {args.teacher}: has --{name} {theirs}, the model {ours}; both see "
                            "the same patches, so pass a teacher of the same")  # fmt: skip
    warn_of_other_stats(args, content, args.teacher)
    args.teacher_digest = digest(teacher.state_dict(), {})
    depth = len(teacher.blocks)
    block = max(1, round(args.teacher_block * depth / len(model.blocks)))
    log(f"teacher: {printable(args.teacher)} ({printable(weights.kind)}), width {teacher.embed_dim}, {depth} "
        f"blocks; {args.teacher_loss} of its block {block}, in block {args.teacher_block} of the model, "
        f"weight {args.teacher_weight:g}")  # fmt: skip
    teacher.blocks = teacher.blocks[:block]
    return teacher.requires_grad_(False)


def check_attention(own: nn.Module, theirs: nn.Module) -> None:
    """Raises UserError unless the attention maps of two blocks can be compared."""
    features = "pass --teacher_loss features"
    if not all(isinstance(block.attn, vision_transformer.Attention) for block in (own, theirs)):
        raise UserError(f"--teacher_loss attention: the model has an attention of its own; {features}")
    heads, taught = own.attn.num_heads, theirs.attn.num_heads
    if taught % heads:
        raise UserError(f"--teacher_loss attention: {heads} heads of the model cannot share {taught} of the "
                        f"teacher evenly; {features}")  # fmt: skip


class Lesson:
    """What is learned of whom: `features` or else attention, in the student's `block` (1 is the first), of
    the last block that `teacher` has. No module: the student's parameters and state are without it.
    """

    def __init__(self, teacher: VisionTransformer, features: bool, block: int):
        self.teacher, self.features, self.block = teacher, features, block

    @torch.no_grad()
    def target(self, imgs: Tensor, ids_restore: Tensor, visible: int) -> Tensor:
        """Attention (N, heads, T, T) or tokens (N, T, E) of the first `visible` patches in a shuffle."""
        x = self.teacher.patch_embed(imgs) + self.teacher.pos_embed[:, 1:]
        x = gather_tokens(x, ids_restore.argsort(dim=1)[:, :visible])
        cls_token = (self.teacher.cls_token + self.teacher.pos_embed[:, :1]).expand(len(x), -1, -1)
        *before, last = self.teacher.blocks
        x = run_blocks(before, torch.cat([cls_token, x], dim=1))
        return last(x) if self.features else attention_maps(last, x)


def attention_distance(own: Tensor, target: Tensor) -> Tensor:
    """Mean over images, heads and queries of the squared distance of attention maps (N, heads, T, T). Of
    several heads of the teacher for one of the student's the mean counts: heads have no order, so that any of
    them may be any head's.
    """
    target = target.unflatten(1, (own.shape[1], -1)).mean(dim=2)
    return (own - target).square().sum(dim=-1).mean()


def feature_distance(own: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of tokens (N, T, E), each with mean 0 and variance 1: what scale a block gives
    its tokens means nothing to the next one, which begins with a norm.
    """
    own, target = (F.layer_norm(at_least_float32(x), x.shape[-1:]) for x in (own, target))
    return (own - target).square().mean()


def attention_maps(block: nn.Module, x: Tensor) -> Tensor:
    """Weights (N, heads, T, T) with which a timm block mixes tokens (N, T, D); rows sum to 1. Unlike
    `util.figures.attention.block_attention` it can be compiled, and leaves the block as it is.
    """
    n, length, _ = x.shape
    q, k, _ = block.attn.qkv(block.norm1(x)).view(n, length, 3, block.attn.num_heads, -1).unbind(2)
    q, k = block.attn.q_norm(q).transpose(1, 2), block.attn.k_norm(k).transpose(1, 2)
    return at_least_float32(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Student(MaskedAutoencoderViT):
    """A masked autoencoder with a `lesson`; out of training mode it is nothing but that."""

    lesson: Lesson

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None):
        """As the model's own; in training mode its loss and the distance to the teacher, two scalars."""
        if not self.training:
            return super().forward(imgs, mask_ratio, noise)
        lesson, blocks, recompute = self.lesson, list(self.blocks), self.grad_checkpointing
        x, mask, ids_restore = self.embed_visible(imgs, mask_ratio, noise)  # (N, 1 + K, D)
        target = lesson.target(imgs, ids_restore, x.shape[1] - 1)
        x = run_blocks(blocks[: lesson.block - 1], x, recompute)
        if not lesson.features:
            distance = attention_distance(attention_maps(blocks[lesson.block - 1], x), target)
        x = run_blocks(blocks[lesson.block - 1 : lesson.block], x, recompute)
        if lesson.features:
            distance = feature_distance(self.teacher_map(x) if hasattr(self, "teacher_map") else x, target)
        x = self.norm(run_blocks(blocks[lesson.block :], x, recompute))
        return self.forward_loss(imgs, self.forward_decoder(x, ids_restore), mask), distance
