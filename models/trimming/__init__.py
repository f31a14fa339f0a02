"""Token and head trimming of whole models: adding trimmers, and what a trimmed pass costs.

The trimmers themselves are in `models.trimmers`; `XVLM.set_trimming` says how they run. See
docs/trimming.md.
"""

from models.trimming.convert import default_trimming, with_trimming, without_trimming
from models.trimming.cost import Costs, dense_macs, expected_macs
from models.trimming.see import see

__all__ = [
    "Costs",
    "default_trimming",
    "dense_macs",
    "expected_macs",
    "see",
    "with_trimming",
    "without_trimming",
]
