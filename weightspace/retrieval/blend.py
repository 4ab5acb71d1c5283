"""Measures of likeness as one: geometric means of the distances by encoder, descriptor and function.

The encoder sees through rescaling, sign flips and noise; the descriptor sees the scales, which children of one parent
still share; the function sees what is computed, and nothing else. A product needs no common unit, so no measure has to
be calibrated to another, and where one of them knows a copy (its distance is 0) the others are not asked. Where one is
no help since all lie alike far away (a query that was rescaled, for the descriptor), it is a constant factor and
the others decide the order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARE = 0.5
"""Exponent of the descriptor's distance where it is blended with the encoder's; that one's is 1 - SHARE."""

OF_FUNCTION = 0.7
"""Exponent of the function's distance where it is known too; the others have the rest."""


def blended(learned: NDArray[Any], plain: NDArray[Any], share: float = SHARE) -> NDArray[np.float64]:
    """Distances by the encoder and by the descriptor, of one shape, as one: ``learned^(1 - share) plain^share``."""
    found = np.power(learned, 1 - share, dtype=np.float64) * np.power(plain, share, dtype=np.float64)
    return np.asarray(found, dtype=np.float64)


def with_function(computed: NDArray[Any], others: NDArray[Any], share: float = OF_FUNCTION) -> NDArray[np.float64]:
    """Distances by function and those by other measures as one: ``computed^share others^(1 - share)``."""
    found = np.power(computed, share, dtype=np.float64) * np.power(others, 1 - share, dtype=np.float64)
    return np.asarray(found, dtype=np.float64)
