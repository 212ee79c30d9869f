"""geomloss on these kernels: `from flashcoreset.compat.geomloss import SamplesLoss` in the place of `from geomloss import SamplesLoss`;
`flashcoreset.compat.geomloss.ot` for `geomloss.ot`. docs/drop_in.md says what differs.

Example:
    >>> import torch
    >>> from flashcoreset.compat.geomloss import SamplesLoss
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> round(float(SamplesLoss("sinkhorn", p=2, blur=0.05)(x, x + 2)), 3)
    2.0
"""

from __future__ import annotations

from flashcoreset.compat.geomloss import ot
from flashcoreset.compat.geomloss.samples_loss import SamplesLoss

__all__ = ["SamplesLoss", "ot"]
