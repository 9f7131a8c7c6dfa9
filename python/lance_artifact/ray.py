"""The same build on a Ray cluster: a thin driver over a `Run`. Needs ``pip install "lance-artifact[ray]"``.

The driver plans, one worker trains, every worker takes the next shard when it is free, the driver makes the index. All of it goes by
the run's folder, so a job that is killed anywhere goes on with the same call, on the same cluster or on none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _lance_artifact as core
from ._arguments import Progress, StorageOptions, check_asked, given_model, metric_name
from ._artifacts import check_place
from ._assign import check_assign
from ._cancel import LOOK, poll, wait
from ._checked import checked
from ._clean import discard_run
from ._dataset import Handle, vector_column
from ._extend import Extension
from ._index import CommittedIndex, model_of
from ._lance_artifact import shown_uri
from ._log import LOGGER
from ._plan import plan
from ._progress import reporter
from ._ray_nodes import check_room, most_on_a_node, spread
from ._ray_options import of_run, opened
from ._ray_worker import Worker, imported_ray
from ._resume import check_memory
from ._run import Run
from ._run_commit import check_uncommitted, is_committed
from ._run_files import is_run
from .backends import check_resumable
from .exceptions import (
    DeviceError,
    InvalidInputError,
    LanceArtifactError,
    StorageError,
)

if TYPE_CHECKING:
    import lance

# How often a shard is tried whose worker died, or whose store or device failed.
TRIES = 3

# Seconds before something is tried again.
PAUSE = 1.0


@checked
def create_index(
    uri: lance.LanceDataset | str | Path,
    column: str,
    index_type: str = "IVF_PQ",
    name: str | None = None,
    *,
    artifact_uri: str | Path,
    replace: bool = True,
    num_workers: int = 4,
    storage_options: StorageOptions | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    metric: str = "l2",
    num_partitions: int | None = None,
    num_sub_vectors: int | None = None,
    num_bits: int | None = None,
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    target_partition_size: int | None = None,
    m: int = 20,
    ef_construction: int = 150,
    ivf_centroids: Any = None,
    pq_codebook: Any = None,
    fragment_ids: Any = None,
    backend: str | None = None,
    assign: str = "exact",
    num_shards: int | None = None,
    artifact_storage_options: StorageOptions | None = None,
    memory_limit: int | None = None,
    resume: bool = True,
    keep_artifact: bool = True,
    progress: Progress = False,
) -> lance.LanceDataset:
    """Build an index on a Ray cluster.

    Parameters
    ----------
    uri : lance.LanceDataset, LanceDB table, or path
        Workers open it by its URI and ``storage_options``, at the version of the handle.
    column, index_type, name, replace, metric, num_partitions, num_sub_vectors, ivf_centroids, pq_codebook
        As in lance-ray's ``create_index``; a caller's model is used as it is.
    artifact_uri : str or path
        Folder of the run, which driver and workers reach: an object store, or a shared disk.
    num_workers : int, default 4
        Actors; never more than there are shards.
    ray_remote_args : mapping, optional
        Of the actors, such as ``{"num_gpus": 1}``. More than the cluster, or any machine of it, has is refused at once. They are spread
        over the machines, unless it says where they go, or the caller runs in a placement group: then they go there.
    num_bits, sample_rate, max_iters, seed, target_partition_size, m, ef_construction, fragment_ids
        As in `lance_artifact.create_index`.
    backend : str, optional
        Default "cuvs" where ``ray_remote_args`` asks for GPUs, else "cpu".
    assign : {"exact", "fast"}, default "exact"
        As in `lance_artifact.build_artifact`.
    num_shards : int, optional
        As in `plan`.
    storage_options : dict or callable, optional
        With which driver and workers open the dataset. Default: those of the handle. A callable is sent to the workers, each of which asks
        it, and again when what it gave ends (``expires_at_millis``); so is the namespace of a handle that has one.
    artifact_storage_options : dict or callable, optional
        Of the run's folder. Default: those of the dataset where the run is in the same store (scheme and bucket), else none.
    memory_limit : int, optional
        Bytes that each worker, and the driver, may hold. Default: half of what their machine has free, shared by as many workers as one
        machine gets.
    resume : bool, default True
        False: a run that is there is an error.
    keep_artifact : bool, default True
        False: the run's folder is removed when the index is committed. Where a worker on another machine was killed, its claim
        keeps the folder, with a warning: ``clean_run(..., everything=True, elsewhere=True)`` removes it, and after seven days it goes
        without ``elsewhere``.
    progress : bool or callable, default False
        Called in the driver.

    Returns
    -------
    lance.LanceDataset
        The handle given, or one that is opened, which sees the index.

    Raises
    ------
    InvalidInputError
        The cluster has too few GPUs or CPUs for the workers.
    The worker's own error where a shard fails three times, or for good. Everything that was published stays for the next try.
    """
    ray = imported_ray()
    handle, of_dataset = opened(ray, uri, storage_options)
    place = check_place(handle, artifact_uri)
    remote = dict(ray_remote_args or {})
    chosen = backend or ("cuvs" if remote.get("num_gpus") else "cpu")
    check_assign(assign, chosen)
    check_resumable(chosen)
    options = of_run(ray, handle, place, artifact_storage_options, of_dataset)
    model = None
    if pq_codebook is not None:
        if ivf_centroids is None:
            raise InvalidInputError("ivf_centroids must be specified when pq_codebook is provided")
        model = given_model(
            ivf_centroids,
            pq_codebook,
            metric_name(metric),
            num_sub_vectors,
            handle.vectors(vector_column(handle, column)[0]).dtype,
        )
        check_asked(model, num_partitions, num_sub_vectors, num_bits)
    if not resume and is_run(place, options):
        raise InvalidInputError(
            f"resume: got False, and a run is at {shown_uri(place)}; choose another artifact_uri"
        )
    _start(ray, remote, num_workers)
    planned = plan(
        handle.dataset,
        column,
        index_type,
        name,
        metric,
        replace,
        num_partitions,
        num_sub_vectors,
        num_bits=num_bits,
        sample_rate=sample_rate,
        max_iters=max_iters,
        seed=seed,
        fragment_ids=fragment_ids,
        target_partition_size=target_partition_size,
        m=m,
        ef_construction=ef_construction,
        model=model,
        ivf_centroids=None if model is not None else ivf_centroids,
        # Whether it can run is for the workers to say.
        backend="cpu",
        assign=assign,
        num_shards=num_shards,
        calibrate=False,
        artifact_uri=place,
        storage_options=options,
    )
    check_memory(handle, planned, memory_limit)
    run = Run.create(planned, place, storage_options=options, dataset_storage_options=of_dataset)
    if not is_committed(run, handle):
        check_uncommitted(run, handle, model)
        _work(
            ray,
            run,
            chosen,
            remote,
            num_workers,
            memory_limit,
            model,
            None if model else ivf_centroids,
            progress,
        )
    run.finalize(handle.dataset, memory_limit=memory_limit, progress=progress)
    handle.refresh()
    if not keep_artifact:
        discard_run(run, handle.dataset)
    return handle.user


@checked
def extend_index(
    uri: lance.LanceDataset | str | Path,
    name: str,
    *,
    artifact_uri: str | Path,
    num_workers: int = 4,
    storage_options: StorageOptions | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    backend: str | None = None,
    assign: str = "exact",
    num_shards: int | None = None,
    artifact_storage_options: StorageOptions | None = None,
    memory_limit: int | None = None,
    keep_artifact: bool = True,
    progress: Progress = False,
) -> Extension:
    """Index what an index does not cover yet, as `lance_artifact.extend_index` does, on a Ray cluster.

    Parameters are those of `create_index`. Killed, it goes on with the same call; the run's folder is of one extension. With
    ``keep_artifact=False`` the claim of a worker that was killed on another machine keeps the folder, with a warning, as there.
    """
    ray = imported_ray()
    handle, of_dataset = opened(ray, uri, storage_options)
    place = check_place(handle, artifact_uri)
    options = of_run(ray, handle, place, artifact_storage_options, of_dataset)
    remote = dict(ray_remote_args or {})
    chosen = backend or ("cuvs" if remote.get("num_gpus") else "cpu")
    check_assign(assign, chosen)
    check_resumable(chosen)
    at = handle.at(int(handle.latest().version))
    index = CommittedIndex.of(at, name)
    model = model_of(at, index)
    if is_run(place, options):
        run = Run.open(place, storage_options=options, dataset_storage_options=of_dataset)
        if (run.plan.name, run.plan.mode, run.plan.model) != (name, "append", model.fingerprint):
            raise InvalidInputError(
                f"artifact_uri: {shown_uri(place)} is a run of {run.plan.name!r}, mode {run.plan.mode}; choose another"
            )
    else:
        covered = index.covered()
        new = [i for i in at.fragment_ids() if i not in covered]
        if not new or at.count_rows(new) == 0:
            handle.refresh()
            return Extension(name, None, (), 0, {}, len(index.segments), None)
        planned = plan(
            at.dataset,
            index.path,
            index.index_type,
            name,
            model.metric,
            mode="append",
            m=index.m,
            ef_construction=index.ef_construction,
            max_level=index.max_level,
            fragment_ids=new,
            model=model,
            backend="cpu",
            assign=assign,
            num_shards=num_shards,
            calibrate=False,
        )
        check_memory(at, planned, memory_limit)
        run = Run.create(planned, place, storage_options=options, dataset_storage_options=of_dataset)
    if not is_committed(run, handle):
        check_uncommitted(run, handle, model)
        _start(ray, remote, num_workers)
        _work(ray, run, chosen, remote, num_workers, memory_limit, model, None, progress)
    run.finalize(handle.dataset, memory_limit=memory_limit, progress=progress)
    handle.refresh()
    now = CommittedIndex.of(Handle.of(handle.user), name)
    segment = (run.committed() or {}).get("segment")
    # Made again after it was dropped, it is another one than was written down.
    found = core.segments_with(Handle.of(handle.user).core, name, run.run_id)
    if found and segment not in found:
        segment = found[0]
    artifacts = run.artifacts(model)
    covered = now.covered()
    left = [i for i in Handle.of(handle.user).fragment_ids() if i not in covered]
    if left:
        LOGGER.warning(
            "%d fragments came after the run at %s was planned; extend again, by another run",
            len(left),
            shown_uri(run.uri),
        )
    dropped: dict[str, int] = {}
    for artifact in artifacts:
        for reason, rows in artifact.manifest.get("rows", {}).get("dropped", {}).items():
            dropped[reason] = dropped.get(reason, 0) + rows
    rows = sum(artifact.num_rows for artifact in artifacts)
    done = Extension(name, segment, tuple(run.plan.fragment_ids), rows, dropped, len(now.segments), None)
    if not keep_artifact:
        discard_run(run, handle.dataset)
    return done


def _start(ray: Any, remote: Mapping[str, Any], num_workers: int) -> None:
    """Connect, and refuse at once what would wait for ever."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    check_room(ray.cluster_resources(), ray.nodes(), remote, num_workers)


