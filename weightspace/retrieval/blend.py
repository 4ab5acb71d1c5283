"""Two measures of likeness as one: the geometric mean of the pretrained encoder's distance and the descriptor's.

The encoder sees through rescaling, sign flips and noise; the descriptor sees the scales, which children of one parent
still share. A product needs no common unit, so neither measure has to be calibrated to the other, and where one
of them knows a copy (its distance is 0) the other is not asked. Where one is no help since all lie alike far away
(a query that was rescaled, for the descriptor), it is a constant factor and the other decides the order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARE = 0.5
"""Exponent of the descriptor's distance; the encoder's is 1 - SHARE."""


def blended(learned: NDArray[Any], plain: NDArray[Any], share: float = SHARE) -> NDArray[np.float64]:
    """Distances by the encoder and by the descriptor, of one shape, as one: ``learned^(1 - share) plain^share``."""
    found = np.power(learned, 1 - share, dtype=np.float64) * np.power(plain, share, dtype=np.float64)
    return np.asarray(found, dtype=np.float64)
