"""Rewiring: a trained network's channels in another order or basis, so that the important ones come first.

The full network's function stays. Every narrow width, a slice of it, begins nearer to it.
"""

from slicevit.rewiring.apply import How, rewire
from slicevit.rewiring.importance import measure_importance

__all__ = ["How", "measure_importance", "rewire"]
