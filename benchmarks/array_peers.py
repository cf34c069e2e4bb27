"""Peers that are not torch loops: a whole epoch of JAX in one call, and scikit-learn's MLPClassifier.

JAX trains the job of `workload`. scikit-learn's network has neither BatchNorm nor dropout, does not clip gradients, and
is trained by Adam with L2 regularisation.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.contestants import Contestant


def jax_epoch(features: Tensor, targets: Tensor, batch_size: int, device: torch.device) -> Contestant:
    """JAX as it is fastest: an epoch is one `lax.scan` in one jitted call, optax clips and updates; one thread."""
    os.environ["NPROC"] = "1"  # threads of XLA's CPU client
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    import jax
    import jax.numpy as jnp

    chosen = jax.devices("cpu" if device.type == "cpu" else "gpu")[0]
    with jax.default_device(chosen):
        x, y = jnp.asarray(features.numpy()), jnp.asarray(targets.numpy().astype("int32"))
        state = _jax_state()
        epoch = _jax_epoch(batch_size)

    def turn(seconds: float) -> float:
        nonlocal state
        start, rows = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            state, loss = epoch(state, x, y)
            loss.block_until_ready()
            rows += len(x)
        return rows / (time.perf_counter() - start)

    return turn


def _jax_optimizer() -> Any:
    import optax

    rate = optax.cosine_decay_schedule(workload.LEARNING_RATE, workload.TOTAL_STEPS)
    return optax.chain(optax.clip_by_global_norm(workload.MAX_GRAD_NORM), optax.adamw(rate, weight_decay=0.01))


def _jax_state() -> Any:
    """Parameters, running statistics, the optimizer's state, the key of random numbers."""
    import jax
    import jax.numpy as jnp

    parameters: dict[str, Any] = {"scale": jnp.ones(workload.HIDDEN), "shift": jnp.zeros(workload.HIDDEN)}
    plain = workload.model().layers
    for name, index in (("first", 0), ("second", 4), ("third", 7)):
        parameters[name] = jnp.asarray(plain[index].get_parameter("weight").detach().numpy().T)
        parameters[f"{name} bias"] = jnp.asarray(plain[index].get_parameter("bias").detach().numpy())
    statistics = jnp.zeros(workload.HIDDEN), jnp.ones(workload.HIDDEN)
    return parameters, statistics, _jax_optimizer().init(parameters), jax.random.key(0)


def _jax_loss(parameters: Any, statistics: Any, x: Any, y: Any, key: Any) -> Any:
    """Mean loss of a batch, and the running statistics after it."""
    import jax
    import jax.numpy as jnp
    import optax

    def dropped(values: Any, probability: float, key: Any) -> Any:
        kept = jax.random.bernoulli(key, 1 - probability, values.shape)
        return jnp.where(kept, values / (1 - probability), 0)

    first, second = jax.random.split(key)
    sums = x @ parameters["first"] + parameters["first bias"]
    mean, variance = sums.mean(0), sums.var(0)
    unbiased = variance * len(x) / (len(x) - 1)
    statistics = 0.9 * statistics[0] + 0.1 * mean, 0.9 * statistics[1] + 0.1 * unbiased
    normal = (sums - mean) * jax.lax.rsqrt(variance + 1e-5) * parameters["scale"] + parameters["shift"]
    hidden = dropped(jax.nn.relu(normal), workload.DROPOUT[0], first)
    hidden = jax.nn.relu(hidden @ parameters["second"] + parameters["second bias"])
    hidden = dropped(hidden, workload.DROPOUT[1], second)
    logits = hidden @ parameters["third"] + parameters["third bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), statistics


def _jax_epoch(batch_size: int) -> Any:
    """A jitted function of state and rows: the state after an epoch, and its mean loss."""
    import jax
    import optax

    optimizer = _jax_optimizer()

    @jax.jit
    def epoch(state: Any, x: Any, y: Any) -> Any:
        def step(state: Any, index: Any) -> Any:
            parameters, statistics, moments, key = state
            key, own = jax.random.split(key)
            value = jax.value_and_grad(_jax_loss, has_aux=True)
            (loss, statistics), gradients = value(parameters, statistics, x[index], y[index], own)
            updates, moments = optimizer.update(gradients, moments, parameters)
            return (optax.apply_updates(parameters, updates), statistics, moments, key), loss

        parameters, statistics, moments, key = state
        key, own = jax.random.split(key)
        order = jax.random.permutation(own, len(x)).reshape(-1, batch_size)
        state, losses = jax.lax.scan(step, (parameters, statistics, moments, key), order)
        return state, losses.mean()

    return epoch


def scikit_learn(features: Tensor, targets: Tensor, batch_size: int, device: torch.device) -> Contestant:  # noqa: ARG001
    """scikit-learn's MLPClassifier with the same hidden layers, an epoch a call."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    x, y = features.numpy(), targets.numpy()
    model = MLPClassifier(
        (workload.HIDDEN, workload.HIDDEN // 2), batch_size=batch_size, learning_rate_init=workload.LEARNING_RATE,
        max_iter=1, warm_start=True, random_state=0,
    )  # fmt: skip

    def turn(seconds: float) -> float:
        start, rows = time.perf_counter(), 0
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            while time.perf_counter() - start < seconds:
                model.fit(x, y)
                rows += len(x)
        return rows / (time.perf_counter() - start)

    return turn
