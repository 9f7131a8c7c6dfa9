"""`resume_run`: what is left of a run, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import IndexParams, Progress, StorageOptions
from ._calls import awaited
from ._cancel import shielded
from ._checked import checked
from ._clean import discard_run
from ._dataset import Handle
from ._lance_artifact import IvfPqModel
from ._plan import BuildPlan, planned_build
from ._process import terminable
from ._run import Run
from ._run_commit import check_uncommitted, is_committed
from ._run_files import is_run
from ._wanted import Wanted, check_latest
from .backends import Backend, check_resumable

if TYPE_CHECKING:
    import lance


@terminable()
@awaited
@checked
def resume_run(
    uri: str | Path,
    dataset: Any = None,
    *,
    backend: str | Backend = "auto",
    devices: Sequence[int] | None = None,
    device_memory_limit: int | None = None,
    model: IvfPqModel | None = None,
    ivf_centroids: Any = None,
    memory_limit: int | None = None,
    storage_options: StorageOptions | None = None,
    dataset_storage_options: StorageOptions | None = None,
    sync: bool = False,
    progress: Progress = False,
) -> lance.LanceDataset:
    """Do what is left of a run: train, encode the shards that nobody has published, finalize, commit.

    Parameters
    ----------
    uri : str or path
        Of the run; see `create_index` with ``resume=True``, and `Run`.
    dataset : lance.LanceDataset, LanceDB table, or path, optional
        Its handle sees the index afterwards. Default: the planned one is opened, with dataset_storage_options.
    backend, devices, device_memory_limit, memory_limit, sync, progress
        As in `create_index`. They may differ from try to try.
    model, ivf_centroids
        Where the run was planned with them and has published no model yet.

    Raises
    ------
    ArtifactNotFoundError
        There is no run.
    See also `create_index`.
    """
    run = Run.open(uri, storage_options=storage_options, dataset_storage_options=dataset_storage_options)
    return do_all(
        run,
        dataset,
        model=model,
        ivf_centroids=ivf_centroids,
        backend=backend,
        devices=devices,
        device_memory_limit=device_memory_limit,
        memory_limit=memory_limit,
        sync=sync,
        progress=progress,
    )


def do_all(
    run: Run,
    dataset: Any,
    *,
    model: IvfPqModel | None,
    ivf_centroids: Any,
    backend: str | Backend,
    devices: Sequence[int] | None,
    device_memory_limit: int | None,
    memory_limit: int | None,
    sync: bool,
    progress: Progress,
) -> lance.LanceDataset:
    """All steps of a run in this process; those that are done cost a look."""
    if dataset is None:
        dataset = run.opened()
    handle = Handle.of(dataset, commits=True)
    if is_committed(run, handle):
        handle.refresh()
        return handle.user
    check_uncommitted(run, handle, model)
    work: dict[str, Any] = {
        "backend": backend,
        "devices": devices,
        "device_memory_limit": device_memory_limit,
        "memory_limit": memory_limit,
        "progress": progress,
    }
    trained = run.train(dataset, model=model, ivf_centroids=ivf_centroids, **work)
    for shard in range(len(run.plan.shards)):
        run.encode(shard, dataset, model=trained, **work)
    return run.finalize(dataset, sync=sync, memory_limit=memory_limit, progress=progress)


def check_memory(at: Handle, planned: BuildPlan, memory_limit: int | None) -> None:
    """A limit in which no shard can be encoded is refused before there is a run, and before hours of training.

    Raises
    ------
    InvalidInputError
        It says what would do.
    """
    if memory_limit is not None:
        source = at.vectors(at.path_of(planned.field_id, planned.column), planned.fragment_ids)
        source.encode_shares(planned.num_partitions, planned.num_bits, memory_limit)


def create_by_run(
    handle: Handle,
    wanted: Wanted,
    uri: str,
    storage_options: Any,
    asked: IndexParams,
    *,
    name: str | None,
    fragment_ids: list[int] | None,
    num_shards: int | None,
    model: IvfPqModel | None,
    ivf_centroids: Any,
    backend: Backend,
    keep: bool,
    sync: bool,
    memory_limit: int | None,
    progress: Progress,
) -> lance.LanceDataset:
    """`create_index` by a run: a new one, or the one that is there."""
    check_resumable(backend)
    planned = planned_build(
        handle,
        wanted.path,
        asked,
        name=name,
        mode=wanted.mode,
        fragment_ids=fragment_ids,
        model=model,
        ivf_centroids=ivf_centroids,
        backend=backend,
        num_shards=num_shards,
    )
    if not is_run(uri, storage_options):
        check_latest(handle, handle, wanted, planned.fragment_ids, trains=model is None)
    check_memory(handle, planned, memory_limit)
    run = Run.create(planned, uri, storage_options=storage_options)
    do_all(
        run,
        handle.dataset,
        model=model,
        ivf_centroids=ivf_centroids,
        backend=backend,
        devices=None,
        device_memory_limit=None,
        memory_limit=memory_limit,
        sync=sync,
        progress=progress,
    )
    handle.refresh()
    if not keep:
        with shielded():
            discard_run(run, handle.dataset)
    return handle.user
