"""A double of cuVS for machines without a GPU: the same signatures, dtypes, shapes and array protocols, over numpy.

Held to the published wheel by tests/test_doubles.py. Device memory is what the double of the driver allocates.
"""

__version__ = "double"
