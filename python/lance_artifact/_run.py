"""A run: a build that can be taken up where it stopped, by this process or by others.

A run is a folder: ``plan.json``, the trained model, ``shards/NNNNN/`` (an artifact each), and in the end ``committed.json``. Every file
is put where there is none, and never replaced: whoever does a step that is done already gets what the first one made. So any step may be
repeated, at any time, by any number of processes.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _lance_artifact as core
from ._arguments import Progress, StorageOptions, fixed_size_list
from ._artifacts import absolute, check_apart, published_at
from ._assign import check_assigned
from ._build_artifact import build_artifact
from ._calls import awaited
from ._checked import check, flag, instance, path, whole
from ._commit import AlreadyCommitted
from ._dataset import Handle
from ._lance_artifact import Artifact, IvfPqModel, shown_uri, uri_below
from ._plan import BuildPlan, Shard
from ._process import terminable
from ._renewed import open_dataset
from ._run_commit import build_and_commit, is_committed, write_down
from ._run_files import (
    COMMITTED,
    FORMAT,
    FORMAT_VERSION,
    MODEL,
    PLAN,
    SHARDS,
    RunStatus,
    read_committed,
    read_model,
    read_plan,
    written_model,
)
from ._train import train, train_on
from .backends import Backend, check_resumable, resolve_backend
from .exceptions import (
    ArtifactExistsError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    CommitConflictError,
    CorruptArtifactError,
    IndexExistsError,
    InvalidInputError,
    StorageError,
)

if TYPE_CHECKING:
    import lance

# Shards that are looked at side by side: each is a request.
LOOKS = 16


@dataclass(frozen=True)
class Run:
    """A build in steps that may be repeated: `train`, `encode` for each shard, `finalize`. Picklable, for workers elsewhere.

    Attributes
    ----------
    uri : str
        Its folder, local or in an object store, as it is opened. Messages, ``repr`` and `RunStatus` have it without credentials.
    plan : BuildPlan
    run_id : str
    storage_options : dict or callable, optional
        Of the folder; pickled with it.
    dataset_storage_options : dict or callable, optional
        With which a worker opens the dataset; pickled with it, and not stored. A callable is asked by each, and again when what it
        gave ends (``expires_at_millis``).
    """

    uri: str
    plan: BuildPlan
    run_id: str
    storage_options: StorageOptions | None = dataclasses.field(default=None, repr=False)
    dataset_storage_options: StorageOptions | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def create(
        cls,
        plan: BuildPlan,
        uri: str | Path,
        *,
        storage_options: StorageOptions | None = None,
        dataset_storage_options: StorageOptions | None = None,
    ) -> Run:
        """Make a run of a plan, or take up the one that is there, if its caller asked for the same.

        The run that is there keeps its plan: its version of the dataset, its shards.

        Raises
        ------
        ArtifactMismatchError
            A run of other parameters is there; the message names the differences.
        ArtifactExistsError
            Something else is there.
        """
        plan = instance(BuildPlan, "a BuildPlan")("plan", plan)
        check_resumable(plan.backend)
        uri = check_apart(plan.dataset_uri, path("uri", uri))
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "writer": f"lance-artifact {core.__version__}",
            "run_id": uuid.uuid4().hex,
            "created": time.time(),
            "plan": json.loads(plan.to_json()),
        }
        if core.read_file(uri, PLAN, storage_options) is None:
            others = [
                name for name, *_ in core.list_folder(uri, "", storage_options) if not name.startswith(".")
            ]
            # One that another process has just made is as good.
            if others and PLAN not in others:
                raise ArtifactExistsError(
                    f"{shown_uri(uri)}: holds {sorted(others)[:5]} and no {PLAN}; choose a folder of its own for the run"
                )
            core.put_new(uri, PLAN, json.dumps(content, indent=1).encode(), storage_options)
        run = cls.open(uri, storage_options=storage_options, dataset_storage_options=dataset_storage_options)
        differences = run.plan.differences(plan)
        if differences:
            raise ArtifactMismatchError(
                f"{run._shown}: a run of other parameters is there: {'; '.join(differences)}. Ask for the same, choose another folder, or remove it "
                f"with: lance-artifact run clean {run._shown} --all"
            )
        return run

    @classmethod
    def open(
        cls,
        uri: str | Path,
        *,
        storage_options: StorageOptions | None = None,
        dataset_storage_options: StorageOptions | None = None,
    ) -> Run:
        """The run that is in a folder.

        Raises
        ------
        ArtifactNotFoundError
            There is no run.
        CorruptArtifactError
            Its plan cannot be read, or is of another release.
        """
        uri = absolute(path("uri", uri))
        found = core.read_file(uri, PLAN, storage_options)
        if found is None:
            raise ArtifactNotFoundError(f"{shown_uri(uri)}: no run here: {PLAN} does not exist")
        plan, run_id = read_plan(found, shown_uri(uri))
        return cls(uri, BuildPlan.from_json(plan), run_id, storage_options, dataset_storage_options)

    @property
    def _shown(self) -> str:
        return shown_uri(self.uri)

    def __repr__(self) -> str:
        return f"Run(uri={self._shown!r}, plan={self.plan!r}, run_id={self.run_id!r})"

    def shard_uri(self, shard: int) -> str:
        """Where the artifact of a shard is, or will be."""
        return uri_below(self.uri, f"{SHARDS}/{whole()('shard', shard):05}")

    def dataset(self, dataset: Any = None) -> Handle:
        """The dataset as it was planned, of the caller's handle or opened anew; no other one.

        Raises
        ------
        InvalidInputError
            The version was cleaned up.
        ArtifactMismatchError
            It is another dataset.
        """
        if dataset is None:
            dataset = self.opened()
        handle = Handle.of(dataset)
        if handle.core.branch != self.plan.branch:
            raise ArtifactMismatchError(
                f"{self._shown}: is of branch {self.plan.branch or 'main'}, the handle is on {handle.core.branch or 'main'}"
            )
        at = handle.at(self.plan.version)
        path = at.path_of(self.plan.field_id, self.plan.column)
        found = at.vectors(path, self.plan.fragment_ids).describe()["data_files"]
        if found != self.plan.data_files:
            raise ArtifactMismatchError(
                f"{self._shown}: was planned for {self.plan.dataset_uri}, whose data files at version {self.plan.version} are not those of "
                f"{at.root}; it is another dataset"
            )
        return at

    def opened(self) -> lance.LanceDataset:
        """The dataset as it is now, on its branch.

        Raises
        ------
        InvalidInputError
            It is not there, or cannot be used.
        StorageError
            It, or what a callable asks for its options, cannot be reached.
        """
        try:
            opened = open_dataset(self.plan.dataset_uri, self.dataset_storage_options)
            if self.plan.branch:
                opened = opened.checkout_version((self.plan.branch, None))
        except (ValueError, OSError) as error:
            # Of storage, and of a callable that cannot reach who gives its options, another try may mend it.
            kind = InvalidInputError if isinstance(error, ValueError) else StorageError
            raise kind(
                f"{self._shown}: its dataset {self.plan.dataset_uri} cannot be opened: {error}"
            ) from error
        return opened

    # -- the model

    def model(self) -> IvfPqModel | None:
        """The published model; None before it is."""
        found = core.read_file(self.uri, MODEL, self.storage_options)
        return None if found is None else read_model(found, uri_below(self._shown, MODEL))

    def train(
        self,
        dataset: Any = None,
        *,
        model: IvfPqModel | None = None,
        ivf_centroids: Any = None,
        backend: str | Backend = "auto",
        devices: Sequence[int] | None = None,
        device_memory_limit: int | None = None,
        memory_limit: int | None = None,
        progress: Progress = False,
        sample: Any = None,
    ) -> IvfPqModel:
        """The model of the run, trained and published if nobody has done so: all processes get the same one.

        ``model`` and ``ivf_centroids`` must be passed where the plan was made with them, until it is published. ``sample`` are prepared
        vectors in random order to train on, where others have drawn them; by default they are drawn here.
        """
        model = check("model", model)
        check_resumable(backend)
        found = self.model()
        if found is not None:
            return found
        plan = self.plan
        if plan.model is not None and model is None and ivf_centroids is None:
            raise InvalidInputError(
                f"{self._shown}: was planned with a model or centroids of the caller, which were not published yet; pass them"
            )
        if model is None and ivf_centroids is not None:
            ivf_centroids = plan.centroids(ivf_centroids)
        if model is None and sample is not None:
            sample = fixed_size_list("sample", sample)
            devices, device_memory_limit = (
                check("devices", devices),
                check("device_memory_limit", device_memory_limit),
            )
            chosen = resolve_backend(backend, devices, device_memory_limit)
            model = train_on(sample, chosen, plan.training_params(ivf_centroids), progress).with_training(
                target_partition_size=plan.target_partition_size,
                sample_rate=plan.sample_rate,
                max_iters=plan.max_iters,
            )
        elif model is None:
            at = self.dataset(dataset)
            model = train(
                at.dataset,
                at.path_of(plan.field_id, plan.column),
                metric=plan.metric,
                num_partitions=plan.num_partitions,
                num_sub_vectors=plan.num_sub_vectors,
                num_bits=plan.num_bits,
                sample_rate=plan.sample_rate,
                max_iters=plan.max_iters,
                seed=plan.seed,
                ivf_centroids=ivf_centroids,
                fragment_ids=plan.fragment_ids,
                target_partition_size=plan.target_partition_size,
                backend=backend,
                devices=devices,
                device_memory_limit=device_memory_limit,
                memory_limit=memory_limit,
                progress=progress,
            )
        elif plan.model != model.fingerprint:
            raise ArtifactMismatchError(
                f"{self._shown}: was planned with model {plan.model}, got one of fingerprint {model.fingerprint}"
            )
        if core.put_new(self.uri, MODEL, written_model(model), self.storage_options):
            return model
        # Somebody was first: there is one model.
        published = self.model()
        if published is None:
            raise CorruptArtifactError(f"{self._shown}: {MODEL} was removed while the run went on")
        return published

    # -- shards

    def encode(
        self,
        shard: int,
        dataset: Any = None,
        *,
        model: IvfPqModel | None = None,
        backend: str | Backend = "auto",
        devices: Sequence[int] | None = None,
        device_memory_limit: int | None = None,
        memory_limit: int | None = None,
        progress: Progress = False,
    ) -> Artifact:
        """The artifact of a shard: the one that is published already, or encoded and published now.

        Raises
        ------
        InvalidInputError
            There is no such shard, or no model yet.
        ArtifactMismatchError
            What is in the shard's folder is not this shard of this run.
        """
        wanted = self._shard(whole()("shard", shard))
        check_resumable(backend)
        model = check("model", model) or self.model()
        if model is None:
            raise InvalidInputError(f"{self._shown}: has no model yet; call train() first")
        published = self._published(shard, model)
        if published is not None:
            return published
        at = self.dataset(dataset)
        try:
            return build_artifact(
                at.dataset,
                at.path_of(self.plan.field_id, self.plan.column),
                model,
                self.shard_uri(shard),
                backend=backend,
                devices=devices,
                device_memory_limit=device_memory_limit,
                assign=self.plan.assign,
                fragment_ids=list(wanted.fragment_ids),
                memory_limit=memory_limit,
                storage_options=self.storage_options,
                progress=progress,
            )
        except ArtifactExistsError:
            # Another process was first: its artifact is as good.
            published = self._published(shard, model)
            if published is None:
                raise
            return published

    def _shard(self, shard: int) -> Shard:
        if not 0 <= shard < len(self.plan.shards):
            raise InvalidInputError(f"shard: got {shard}, expected 0 to {len(self.plan.shards) - 1}")
        return self.plan.shards[shard]

    def _published(self, shard: int, model: IvfPqModel) -> Artifact | None:
        """The artifact of a shard, if it is there, which must be of this run."""
        try:
            artifact = Artifact.open(self.shard_uri(shard), self.storage_options)
        except ArtifactNotFoundError:
            return None
        return self._checked(shard, artifact, model)

    def _checked(self, shard: int, artifact: Artifact, model: IvfPqModel) -> Artifact:
        plan, source = self.plan, artifact._source
        if source is None:
            # Of a backend that writes its artifact itself: finalize checks its rows.
            return artifact
        found = (
            source["version"],
            source.get("branch"),
            source.get("field_id"),
            sorted(source["fragment_ids"]),
        )
        expected = (plan.version, plan.branch, plan.field_id, sorted(plan.shards[shard].fragment_ids))
        theirs = artifact.model.fingerprint if artifact.model is not None else None
        if found != expected or theirs != model.fingerprint:
            raise ArtifactMismatchError(
                f"{artifact.uri}: is not shard {shard} of this run: (version, branch, field, fragments) are {found}, expected {expected}, "
                f"and its model is {theirs}, expected {model.fingerprint}"
            )
        if otherwise := check_assigned(artifact, plan.assign):
            raise ArtifactMismatchError(
                f"{artifact.uri}: is not shard {shard} of this run, which was planned otherwise: {otherwise}"
            )
        return artifact

    def artifacts(self, model: IvfPqModel) -> list[Artifact]:
        """The artifacts of all shards.

        Raises
        ------
        ArtifactNotFoundError
            Shards are missing; the message names them.
        """
        missing = [shard for shard, at in enumerate(self._published_at()) if at is None]
        if missing:
            raise ArtifactNotFoundError(
                f"{self._shown}: shards {missing[:10]}{f' and {len(missing) - 10} more' if len(missing) > 10 else ''} of "
                f"{len(self.plan.shards)} are not encoded yet"
            )
        places = [(self.shard_uri(shard), self.storage_options) for shard in range(len(self.plan.shards))]
        return [self._checked(shard, each, model) for shard, each in enumerate(Artifact._open_all(places))]

    # -- the index

    def finalize(
        self,
        dataset: Any = None,
        *,
        sync: bool = False,
        memory_limit: int | None = None,
        progress: Progress = False,
    ) -> lance.LanceDataset:
        """Make the index of all shards and commit it, unless that is done. The handle given, or one that is opened, sees it.

        Raises
        ------
        ArtifactNotFoundError
            Shards are missing; the message names them.
        """
        sync, memory_limit = flag("sync", sync), check("memory_limit", memory_limit)
        return _finalize(
            self, dataset, sync=sync, memory_limit=memory_limit, progress=check("progress", progress)
        )

    def committed(self) -> dict[str, Any] | None:
        """``segment`` and ``version`` of the run's commit, as far as it was written down."""
        found = core.read_file(self.uri, COMMITTED, self.storage_options)
        return None if found is None else read_committed(found, self._shown)

    # -- what is there

    def _published_at(self) -> list[float | None]:
        """When each shard was published, by the store's clock; None where it is not."""

        def look(shard: int) -> float | None:
            return published_at(self.shard_uri(shard), self.storage_options)

        with ThreadPoolExecutor(LOOKS) as pool:
            return list(pool.map(look, range(len(self.plan.shards))))

    def status(self) -> RunStatus:
        """How far it is."""
        top = {name: at for name, _, at in core.list_folder(self.uri, "", self.storage_options)}
        published = self._published_at()
        times = [at for at in published if at is not None]
        done = [at is not None for at in published]
        rows = sum(shard.num_rows for shard, is_done in zip(self.plan.shards, done, strict=True) if is_done)
        took = max(times) - top[MODEL] if times and MODEL in top else 0.0
        return RunStatus(
            self._shown,
            self.plan,
            MODEL in top,
            tuple(done),
            rows,
            self.plan.num_rows - rows,
            rows / took if took > 0 else None,
            self.committed(),
        )


@terminable()
@awaited
def _finalize(
    run: Run, dataset: Any, *, sync: bool, memory_limit: int | None, progress: Progress
) -> lance.LanceDataset:
    at = run.dataset(dataset)
    handle = Handle.of(dataset if dataset is not None else at.dataset, commits=True)
    if is_committed(run, handle):
        handle.refresh()
        return handle.user
    model = run.model()
    if model is None:
        raise ArtifactNotFoundError(f"{shown_uri(run.uri)}: has no model yet; train and encode come first")
    artifacts = run.artifacts(model)
    try:
        segment = build_and_commit(
            run, handle, at, model, artifacts, sync=sync, memory_limit=memory_limit, progress=progress
        )
    except (AlreadyCommitted, IndexExistsError, CommitConflictError):
        # Another process may have been first, and its index is this one.
        if not is_committed(run, handle):
            raise
        handle.refresh()
    else:
        write_down(run, segment, int(handle.latest().version))
    return handle.user
