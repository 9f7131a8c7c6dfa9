from cuvs import _c

from . import ivf_pq
from .ivf_pq import Index, IndexParams, build, build_precomputed, transform

__all__ = ["Index", "IndexParams", "build", "build_precomputed", "transform"]

# Kept as long as the module: C calls them.
_FUNCTIONS = _c.register(ivf_pq)
