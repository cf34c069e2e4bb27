"""What a classifier of texts is compared with: logistic regression on TF-IDF, and on an encoder that is not trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from dist_train.data.splits.split import SPLITS
from dist_train.data.texts import Texts
from dist_train.data.tokens import Padding, Tokens
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.models.text_base import Pretrained, read_config, read_model
from dist_train.system.console import log

TFIDF, FROZEN = "TF-IDF + logistic regression", "frozen encoder + logistic regression"
_STRENGTHS = (0.1, 1.0, 10.0, 30.0)
_ROWS_AT_ONCE = 64


def tfidf_probabilities(texts: Texts) -> dict[str, Tensor]:
    """Probabilities of the test rows, (rows, classes) float64, by words and pairs of words that two rows have.

    Under the name TFIDF; a warning and none where the training rows have no such words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    of_split = {name: [texts.texts[row] for row in texts.rows_of(name).tolist()] for name in SPLITS}
    fewest = 2 if len(of_split["train"]) >= 1000 else 1
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=fewest, sublinear_tf=True)
    try:
        vectorizer.fit(of_split["train"])
    except ValueError as error:  # scikit-learn's: no words are left
        log.warning("%s is left out: %s", TFIDF, str(error).splitlines()[0])
        return {}
    features = {name: vectorizer.transform(own or [""]) for name, own in of_split.items()}
    return {TFIDF: _logistic_regression(features, texts)}


def frozen_probabilities(embeddings: Tensor, texts: Texts) -> Tensor:
    """Probabilities of the test rows, (rows, classes) float64, by embeddings of all rows, (rows, width)."""
    return _logistic_regression({name: embeddings[texts.rows_of(name)].double().numpy() for name in SPLITS}, texts)


@torch.no_grad()
def embed(base: Pretrained, tokens: Tokens, padding: Padding, collectives: Collectives) -> Tensor | None:
    """Mean of the last hidden states of each text's tokens, (rows, width) float32, on rank 0; None on the others."""
    device = collectives.device
    model = read_model(base, "AutoModel", read_config(base)).to(device).eval()
    first, last = split_evenly(0, len(tokens.ends) - 1, collectives.size)[collectives.rank]
    own = tokens.select(torch.arange(first, last))
    embedded = torch.empty((last - first, model.config.hidden_size))
    for rows in own.lengths.argsort(stable=True).split(_ROWS_AT_ONCE):
        part = own.select(rows)
        mask = torch.arange(padding.width(part.lengths)) < part.lengths.unsqueeze(1)
        ids = torch.full(mask.shape, padding.pad_id)
        ids[mask] = part.ids.long()
        states = model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state.cpu()
        embedded[rows] = (states * mask.unsqueeze(2)).sum(1) / part.lengths.unsqueeze(1)
    return collectives.gather_rows(embedded)


def _logistic_regression(features: dict[str, Any], texts: Texts) -> Tensor:
    """Of the strengths of regularisation the one with the lowest log loss on the validation rows, if there are any."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    targets = {name: texts.targets[texts.rows_of(name)].numpy() for name in SPLITS}
    classes = list(range(len(texts.class_names)))
    best: tuple[float, Any] | None = None
    for strength in _STRENGTHS if len(targets["valid"]) else (1.0,):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged after so many iterations: near enough
            fitted = LogisticRegression(C=strength, max_iter=300).fit(features["train"], targets["train"])
        loss = 0.0
        if len(targets["valid"]):
            loss = log_loss(targets["valid"], fitted.predict_proba(features["valid"]), labels=classes)
        if best is None or loss < best[0]:
            best = loss, fitted
    assert best is not None
    return torch.from_numpy(best[1].predict_proba(features["test"])).double()
