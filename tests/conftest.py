"""Shapes are law here: rooms 1 and 2 run with their annotations enforced."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)  # two workers share two cores; and one thread is reproducible
_hook = install_import_hook(["nestlearn.memory", "nestlearn.scan"], "beartype.beartype")
