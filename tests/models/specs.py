"""Feature specs and batches that fit them, for the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_train.data.encoding.encoder import Inputs, smallest_int
from dist_train.data.encoding.spec import FIRST_CATEGORY, NUM_QUANTILES, CategoricalColumn, FeatureSpec, NumericColumn


def make_spec(
    num_numeric: int = 5, sizes: Sequence[int] = (), *, num_flags: int = 0, num_classes: int = 3
) -> FeatureSpec:
    """Numbers, of which the first `num_flags` have a flag, and categories with `sizes` codes, all seen in training."""
    quantiles = tuple(i / (NUM_QUANTILES - 1) * 4 - 2 for i in range(NUM_QUANTILES))
    return FeatureSpec(
        numeric=tuple(
            NumericColumn(name=f"x{i}", median=0.0, scale=1.0, has_missing_flag=i < num_flags, quantiles=quantiles)
            for i in range(num_numeric)
        ),
        categorical=tuple(
            CategoricalColumn(
                name=f"c{i}",
                categories=tuple(f"word {j}" for j in range(size - FIRST_CATEGORY)),
                seen_in_training=(True,) * size,
            )
            for i, size in enumerate(sizes)
        ),
        class_names=tuple("abcdefghij"[:num_classes]),
    )


def make_inputs(spec: FeatureSpec, num_rows: int, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Inputs:
    """Rows such as an encoder gives: numbers within (-3, 3), flags, codes that all occur given rows enough."""
    generator = torch.Generator().manual_seed(seed)
    numeric = torch.randn((num_rows, spec.num_numeric), generator=generator, dtype=dtype).clamp(-2.9, 2.9)
    flags = torch.randint(0, 2, (num_rows, spec.num_flags), generator=generator).to(torch.uint8)
    codes = torch.empty((num_rows, spec.num_categorical), dtype=smallest_int(max(spec.category_sizes, default=1)))
    for index, size in enumerate(spec.category_sizes):
        codes[:, index] = torch.randperm(num_rows, generator=generator) % size
    return Inputs(numeric, flags, codes)
