"""Arithmetic on lists of tensors with one kernel launch per operation on a GPU.

These are private functions of torch, the ones its optimisers use.
tests/unit/test_private_apis.py compares each with a plain loop and fails when a new torch
changes it.
"""

from torch import _foreach_add as add
from torch import _foreach_add_ as add_
from torch import _foreach_lerp_ as lerp_
from torch import _foreach_mul_ as mul_
from torch import _foreach_norm as norm

__all__ = ["add", "add_", "lerp_", "mul_", "norm"]
