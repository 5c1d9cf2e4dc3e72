r"""Submits a fine-tuning (main_finetune.py) to a SLURM cluster; it survives time limits and pre-emption.

ViT-B on ImageNet as in the paper, 4 nodes of 8 GPUs (effective batch 32 x 32 = 1024):
    python submitit_finetune.py --job_dir /shared/mae/%j --nodes 4 --ngpus 8 --cpus_per_task 10 \
        --data_path IMAGENET --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 --batch_size 32 \
        --epochs 100 --blr 5e-4 --layer_decay 0.65 --mixup 0.8 --cutmix 1.0

Only look at what would be submitted: --dry_run. Run it on this machine, without SLURM: --cluster local.
Flags that are not in the group "SLURM" are those of main_finetune.py.
"""

import main_finetune
from util.slurm.submit import launch

if __name__ == "__main__":
    launch(main_finetune, __doc__)
