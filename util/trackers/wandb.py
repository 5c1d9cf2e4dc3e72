"""Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and the rest of its environment count; without a
login it works offline, and `wandb sync` of the folder that it names sends the run later.
"""

import os
from pathlib import Path

import wandb


def start(settings: dict, folder: Path, name: str, run_id: str | None):
    folder.mkdir(parents=True, exist_ok=True)
    if "WANDB_MODE" not in os.environ and not wandb.api.api_key:
        os.environ["WANDB_MODE"] = "offline"
    project = os.environ.get("WANDB_PROJECT", "mae")
    run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=folder, config=settings)
    run.define_metric("*", step_metric="epoch")  # a resumed run draws an epoch's part again
    return run


def scalars(run, values: dict[str, float], epoch: float) -> None:
    run.log({**values, "epoch": epoch})


def picture(run, name: str, image, epoch: float) -> None:
    run.log({name: wandb.Image(image), "epoch": epoch})


def checkpoint(run, path: Path) -> None:
    run.log_artifact(str(path), name=f"{run.id}-checkpoint", type="model")


def finish(run) -> None:
    run.finish()
