"""What a rank that trains a text classifier imports, for the server that ranks are forked from (tests/ranks.py)."""

from __future__ import annotations

from contextlib import suppress

from dist_train.errors import UserError
from dist_train.models.text_base import import_transformers

with suppress(UserError, ImportError):
    import_transformers().BertForSequenceClassification  # noqa: B018  # it is imported when it is first named
    import peft  # noqa: F401

    import dist_train.tasks.text  # noqa: F401
