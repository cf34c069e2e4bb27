"""Importing this loads the machine code of a step in float32, which a process otherwise does in its first step."""

from __future__ import annotations

import numpy as np

from dist_train.models import kernels

_block = [np.zeros((2, 4), np.float32) for _ in range(3)]
_factors = [np.zeros(4, np.float32) for _ in range(4)]
_statistics = np.zeros((3, 4))
_mean, _inverse_std = np.zeros((2, 4))

kernels.observe(_block[0], _statistics)
kernels.merge(_statistics[None], _statistics.copy())
kernels.normalise(
    _statistics[None], _statistics.copy(), 1e-5, _factors[0], _factors[1], _inverse_std, _factors[2], _factors[3]
)
kernels.follow(_factors[0], _factors[1], np.full((3, 4), 2.0), _factors[2], 0.1)
kernels.activate(_block[0], _factors[0], _factors[1], 0, 0, _block[1])
kernels.withdraw(_block[0], _block[1], _block[2], np.zeros((2, 4)))
kernels.add(_factors[0], _mean)
kernels.add_rows(_factors[0], _block[0])
kernels.project(np.zeros((1, 2, 4)), _mean, _inverse_std)
kernels.correct(np.zeros((2, 4)), 2.0, _mean, _inverse_std, _factors[0], _factors[1], _factors[2])
kernels.propagate(_block[0], _block[1], _factors[0], _factors[1], _factors[2])
