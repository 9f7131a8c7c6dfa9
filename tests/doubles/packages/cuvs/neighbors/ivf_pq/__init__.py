from .ivf_pq import Index, IndexParams, build, build_precomputed, transform

__all__ = ["Index", "IndexParams", "build", "build_precomputed", "transform"]