def _work(
    ray: Any,
    run: Run,
    backend: str,
    remote: dict[str, Any],
    num_workers: int,
    memory_limit: int | None,
    model: Any,
    ivf_centroids: Any,
    progress: Progress,
) -> None:
    """Train, and encode every shard that is not published, on actors that live as long as this call."""
    status = run.status()
    left = deque(shard for shard, done in enumerate(status.shards) if not done)
    num_workers = max(1, min(num_workers, len(left)))
    in_group = ray.util.get_current_placement_group() is not None
    on_node = most_on_a_node(ray.nodes(), remote, num_workers, in_group)
    where = spread(remote, in_group)
    actor = ray.remote(Worker)
    report = reporter(progress)
    workers: list[Any] = []

    def start() -> Any:
        worker = actor.options(**{"max_restarts": 0, **where, **remote}).remote(
            run, backend, on_node, memory_limit
        )
        workers.append(worker)
        return worker

    try:
        if not status.is_trained:
            _train(ray, run, start, workers, num_workers, model, ivf_centroids)
        if report:
            report("start", "shuffle", status.rows_done, run.plan.num_rows, "rows")
        while len(workers) < num_workers:
            start()
        _encode(ray, run, start, list(workers), left, status.rows_done, report)
        if report:
            report("complete", "shuffle", run.plan.num_rows, run.plan.num_rows, "rows")
    finally:
        for worker in workers:
            ray.kill(worker)


