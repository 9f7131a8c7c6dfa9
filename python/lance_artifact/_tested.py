"""The releases with which this package is tested: the one table, of which the check at import, the documentation and the tests speak.

`scripts/matrix` runs `tests/matrix.py` with each; pyproject.toml declares the same range. Nothing is imported here.
"""

COMPILED = "14.0.2"
"""The release of Lance whose crates the extension is compiled from (Cargo.toml)."""

PYLANCE = ("10.0.0", "11.0.0", "12.0.0", "13.0.0", "14.0.0", "14.0.2")
"""Releases of pylance with which everything in `tests/matrix.py` passes; with the last one, all tests."""

LANCEDB = ("0.33.0", "0.34.0", "0.36.0", "0.37.1", "0.38.0", "0.39.0", "0.40.0")
"""Releases of LanceDB with which it passes too, beside the last release of pylance."""

OLDER = ("1.0.4", "2.0.1", "3.0.2", "4.0.2", "6.1.0", "7.1.0", "8.0.1", "9.0.1")
"""The last release of each series of pylance of the year before, with which the import is refused. Some of them read our indexes
(docs/versions.md)."""

LANCEDB_OLDEST = "0.33.0"
"""Where LanceDB can work: from this one."""

OLDEST, BELOW = "10.0.0", "15"
"""Where it can work: pylance from ``OLDEST`` to before ``BELOW``."""
