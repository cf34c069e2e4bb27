"""For all tests."""

from __future__ import annotations

import torch

# As torchrun gives its ranks: a sum over two threads rounds in another order, and threads of several tests fight.
torch.set_num_threads(1)
