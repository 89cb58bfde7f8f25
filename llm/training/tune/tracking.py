"""Where a run is logged: which trackers, and their settings from `experiment_tracking_config`.

A tracker's settings become `TrainingArguments` where these have them, else the environment variables that its
library reads. A variable that is already set wins; passwords and API keys belong there, never in YAML.
"""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from llm.errors import ConfigError, MissingExtraError, did_you_mean
from llm.training.config import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """`package`: the module it needs; YAML setting -> environment variable, or -> field of
    `TrainingArguments`."""

    package: str
    variables: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)


TRACKERS = {
    "tensorboard": Tracker(package="tensorboard", variables={"logging_dir": "TENSORBOARD_LOGGING_DIR"}),
    "wandb": Tracker(
        package="wandb",
        variables={
            "project": "WANDB_PROJECT",
            "entity": "WANDB_ENTITY",
            "group": "WANDB_RUN_GROUP",
            "tags": "WANDB_TAGS",
            "mode": "WANDB_MODE",
            "dir": "WANDB_DIR",
        },
        arguments={"name": "run_name"},
    ),
    "comet_ml": Tracker(
        package="comet_ml",
        variables={
            "project": "COMET_PROJECT_NAME",
            "workspace": "COMET_WORKSPACE",
            "mode": "COMET_START_MODE",
        },
        arguments={"name": "run_name"},
    ),
    "mlflow": Tracker(
        package="mlflow",
        variables={
            "experiment_name": "MLFLOW_EXPERIMENT_NAME",
            "tracking_uri": "MLFLOW_TRACKING_URI",
            "run_id": "MLFLOW_RUN_ID",
            "tags": "MLFLOW_TAGS",
        },
        arguments={"name": "run_name"},
    ),
    "trackio": Tracker(
        package="trackio",
        arguments={"project": "project", "name": "run_name", "space_id": "trackio_space_id"},
    ),
}


def resolve_report_to(config: FinetuneConfig) -> list[str]:
    """The trackers of a run, checked to be installed: `report_to`, else that of `experiment_tracking_config`,
    else TensorBoard when it is installed, else none.
    """
    asked = config.report_to
    if asked is None and config.experiment_tracking_config is not None:
        asked = [config.experiment_tracking_config.method]
    if asked is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    if asked == ["none"]:
        return []
    for name in asked:
        _check_tracker(name, key="report_to" if config.report_to else "experiment_tracking_config.method")
    return asked


def tracking_arguments(config: FinetuneConfig) -> dict[str, Any]:
    """The `TrainingArguments` of `experiment_tracking_config`, such as `run_name`; sets its environment
    variables.

    ConfigError for a setting that the tracker does not know.
    """
    tracking = config.experiment_tracking_config
    if tracking is None:
        return {}
    _check_tracker(tracking.method, key="experiment_tracking_config.method")
    tracker = TRACKERS[tracking.method]
    arguments = {}
    for name, value in tracking.kwargs.items():
        if name in tracker.arguments:
            arguments[tracker.arguments[name]] = value
        elif name in tracker.variables:
            text = ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
            os.environ.setdefault(tracker.variables[name], text)
        else:
            raise ConfigError(
                f"experiment_tracking_config.kwargs: `{tracking.method}` takes no `{name}` here. "
                f"{did_you_mean(name, {*tracker.variables, *tracker.arguments})} Everything else, each key and "
                "password too, is set by the tracker's environment variables."
            )
    return arguments


def _check_tracker(name: str, *, key: str) -> None:
    if name not in TRACKERS:
        raise ConfigError(f"{key}: no tracker `{name}`. {did_you_mean(name, TRACKERS)}")
    if find_spec(TRACKERS[name].package) is None:
        raise MissingExtraError(
            f"{key}: `{name}` is not installed: pip install {TRACKERS[name].package}. `report_to: none` trains without."
        )
