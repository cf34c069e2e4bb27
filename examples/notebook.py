"""A notebook in one file: fit, score, save, load; then a model family, a metric and a loss of one's own.

    python examples/notebook.py

It needs an installed dist_train and no repository, and takes some seconds on one core. Editors that know `# %%` run it
cell by cell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train import Classifier, FeatureSpec, TabularInputs, load, register_loss, register_metric, register_model

# %% A table: numbers, a column of text, missing cells. A pandas DataFrame or an array will do as well.
rng = np.random.default_rng(0)
num_rows = 2000
income, debt = rng.lognormal(8, 0.5, num_rows), rng.lognormal(7, 1, num_rows)
purpose = rng.choice(["car", "home", "education"], num_rows)
odds = np.log(debt / income) + 0.8 * (purpose == "education") + rng.logistic(size=num_rows)
X = pl.DataFrame(
    {
        "income": pl.Series(np.where(rng.random(num_rows) < 0.05, np.nan, income)).fill_nan(None),
        "debt": debt,
        "purpose": purpose,
    }
)
y = np.where(odds > 0, "default", "paid")
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.25, random_state=0)

# %% Fit. A share of the rows validates and chooses the best epoch.
classifier = Classifier(epochs=10, learning_rate=3e-3, device="cpu").fit(X_train, y_train)
print("validation:", {name: round(classifier.summary_["valid"][name], 3) for name in ("loss", "auroc", "brier")})

# %% Score: the columns are in the order of classes_.
probabilities = classifier.predict_proba(X_test)
print(classifier.classes_, probabilities[0].round(3), "accuracy", round(classifier.score(X_test, y_test), 3))

# %% Save, load. The folder holds tensors and JSON; `dist-train predict FOLDER clients.csv scores.csv` reads it too.
folder = Path(tempfile.mkdtemp()) / "loans"
classifier.save(folder)
assert np.array_equal(Classifier.load(folder).predict_proba(X_test), probabilities)
predictor = load(folder)
print(predictor.predict([{"income": 3000, "debt": 9000, "purpose": "car"}]))
print("test:", round(predictor.evaluate(data=X_test.with_columns(pl.Series("target", y_test)))["loss"], 3))


# %% A model family: a function of the columns and of its own block of keys, model.two_layers.*
@dataclass(frozen=True, kw_only=True)
class TwoLayers:
    """Keys of the family."""

    width: int = 16


class Network(nn.Module):
    """Numbers, missing flags and one-hot categories through two layers."""

    def __init__(self, spec: FeatureSpec, width: int) -> None:
        super().__init__()
        self.inputs = TabularInputs(spec)
        self.layers = nn.Sequential(
            nn.Linear(self.inputs.width, width), nn.Tanh(), nn.Linear(width, len(spec.class_names))
        )

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Logits, (rows, classes)."""
        logits: Tensor = self.layers(self.inputs(numeric, flags, codes))
        return logits


@register_model("two_layers", TwoLayers)
def two_layers(spec: FeatureSpec, config: TwoLayers) -> nn.Module:
    """The network for a table's columns."""
    return Network(spec, config.width)


# %% A metric: what the probabilities of all rows of a split are worth.
@register_metric("share_above_one_half")
def share_above_one_half(
    probabilities: npt.NDArray[Any],
    targets: npt.NDArray[Any],  # noqa: ARG001
    class_names: Sequence[str],
) -> float:
    """Share of the rows whose probability of default is above one half."""
    return float((probabilities[:, list(class_names).index("default")] > 0.5).mean())


# %% A loss: one number a row.
@register_loss("focal")
def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss with exponent 2 (Lin et al. 2017): rows that are right already count less."""
    log_probability = -F.cross_entropy(logits, targets, reduction="none")
    return -((1 - log_probability.exp()) ** 2) * log_probability


# %% All three together.
own = Classifier(
    model="two_layers",
    epochs=10,
    learning_rate=1e-2,
    device="cpu",
    overrides=["model.two_layers.width=8", "train.loss=focal", "evaluation.metrics=[share_above_one_half]"],
).fit(X_train, y_train)
print("own model:", {n: round(own.summary_["valid"][n], 3) for n in ("loss", "auroc", "share_above_one_half")})
