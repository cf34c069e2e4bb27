"""Log loss and calibration error of test rows before and after calibration, on five tables.

    python -m benchmarks.calibration

The tables: the built-in one, scikit-learn's breast cancer, wine and digits, and a generated one of 20,000 rows with 3 %
of the second class. Each is trained once; `--overfitted` without dropout and weight decay, and by validation accuracy,
so that probabilities are too sure. Every method is fitted to the same validation rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import polars as pl

import dist_train
from dist_train.risk.calibration import fit_calibration
from dist_train.run.scoring.predictor import Predictor
from dist_train.training.metrics import classification_metrics

METHODS = ("temperature", "vector", "isotonic")
OVERFITTED = ("model.dropout=0", "optim.weight_decay=0", "train.select_by=accuracy")


def tables(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name, and the keys of a job on it."""
    from sklearn import datasets

    yield "built-in", ["train.epochs=10"]
    made = {
        "breast cancer": datasets.load_breast_cancer(return_X_y=True),
        "wine": datasets.load_wine(return_X_y=True),
        "digits": datasets.load_digits(return_X_y=True),
        "imbalanced": datasets.make_classification(
            20_000, 20, n_informative=8, n_redundant=4, weights=[0.97], flip_y=0.01, random_state=0
        ),
    }
    for name, (x, y) in made.items():
        file = folder / f"{name.replace(' ', '_')}.parquet"
        columns = {f"x{i}": x[:, i].astype(float) for i in range(x.shape[1])} | {"y": [f"class {k}" for k in y]}
        pl.DataFrame(columns).write_parquet(file)
        yield name, [f"data.path={file}", "data.target=y", "train.epochs=30", "train.global_batch_size=64"]


def main() -> None:
    """Train, calibrate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overfitted", action="store_true")
    arguments = parser.parse_args()
    more = OVERFITTED if arguments.overfitted else ()
    print("| table | valid rows | temperature (p) | log loss | " + " | ".join(METHODS) + " | ECE | "
          + " | ".join(METHODS) + " |")  # fmt: skip
    print("| --- " * (5 + 2 * len(METHODS)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in tables(Path(folder)):
            place = [f"run.dir={folder}", f"run.name={name.replace(' ', '_')}", "wandb.mode=disabled"]
            result = dist_train.train(None, [*keys, *place, *more], verbose=False)
            print(line(name, dist_train.load(result.run_dir)), flush=True)


def line(name: str, predictor: Predictor) -> str:
    """A row of the table."""
    found = {}
    for split in ("valid", "test"):
        scored = predictor.scored_split(split)
        assert scored is not None
        assert scored[0] is not None
        found[split] = scored[0].numpy(), scored[1].targets.numpy()
    tested, targets = found["test"]
    fitted = {method: fit_calibration(method, *found["valid"]) for method in METHODS}
    after = {"own": tested} | {method: fit.calibration(tested) for method, fit in fitted.items()}
    scores = {key: classification_metrics(p, targets, predictor.class_names) for key, p in after.items()}
    own, p_value = scores["own"]["loss"], fitted["temperature"].p_value
    losses = [f"{scores[m]['loss']:.4f} ({scores[m]['loss'] / own - 1:+.1%})" for m in METHODS]
    errors = [f"{scores[m]['ece']:.4f}" for m in METHODS]
    temperature = f"{fitted['temperature'].estimate.parameters()['temperature']:.3f} ({p_value:.2g})"
    cells = [
        name,
        str(len(found["valid"][1])),
        temperature,
        f"{own:.4f}",
        *losses,
        f"{scores['own']['ece']:.4f}",
        *errors,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