def _train(
    ray: Any, run: Run, start: Any, workers: list[Any], num_workers: int, model: Any, ivf_centroids: Any
) -> None:
    """On one worker, which draws the sample as a single process would; on one that all have drawn, where it is more than one holds."""
    for left in reversed(range(TRIES)):
        while len(workers) < 1:
            start()
        try:
            parts = None
            if model is None and ivf_centroids is None:
                parts = _sample(ray, run, start, workers, num_workers)
            _awaited(ray, workers[0].train.remote(model, ivf_centroids, parts))
            return
        except Exception as error:
            for worker in workers:
                ray.kill(worker)
            workers.clear()
            _judge(ray, error, "training", left)


def _awaited(ray: Any, task: Any) -> Any:
    """What a task gives. Waiting for it can be cancelled."""
    while not ray.wait([task], timeout=LOOK)[0]:
        poll()
    return ray.get(task)


def _sample(
    ray: Any, run: Run, start: Any, workers: list[Any], num_workers: int
) -> list[tuple[Any, int]] | None:
    """Let all workers draw parts of a sample that is as large as one holds, for the first to gather.

    The others, and how many vectors each has; None where one worker holds all that is wanted, or hardly what a model needs.
    """
    wanted, most = _awaited(ray, workers[0].fitting.remote())
    needed = max(run.plan.num_partitions, 2**run.plan.num_bits)
    # What a worker leaves out of its part, of outliers up to a thousandth, may not be missed in the sum.
    if wanted <= most or most < needed * 1.01 + num_workers or num_workers < 2:
        return None
    LOGGER.warning("training on %d vectors instead of %d: more do not fit a worker's memory", most, wanted)
    while len(workers) < num_workers:
        start()
    shards: list[list[int]] = [[] for _ in workers]
    for shard in range(len(run.plan.shards)):
        shards[shard % len(workers)].append(shard)
    tasks = []
    for worker, mine in zip(workers, shards, strict=True):
        share = sum(run.plan.shards[shard].num_rows for shard in mine) / run.plan.num_rows
        tasks.append(worker.sample.remote(mine, max(1, math.ceil(most * share))) if mine else None)
    counts = [0 if task is None else int(_awaited(ray, task)) for task in tasks]
    return [(worker, count) for worker, count in list(zip(workers, counts, strict=True))[1:] if count]


