//! Who acts at the place: writers as the builder drives them, and those who delete an artifact or what others left.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;

use super::requests::Requests;
use super::world::{Actor, Life, ROOT, State, Told, World};
use crate::artifact::format::{FileEntry, Manifest, bucket_path, metadata_path};
use crate::artifact::write::target::delete::delete_at;
use crate::artifact::write::target::unfinished::delete_unfinished_at;
use crate::artifact::write::target::{Abandoned, Target};
use crate::error::{Error, Result};
use crate::io::{FileSink, Uploads};
use crate::lance::LanceStore;

/// Bytes of a part of an upload, and of a bucket file that takes several.
const PART: usize = 16;
const SMALL: usize = 12;
const LARGE: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Writer {
        overwrite: bool,
        /// Given up once its files are open.
        aborts: bool,
        /// How often it calls finish, or abort, again where that may help.
        again: usize,
        /// Its bucket file takes several parts.
        large: bool,
    },
    /// Deletes the artifact that it finds.
    Deleter,
    /// Deletes what attempts left, as `clean` does.
    Sweeper,
}

#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub role: Role,
    pub host: u32,
    /// Attempts of one process live and die together.
    pub process: u32,
}

impl State {
    /// Let somebody in; his number.
    pub fn enter(&mut self, plan: &Plan) -> usize {
        // Who would have been of a process that was killed meanwhile comes with one of its own.
        let is_gone = |process: u32| self.actors.iter().any(|actor| actor.process == process && actor.life == Life::Killed);
        let process = (0..).map(|more| plan.process + 10_000 * more).find(|process| !is_gone(*process)).unwrap_or(plan.process);
        self.actors.push(Actor {
            host: plan.host,
            process,
            life: Life::Running,
            stopped: false,
            told: Told::Nothing,
            overslept: false,
            took_for_abandoned: BTreeSet::new(),
            slept: false,
            failures: 0,
            json: None,
            files: BTreeMap::new(),
            may_replace: None,
            deletes: plan.role == Role::Deleter,
            manifest_read: None,
            was_published: false,
            newest: self.now,
            waker: None,
            plain_claim: None,
        });
        self.actors.len() - 1
    }
}

/// Work of an actor, which the world knows as long as it is polled.
pub struct Acting<F> {
    pub world: Arc<World>,
    pub id: usize,
    pub work: Pin<Box<F>>,
}

impl<F: Future> Future for Acting<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        {
            let mut state = self.world.lock();
            let actor = &mut state.actors[self.id];
            if actor.life == Life::Killed {
                return Poll::Pending;
            }
            actor.waker = Some(cx.waker().clone());
            state.polled = Some(self.id);
            state.activity += 1;
        }
        let polled = self.work.as_mut().poll(cx);
        self.world.lock().polled = None;
        polled
    }
}

pub async fn act(world: Arc<World>, id: usize, role: Role) {
    let requests = Requests { world: world.clone(), by: id };
    let store = LanceStore::standing_in(Arc::new(requests), ROOT);
    match role {
        Role::Writer { overwrite, aborts, again, large } => {
            Writer { world: &world, id, store: &store, again, large }.write(overwrite, aborts).await;
        }
        Role::Deleter => {
            let told = match delete_at(&store).await {
                Ok(()) => Told::Deleted,
                Err(Error::Storage(_)) => Told::Unknown,
                Err(_) => Told::Nothing,
            };
            world.lock().tell(id, told);
        }
        Role::Sweeper => {
            if delete_unfinished_at(&store, false).await.is_err() {
                world.lock().tell(id, Told::Unknown);
            }
        }
    }
    world.lock().actors[id].life = Life::Ended;
}

struct Writer<'a> {
    world: &'a World,
    id: usize,
    store: &'a LanceStore,
    again: usize,
    large: bool,
}

/// What an attempt writes: its manifest, and its files with their content.
struct Artifact {
    json: Bytes,
    names: BTreeSet<String>,
    files: BTreeMap<String, Bytes>,
    entries: BTreeMap<String, FileEntry>,
}

