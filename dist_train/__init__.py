"""Trains classifiers for financial risk on tables: distributed, exact, resumable.

    from dist_train import Classifier, load

    classifier = Classifier(epochs=20).fit(X, y)
    classifier.predict_proba(X)

The names below are what other programs rely on. Each is imported when it is first asked for: `import dist_train` loads
neither torch nor scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from dist_train.api.classifier import Classifier
    from dist_train.api.jobs import load, load_config, train
    from dist_train.config.schema import JobConfig
    from dist_train.data.encoding.spec import FeatureSpec
    from dist_train.errors import TrainingFault, UserError
    from dist_train.models.embeddings import TabularInputs
    from dist_train.models.registry import register_model
    from dist_train.tasks.registry import register_task
    from dist_train.training.loss import register_loss
    from dist_train.training.metrics import register_metric

__all__ = [
    "Classifier",
    "FeatureSpec",
    "JobConfig",
    "TabularInputs",
    "TrainingFault",
    "UserError",
    "load",
    "load_config",
    "register_loss",
    "register_metric",
    "register_model",
    "register_task",
    "train",
]

_MODULES = {
    "Classifier": "dist_train.api.classifier",
    "FeatureSpec": "dist_train.data.encoding.spec",
    "JobConfig": "dist_train.config.schema",
    "TabularInputs": "dist_train.models.embeddings",
    "TrainingFault": "dist_train.errors",
    "UserError": "dist_train.errors",
    "load": "dist_train.api.jobs",
    "load_config": "dist_train.api.jobs",
    "register_loss": "dist_train.training.loss",
    "register_metric": "dist_train.training.metrics",
    "register_model": "dist_train.models.registry",
    "register_task": "dist_train.tasks.registry",
    "train": "dist_train.api.jobs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
