"""`--teacher`: pre-training in which the encoder also imitates another one, for small models (MAE-Lite, "A
Closer Look at Self-Supervised Lightweight Vision Transformers", arXiv 2205.14443).

The teacher's encoder, frozen, sees the visible patches that the student's sees, in the same order. One block
of each is compared: the maps of its attention (the paper's way), or the tokens that it returns. Where those
differ in width, a linear map, `teacher_map`, is trained and saved with the student, for resuming alone; the
teacher is no part of the student. The engine adds the distance to the loss of the reconstruction.
"""

from argparse import Namespace
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT, gather_tokens
from models_vit import VisionTransformer
from util.compute.blocks import add_registers, drop_registers, run_blocks
from util.errors import UserError
from util.files import counted, printable
from util.processes.collectives import log
from util.weights.build import build
from util.weights.describe import describe
from util.weights.files import digest, read_file
from util.weights.flags import warn_of_other_stats
from util.weights.size import at_size


@dataclass
class Lesson:
    """What is learned of whom. No module: a student's parameters and state are without the teacher."""

    teacher: VisionTransformer  # frozen, in eval mode; its last block is the one to imitate
    features: bool  # the block's tokens, else its attention
    block: int  # of the student; 1 is the first


def make_student(model: MaskedAutoencoderViT, args: Namespace, device: torch.device) -> None:
    """Makes a `Student` of `model`, in place; call it before the optimizer is made.

    Args:
        args: teacher; teacher_loss, _weight and _block, whose defaults are set where they are None; fsdp,
            no_verify, mean, std. Gets teacher_digest, by which a resumed run knows the teacher again.

    Raises:
        UserError: flags that cannot be together, a model that computes its own way, or a teacher that is
            unreadable or does not fit it.
    """
    depth, width, own = len(model.blocks), model.cls_token.shape[2], type(model)
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
        raise UserError(f"--teacher_block {args.teacher_block}: the model has {counted(depth, 'block')}")
    use = f"{args.teacher_loss} of its block {{}}, in block {args.teacher_block} of the model, weight "
    teacher = read_teacher(model, args, args.teacher_block, f"{use}{args.teacher_weight:g}")
    if args.teacher_loss == "features" and teacher.embed_dim != width:
        model.teacher_map = nn.Linear(width, teacher.embed_dim)
    if args.teacher_loss == "attention":
        blocks = model.blocks[args.teacher_block - 1], teacher.blocks[-1]
        if not all(isinstance(block.attn, vision_transformer.Attention) for block in blocks):
            raise UserError(
                "--teacher: needs --teacher_loss features, as a block has an attention of its own"
            )
        heads, taught = (block.attn.num_heads for block in blocks)
        if taught % heads:
            raise UserError(f"--teacher_loss attention: {heads} heads of the model cannot share {taught} of "
                            "the teacher evenly; pass --teacher_loss features")  # fmt: skip
    model.lesson = Lesson(teacher.to(device), args.teacher_loss == "features", args.teacher_block)
    model.__class__ = type("Student", (Student, own), {})


def read_teacher(model: MaskedAutoencoderViT, args: Namespace, number: int, use: str) -> VisionTransformer:
    """The encoder in the file `args.teacher` for the model's images; of its blocks those up to the one that
    stands where the block `number` stands in the model. `use`: of that block, {}, for the log.
    """
    content = read_file(args.teacher, "--teacher", not args.no_verify, "")
    try:
        weights = at_size(describe(content, args.teacher, Namespace(), "encoder"), model.img_size)
        teacher = build(weights).requires_grad_(False)
    except UserError as error:
        text = str(error).replace("--resume ", "--teacher ")
        raise UserError(text.partition("; pass --")[0]) from None  # flags that there are not here
    for name in ("patch_size", "in_chans"):
        if (theirs := weights.sizes[name]) != (ours := getattr(model, name)):
            raise UserError(f"--teacher {args.teacher}: has --{name} {theirs}, the model {ours}; both see "
                            "the same patches, so pass a teacher of the same")  # fmt: skip
    warn_of_other_stats(args, content, args.teacher)
    args.teacher_digest, depth = digest(teacher.state_dict(), {}), len(teacher.blocks)
    block = max(1, round(number * depth / len(model.blocks)))
    log(f"teacher: {printable(args.teacher)} ({printable(weights.kind)}), width {teacher.embed_dim}, {depth} "
        f"blocks; {use.format(block)}")  # fmt: skip
    teacher.blocks = teacher.blocks[:block]
    return teacher


@torch.no_grad()
def teach(lesson: Lesson, imgs: Tensor, ids_restore: Tensor, visible: int) -> Tensor:
    """Attention (N, heads, T, T) or tokens (N, T, E) of the first `visible` patches in a shuffle (N, L)."""
    teacher = lesson.teacher
    tokens = teacher.patch_embed(imgs) + teacher.pos_embed[:, 1:]
    x = gather_tokens(tokens, ids_restore.argsort(1)[:, :visible])
    cls_token = (teacher.cls_token + teacher.pos_embed[:, :1]).expand(len(x), -1, -1)
    *before, last = teacher.blocks
    x = run_blocks(before, add_registers(teacher, torch.cat([cls_token, x], dim=1)))
    if lesson.features:
        return drop_registers(teacher, last(x))
    return attention_maps(last, drop_registers(teacher, x))


def attention_maps(block: nn.Module, x: Tensor) -> Tensor:
    """Weights (N, heads, T, T) with which a timm block mixes tokens (N, T, D): among those alone, where
    registers were beside them. Torch compiles this.
    """
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1)).unbind(2)
    q, k = block.attn.q_norm(q).transpose(1, 2), block.attn.k_norm(k).transpose(1, 2)
    return at_least_float32(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


def attention_distance(own: Tensor, target: Tensor) -> Tensor:
    """Squared distance of attention maps (N, heads, T, T), a mean over images, heads and queries. Of several
    heads of the teacher for one of the student's the mean counts: heads have no order, any may be anyone's.
    """
    target = target.unflatten(1, (own.shape[1], -1)).mean(dim=2)
    return (own - target).square().sum(dim=-1).mean()


def feature_distance(own: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of tokens (N, T, E), each with mean 0 and variance 1: their scale means nothing
    to the next block, which begins with a norm.
    """
    own, target = (F.layer_norm(at_least_float32(x), x.shape[-1:]) for x in (own, target))
    return (own - target).square().mean()


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Student(MaskedAutoencoderViT):
    """A masked autoencoder with a `lesson`; out of training mode it is nothing but that."""

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None):
        """As the model's own; in training mode its loss and the distance to the teacher, two scalars."""
        if not self.training:
            return super().forward(imgs, mask_ratio, noise)
        blocks, place, recompute = list(self.blocks), self.lesson.block - 1, self.grad_checkpointing
        x, mask, ids_restore = self.embed_visible(imgs, mask_ratio, noise)  # (N, 1 + K, D)
        target = teach(self.lesson, imgs, ids_restore, x.shape[1] - 1)
        before = run_blocks(blocks[:place], add_registers(self, x), recompute)
        after = run_blocks(blocks[place : place + 1], before, recompute)
        x = self.norm(drop_registers(self, run_blocks(blocks[place + 1 :], after, recompute)))
        loss = self.forward_loss(imgs, *self.predict(x, mask, ids_restore))
        before, after = drop_registers(self, before), drop_registers(self, after)  # either may have its own
        if self.lesson.features:
            own = self.teacher_map(after) if hasattr(self, "teacher_map") else after
            return loss, feature_distance(own, target)
        return loss, attention_distance(attention_maps(blocks[place], before), target)
