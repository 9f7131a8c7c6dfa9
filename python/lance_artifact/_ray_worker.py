"""What runs on a Ray cluster: a worker, which trains, draws and encodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from . import _lance_artifact as core
from ._log import LOGGER
from ._run import Run
from .backends._vectors import as_matrix
from .exceptions import BackendUnavailableError, InvalidInputError

# Bytes of a sample that go from one worker to another at a time.
PIECE_BYTES = 16 << 20


def imported_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailableError(
            'ray is not installed: pip install "lance-artifact[ray]", in the driver and on every node'
        ) from error
    return ray


class Worker:
    """An actor: opens dataset and model once, when they are first needed, and encodes shard after shard."""

    def __init__(self, run: Run, backend: str, workers_of_node: int, memory_limit: int | None) -> None:
        self._run = run
        self._backend = backend
        self._limit = memory_limit or core.default_memory_limit() // workers_of_node
        self._there: Any = None
        self._model: Any = None
        self._drawn: Any = None

    @property
    def _dataset(self) -> Any:
        # Not when the actor is made: what goes wrong there comes without its cause.
        if self._there is None:
            self._there = self._run.opened()
        return self._there

    def ready(self) -> bool:
        """Whether it can begin, which it says as soon as the cluster has room for it."""
        return self._dataset is not None

    def train(self, model: Any, ivf_centroids: Any, parts: Sequence[tuple[Any, int]] | None = None) -> str:
        """On a sample that is drawn here, or on what this worker has drawn and these others, each with the number of its vectors."""
        found = self._run.train(
            self._dataset,
            model=model,
            ivf_centroids=ivf_centroids,
            backend=self._backend,
            memory_limit=self._limit,
            sample=None if parts is None else self._gathered(parts),
        )
        return found.fingerprint

    def _gathered(self, parts: Sequence[tuple[Any, int]]) -> pa.FixedSizeListArray:
        """The parts in one array, in random order: nothing of them is held twice, but for a piece."""
        ray = imported_ray()
        own, self._drawn = self._drawn, None
        total = (0 if own is None else len(own)) + sum(count for _, count in parts)
        if not total:
            raise InvalidInputError("training: the column has no usable vector")
        source = self._source(self._run.plan.fragment_ids)
        gathered = np.empty((total, source.dimension), source.dtype)
        at = 0
        if own is not None:
            at = len(own)
            gathered[:at] = as_matrix(own)
            del own
        rows = max(1, min(PIECE_BYTES, self._limit // 16) // gathered.strides[0])
        for worker, count in parts:
            for start in range(0, count, rows):
                piece = ray.get(worker.part.remote(start, rows))
                gathered[at : at + len(piece)] = piece
                at += len(piece)
                del piece
        # A backend takes the first ones for its first centroids: not all of one part.
        np.random.default_rng(self._run.plan.seed).shuffle(gathered, axis=0)
        return pa.FixedSizeListArray.from_arrays(pa.array(gathered.reshape(-1)), source.dimension)

    def _source(self, fragments: Sequence[int]) -> core._VectorSource:
        at = self._run.dataset(self._dataset)
        return at.vectors(at.path_of(self._run.plan.field_id, self._run.plan.column), list(fragments))

    def fitting(self) -> tuple[int, int]:
        """Vectors that training wants, and as many as one worker's memory holds."""
        plan = self._run.plan
        _, _, most = self._source(plan.fragment_ids).train_shares(
            plan.num_partitions, plan.num_sub_vectors, plan.num_bits, plan.sample_rate, True, self._limit
        )
        wanted = plan.sample_rate * max(plan.num_partitions, 2**plan.num_bits)
        return min(wanted, plan.num_rows), most

    def sample(self, shards: list[int], rows: int) -> int:
        """Draw a part of the sample, prepared vectors of some shards, for `part` to give. How many there are."""
        plan = self._run.plan
        fragments = [fragment for shard in shards for fragment in plan.shards[shard].fragment_ids]
        # Where all of the sample is hardly enough, nothing of it is left out.
        least = 1 if plan.num_rows >= 2 * max(plan.num_partitions, 2**plan.num_bits) else None
        try:
            self._drawn = self._source(fragments).sample(
                rows, plan.metric, plan.seed, self._limit, least=least
            )
        except InvalidInputError as error:
            # The others may have enough.
            LOGGER.warning("shards %s give no vector to train on: %s", shards, error)
            return 0
        return len(self._drawn)

    def part(self, start: int, rows: int) -> np.ndarray:
        """A piece of what was drawn, which after the last one is held no more."""
        drawn = self._drawn
        if start + rows >= len(drawn):
            self._drawn = None
        return as_matrix(drawn.slice(start, rows))

    def encode(self, shard: int) -> int:
        if self._model is None:
            self._model = self._run.model()
        artifact = self._run.encode(
            shard, self._dataset, model=self._model, backend=self._backend, memory_limit=self._limit
        )
        return artifact.num_rows
