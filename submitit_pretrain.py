r"""Submits a pre-training (main_pretrain.py) to a SLURM cluster; it survives time limits and pre-emption.

ViT-L on ImageNet as in the paper, 8 nodes of 8 GPUs (effective batch 64 x 64 = 4096), three days a start:
    python submitit_pretrain.py --job_dir /shared/mae/%j --nodes 8 --timeout 4320 --cpus_per_task 10 \
        --data_path IMAGENET --model mae_vit_large_patch16 --norm_pix_loss --batch_size 64 --epochs 800 \
        --warmup_epochs 40 --blr 1.5e-4

Only look at what would be submitted: --dry_run. Run it on this machine, without SLURM: --cluster local.
Flags that are not in the group "SLURM" are those of main_pretrain.py.
"""

import main_pretrain
from util.slurm.submit import launch

if __name__ == "__main__":
    launch(main_pretrain, __doc__)
