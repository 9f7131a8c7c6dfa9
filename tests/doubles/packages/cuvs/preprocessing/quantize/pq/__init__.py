from .pq import Quantizer, QuantizerParams, build

__all__ = ["Quantizer", "QuantizerParams", "build"]
