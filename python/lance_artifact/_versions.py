"""Which pylance, and which LanceDB, this package works with.

The extension is compiled from the Rust crates of one release of Lance. Its index format, and the few functions of pylance that
are used here, are known to agree only for releases that were tested together (`_tested.py`).
"""

from __future__ import annotations

import re
import sys
import warnings

import lance

from ._tested import BELOW, COMPILED, LANCEDB, LANCEDB_OLDEST, OLDEST, PYLANCE
from .exceptions import UnsupportedVersionError, UntestedVersionWarning


def _parts(version: str) -> tuple[tuple[int, ...], bool]:
    """The numbers of a version, and whether it is before that release (alpha, beta, candidate, development)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)(.*)", version.strip())
    if match is None:
        return (), False
    numbers = [int(n) for n in match[1].split(".")]
    early = re.match(r"[-._]?(a|b|c|rc|alpha|beta|pre|preview|dev)", match[2], re.IGNORECASE) is not None
    return (*numbers, 0, 0)[: max(3, len(numbers))], early


def check_pylance(version: str) -> None:
    """Nothing for a tested release, a warning for an untested one of the same series, an error for any other.

    Raises
    ------
    UnsupportedVersionError
        With this release an index could be wrong, or the import would fail later and say less.
    """
    if version in PYLANCE:
        return
    numbers, early = _parts(version)
    oldest, below = _parts(OLDEST)[0], _parts(BELOW)[0]
    # 15.0.0b1 is no 14 any more, and 14.0.2b1 not yet 14.0.2.
    if not oldest <= numbers < below or (early and numbers == oldest):
        raise UnsupportedVersionError(
            f"lance_artifact needs pylance >={OLDEST},<{BELOW}, and pylance {version or '(without a version)'} is installed: "
            f"its extension is compiled from Lance {COMPILED}, and the index format and functions of other releases may differ; "
            f'pip install "pylance=={PYLANCE[-1]}", or install a release of lance-artifact for this one'
        )
    warnings.warn(
        f"lance_artifact was not tested with pylance {version}, but with {', '.join(PYLANCE)}; indexes should be right, and if "
        f'anything is strange, pip install "pylance=={PYLANCE[-1]}" and build again. To silence this: '
        'warnings.filterwarnings("ignore", message="lance_artifact was not tested")',
        UntestedVersionWarning,
        stacklevel=2,
    )


def lancedb_version() -> str:
    """Of the LanceDB that is imported."""
    return str(getattr(sys.modules.get("lancedb"), "__version__", ""))


def check_lancedb(version: str) -> None:
    """Where a table of it is to be used: LanceDB itself is imported all the same, for whoever uses it otherwise.

    Raises
    ------
    UnsupportedVersionError
        Its tables may not do what is needed of them.
    """
    if version in LANCEDB:
        return
    numbers, early = _parts(version)
    oldest = _parts(LANCEDB_OLDEST)[0]
    if numbers < oldest or (early and numbers == oldest):
        raise UnsupportedVersionError(
            f"lance_artifact needs LanceDB >={LANCEDB_OLDEST}, and LanceDB {version or '(without a version)'} is installed: the tables of older "
            f'releases differ; pip install "lancedb=={LANCEDB[-1]}", or open the dataset of the table with lance.dataset(uri)'
        )


def warn_of_lancedb(version: str) -> None:
    """Where both are imported: nothing for a tested release and one that is refused, a warning for any other."""
    try:
        check_lancedb(version)
    except UnsupportedVersionError:
        return
    if version not in LANCEDB:
        warnings.warn(
            f"lance_artifact was not tested with LanceDB {version}, but with {', '.join(LANCEDB)}; indexes should be right, and if anything is "
            f'strange, pip install "lancedb=={LANCEDB[-1]}". To silence this: '
            'warnings.filterwarnings("ignore", message="lance_artifact was not tested")',
            UntestedVersionWarning,
            stacklevel=2,
        )


# At import of this module, which the package imports first.
check_pylance(str(lance.__version__))
