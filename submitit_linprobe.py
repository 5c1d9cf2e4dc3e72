r"""Submits a linear probing (main_linprobe.py) to a SLURM cluster; it survives time limits and pre-emption.

ViT-B on ImageNet as in the paper, 4 nodes of 8 GPUs (effective batch 512 x 32 = 16384):
    python submitit_linprobe.py --job_dir /shared/mae/%j --nodes 4 --ngpus 8 --cpus_per_task 10 \
        --data_path IMAGENET --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 --batch_size 512 \
        --epochs 90 --blr 0.1

Only look at what would be submitted: --dry_run. Run it on this machine, without SLURM: --cluster local.
Flags that are not in the group "SLURM" are those of main_linprobe.py.
"""

import main_linprobe
from util.slurm.submit import launch

if __name__ == "__main__":
    launch(main_linprobe, __doc__)
