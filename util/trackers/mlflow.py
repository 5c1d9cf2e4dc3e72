"""MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME count; without an address it writes to `mlruns` in
the folder of the curves, which `mlflow ui --backend-store-uri` draws. Steps are 1000 epochs.
"""

import os
from pathlib import Path

import mlflow
from PIL import Image

_TAG = "mae.run"  # by which it knows a resumed run again


def start(settings: dict, folder: Path, name: str, run_id: str | None):
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri((folder / "mlruns").as_uri())
    experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "mae"))
    client, known = mlflow.MlflowClient(), []
    if run_id:
        known = client.search_runs([experiment.experiment_id], f"tags.`{_TAG}` = '{run_id}'")
    if known:
        own = known[0].info.run_id
        client.update_run(own, status="RUNNING")
    else:
        tags = {"mlflow.runName": name, **({_TAG: run_id} if run_id else {})}
        own = client.create_run(experiment.experiment_id, tags=tags).info.run_id
        for key, value in settings.items():
            client.log_param(own, key, str(value)[:500])
    return client, own


def scalars(run, values: dict[str, float], epoch: float) -> None:
    client, own = run
    for name, value in values.items():
        client.log_metric(own, name, value, step=round(1000 * epoch))


def picture(run, name: str, image, epoch: float) -> None:
    client, own = run
    client.log_image(own, Image.fromarray(image), artifact_file=f"{name}-{epoch:g}.png")


def checkpoint(run, path: Path) -> None:
    client, own = run
    client.log_artifact(own, str(path), artifact_path="checkpoints")


def finish(run) -> None:
    client, own = run
    client.set_terminated(own)