impl Writer<'_> {
    fn tell(&self, told: Told) {
        self.world.lock().tell(self.id, told);
    }

    fn is_stopped(&self) -> bool {
        self.world.lock().actors[self.id].stopped
    }

    /// Files of the same sizes as those of all others, and of its own content.
    fn artifact(&self, tag: Option<&str>) -> Artifact {
        let file = |name: &str, bytes: usize| Bytes::from(format!("{}/{name}|", self.id).repeat(bytes)[..bytes].to_string());
        let (bucket, model) = (bucket_path(0, tag), metadata_path(tag));
        let large = if self.large { LARGE } else { SMALL };
        let files = BTreeMap::from([(bucket.clone(), file("b", large)), (model.clone(), file("m", SMALL))]);
        let entry = |content: &Bytes| FileEntry { num_rows: 1, size_bytes: content.len() as u64, tail_bytes: None, tail_checksum: None };
        let entries: BTreeMap<String, FileEntry> = files.iter().map(|(name, content)| (name.clone(), entry(content))).collect();
        let json = json!({
            "version": 1,
            "num_partitions": 1,
            "partitions": [{"path": bucket, "num_rows": 1, "ranges": [{"offset": 0, "num_rows": 1}]}],
            "metadata_file": model,
            "files": entries,
            "writer": {"name": format!("actor {}", self.id), "version": "0"},
        });
        let json = Bytes::from(json.to_string());
        let names = Manifest::parse(&json).map(|manifest| manifest.names()).unwrap_or_default();
        assert_eq!(names.iter().collect::<Vec<_>>(), files.keys().collect::<Vec<_>>());
        Artifact { json, names, files, entries }
    }

    /// As the builder does: claim, write, close, publish, clean up; or give it up.
    async fn write(&self, overwrite: bool, aborts: bool) {
        let target = match Target::claim(self.store, overwrite, false).await {
            Ok(target) => target,
            Err(error) => return self.tell(if matches!(error, Error::Storage(_)) { Told::Unknown } else { Told::Nothing }),
        };
        let artifact = self.artifact(target.file_tag());
        {
            let mut state = self.world.lock();
            let actor = &mut state.actors[self.id];
            (actor.json, actor.files) = (Some(artifact.json.clone()), artifact.files.clone());
            actor.may_replace = actor.manifest_read.clone();
        }
        let uploads = Uploads::new(PART, 1, Handle::current());
        let mut open = Vec::new();
        let opened = self.unless_stopped(self.open(&target, &artifact, &uploads, &mut open)).await;
        let mut closed = Vec::new();
        let mut is_complete = false;
        if opened.is_ok() && !aborts && self.finish(&target, &artifact, &mut open, &mut closed, &mut is_complete).await {
            self.tell(Told::Published);
            return target.clean_up(&artifact.json, &artifact.names).await;
        }
        drop(open);
        uploads.aborted().await;
        for _ in 0..=self.again {
            match target.abandon(&closed, is_complete.then_some(&artifact.json)).await {
                Ok(Abandoned::Published) => {
                    self.tell(Told::Published);
                    return target.clean_up(&artifact.json, &artifact.names).await;
                }
                Ok(Abandoned::Removed) => return self.tell(Told::Removed),
                Ok(Abandoned::Unknown(_)) | Err(_) => self.tell(Told::Unknown),
            }
        }
    }

    async fn open(&self, target: &Target, artifact: &Artifact, uploads: &Uploads, open: &mut Vec<(String, FileSink)>) -> Result<()> {
        for (name, content) in &artifact.files {
            let mut file = FileSink::create(target.store(), uploads, name, false)?;
            let written = file.write_all(content).await;
            open.push((name.clone(), file));
            written?;
        }
        Ok(())
    }

    /// Call `finish` as often as that may help; whether it has published.
    async fn finish(
        &self,
        target: &Target,
        artifact: &Artifact,
        open: &mut [(String, FileSink)],
        closed: &mut Vec<String>,
        is_complete: &mut bool,
    ) -> bool {
        for _ in 0..=self.again {
            let mut failed_for_good = false;
            let result = async {
                if !*is_complete {
                    target.check(|| self.is_stopped()).await?;
                    // Names first, so that an abort knows every file that may be there.
                    closed.extend(open.iter().map(|(name, _)| name.clone()));
                    let closing = async {
                        for (_, file) in open.iter_mut() {
                            file.finish().await?;
                        }
                        Ok(())
                    };
                    self.unless_stopped(closing).await.inspect_err(|_| failed_for_good = true)?;
                    *is_complete = true;
                }
                target.publish(&artifact.json, &artifact.entries, false, || self.is_stopped()).await
            };
            match result.await {
                Ok(()) => return true,
                Err(Error::Storage(_)) if !failed_for_good => {}
                Err(Error::ArtifactExists(_) | Error::CommitConflict(_)) => {
                    self.tell(Told::Lost);
                    return false;
                }
                Err(_) => return false,
            }
        }
        false
    }

    /// Wait for work no longer than the builder lives.
    async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = Box::pin(work);
        std::future::poll_fn(|cx| {
            if self.is_stopped() {
                return Poll::Ready(Err(Error::Interrupted("the builder was aborted".into())));
            }
            work.as_mut().poll(cx)
        })
        .await
    }
}
