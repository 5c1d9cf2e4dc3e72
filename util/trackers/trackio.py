"""Trackio: a local database that `trackio show` draws; TRACKIO_PROJECT and TRACKIO_SPACE_ID count."""

import os
from pathlib import Path

import trackio


def start(settings: dict, folder: Path, name: str, run_id: str | None):
    project = os.environ.get("TRACKIO_PROJECT", "mae")
    name = f"{name}-{run_id[:8]}" if run_id else name  # by which it knows a resumed run again
    return trackio.init(project=project, name=name, config=settings, resume="allow", embed=False)


def scalars(run, values: dict[str, float], epoch: float) -> None:
    run.log({**values, "epoch": epoch})


def picture(run, name: str, image, epoch: float) -> None:
    run.log({name: trackio.Image(image), "epoch": epoch})


def checkpoint(run, path: Path) -> None:
    artifact = trackio.Artifact(f"{run.name}-checkpoint", type="model")
    artifact.add_file(str(path))
    run.log_artifact(artifact)


def finish(run) -> None:
    run.finish()
