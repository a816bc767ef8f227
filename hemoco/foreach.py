"""Arithmetic on lists of tensors, one launch on a GPU for each operation.

These are private functions of torch that its optimisers use; tests/unit/test_private_apis.py compares them with loops.
"""

from torch import _foreach_add as add
from torch import _foreach_add_ as add_
from torch import _foreach_lerp_ as lerp_
from torch import _foreach_mul_ as mul_
from torch import _foreach_norm as norm

__all__ = ["add", "add_", "lerp_", "mul_", "norm"]
