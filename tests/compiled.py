"""Importing this loads the machine code of a step in float32, which a process otherwise does in its first step."""

from __future__ import annotations

import numpy as np

from dist_train.accel import cpu_kernels

_block = [np.zeros((2, 4), np.float32) for _ in range(3)]
_factors = [np.zeros(4, np.float32) for _ in range(4)]
_statistics = np.zeros((3, 4))
_mean, _inverse_std = np.zeros((2, 4))

cpu_kernels.batch_norm_stats(_block[0], _statistics)
cpu_kernels.batch_norm_gather_stats(_statistics[None], _statistics.copy())
cpu_kernels.batch_norm_scale_shift(
    _statistics[None], _statistics.copy(), 1e-5, _factors[0], _factors[1], _inverse_std, _factors[2], _factors[3]
)
cpu_kernels.update_running_stats(_factors[0], _factors[1], np.full((3, 4), 2.0), _factors[2], 0.1)
cpu_kernels.affine_relu_dropout(_block[0], _factors[0], _factors[1], 0, 0, _block[1])
cpu_kernels.relu_dropout_backward(_block[0], _block[1], _block[2], np.zeros((2, 4)))
cpu_kernels.add(_factors[0], _mean)
cpu_kernels.add_rows(_factors[0], _block[0])
cpu_kernels.batch_norm_backward_reduce(np.zeros((1, 2, 4)), _mean, _inverse_std)
cpu_kernels.batch_norm_backward_coefficients(
    np.zeros((2, 4)), 2.0, _mean, _inverse_std, _factors[0], _factors[1], _factors[2]
)
cpu_kernels.batch_norm_backward_elemt(_block[0], _block[1], _factors[0], _factors[1], _factors[2])