def _encode(
    ray: Any, run: Run, start: Any, workers: list[Any], left: deque[int], rows_done: int, report: Any
) -> None:
    """A worker gets a shard when it is there: for one for which the cluster has no room nobody waits while others work."""
    tries = [0] * len(run.plan.shards)
    busy: dict[Any, tuple[Any, int]] = {}
    starting = {worker.ready.remote(): worker for worker in workers}
    idle: list[Any] = []
    failed = 0

    def another() -> None:
        worker = start()
        starting[worker.ready.remote()] = worker

    while left or busy:
        while left and idle:
            worker, shard = idle.pop(), left.popleft()
            tries[shard] += 1
            busy[worker.encode.remote(shard)] = (worker, shard)
        done, _ = ray.wait([*busy, *starting], num_returns=1, timeout=LOOK)
        poll()
        for task in done:
            if task in starting:
                worker = starting.pop(task)
                try:
                    ray.get(task)
                except Exception as error:
                    failed += 1
                    _judge(ray, error, "the start of a worker", TRIES - failed)
                    ray.kill(worker)
                    another()
                    continue
                # Those that a job of days loses now and then are no reason to end it.
                failed = 0
                idle.append(worker)
                continue
            worker, shard = busy.pop(task)
            try:
                ray.get(task)
            except Exception as error:
                _judge(ray, error, f"shard {shard}", TRIES - tries[shard])
                left.append(shard)
                # One that died is no more, and one whose device failed needs a new process.
                ray.kill(worker)
                another()
                continue
            idle.append(worker)
            rows_done += run.plan.shards[shard].num_rows
            if report:
                report("progress", "shuffle", rows_done, run.plan.num_rows, "rows")


def _judge(ray: Any, error: Exception, what: str, tries_left: int) -> None:
    """Raise what no other try would mend; log the rest."""
    cause = getattr(error, "cause", None)
    own = cause if isinstance(cause, LanceArtifactError) else None
    # A node that runs out of memory ends one of its workers, and says so by an error of its own.
    died = isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)) and own is None
    again = died or isinstance(own, (StorageError, DeviceError))
    if again and tries_left > 0:
        LOGGER.warning("%s failed and is tried again: %s", what, own or error)
        wait(PAUSE)
        return
    if own is not None:
        raise own from error
    if died:
        raise StorageError(
            f"{what}: its worker died {TRIES} times (out of memory, or the node is gone); what is published stays. Ray says: {error}"
        ) from error
    raise error
