"""How far two pictures are apart."""

from typing import Any

import numpy as np


def difference(one: Any, other: Any) -> int:
    """The largest difference between two pictures, in 255ths."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())
