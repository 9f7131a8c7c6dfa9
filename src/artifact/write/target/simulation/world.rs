//! The world of a simulation: a store's objects, the requests that wait, and what is known of each actor.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use xxhash_rust::xxh3::xxh3_64;

use crate::artifact::format::{CLAIM_FILE, MANIFEST_FILE, Ours, ours};
use crate::io::outside::stand_in::Outside;
use crate::sync::locked;

/// The root of the place in its store.
pub const ROOT: &str = "place";

#[derive(Debug, Clone)]
pub struct Object {
    pub content: Bytes,
    /// Its entity tag.
    pub version: String,
    pub modified: Duration,
    /// Who wrote it.
    pub by: usize,
}

#[derive(Debug, Clone)]
pub enum Condition {
    Always,
    Absent,
    Version(String),
}

/// What is asked of the store, or of the clock.
#[derive(Debug, Clone)]
pub enum Request {
    Get(String),
    Head(String),
    List(String),
    Put(String, Bytes, Condition),
    Begin(String),
    Part(u64, usize, Bytes),
    Complete(u64, String),
    Abort(u64),
    Delete(String),
    Sleep,
}

impl Request {
    /// Whether it is more than a look.
    pub fn changes(&self) -> bool {
        !matches!(self, Self::Get(_) | Self::Head(_) | Self::List(_) | Self::Sleep)
    }

    /// Whether the answer is another one where it happens twice, as with a client that tries again by itself.
    pub fn differs_twice(&self) -> bool {
        matches!(self, Self::Put(_, _, Condition::Absent | Condition::Version(_)) | Self::Complete(..))
    }

    /// Whether nobody else can tell when it happens.
    pub fn is_private(&self) -> bool {
        match self {
            Self::Head(path) => path.is_empty(),
            Self::Begin(_) | Self::Part(..) | Self::Abort(_) => true,
            _ => false,
        }
    }
}

#[derive(Debug)]
pub enum Answer {
    Found(Object),
    Listed(Vec<(String, Object)>),
    Written(String),
    Begun(u64),
    Done,
}

/// Why a store does not do what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    NotFound,
    Exists,
    Precondition,
    /// No answer, or a bad one.
    Broken,
}

/// A request that waits to happen.
pub struct Pending {
    pub by: usize,
    pub request: Request,
    pub reply: oneshot::Sender<Result<Answer, Refusal>>,
}

/// How an actor was answered by the code that it ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Nothing,
    Published,
    /// Another artifact is there, or this one's files were changed; nothing was published.
    Lost,
    /// It was given up, and what it wrote is removed.
    Removed,
    /// It is not known what became of it.
    Unknown,
    /// An artifact is deleted.
    Deleted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    Running,
    Ended,
    Killed,
}

/// What is known of an actor, to judge what it and others do.
pub struct Actor {
    pub host: u32,
    pub process: u32,
    pub life: Life,
    /// It was told to stop, as by Ctrl-C.
    pub stopped: bool,
    pub told: Told,
    /// It was taken for abandoned, as it may be after a week, and has not looked since whether what it has is still its own. What
    /// it was about to do at that moment no store can keep it from.
    pub overslept: bool,
    /// What was there when it last looked, of those of whom it had heard nothing for a week: paths, and when they were written.
    pub took_for_abandoned: BTreeSet<(String, Duration)>,
    /// The last that it asked for was a pause.
    pub slept: bool,
    /// Requests that failed, or whose answers were lost.
    pub failures: usize,
    pub json: Option<Bytes>,
    pub files: BTreeMap<String, Bytes>,
    /// The manifest that it may replace or delete; none: there was none.
    pub may_replace: Option<Bytes>,
    /// It deletes the artifact that it reads first.
    pub deletes: bool,
    /// The manifest as it read it last.
    pub manifest_read: Option<Bytes>,
    /// Its manifest was there at some moment.
    pub was_published: bool,
    /// Of what it wrote last.
    pub newest: Duration,
    pub waker: Option<Waker>,
    /// The claim on plain names that it put.
    pub plain_claim: Option<Bytes>,
}

/// How the world lies, to see that the rules notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    None,
    /// As if manifests were put without a condition.
    ManifestsAlwaysFit,
    /// As if leftovers were deleted without asking who lives.
    OthersLookGone,
    /// As if nobody asked whether a claim is still his.
    OwnClaimLooksHeld,
    /// As if claims were not put on condition that there is none.
    ClaimsAlwaysFit,
    /// As if files were not looked for before the manifest is put.
    FilesLookThere,
}

pub struct State {
    pub objects: BTreeMap<String, Object>,
    /// Parts of each open upload, and where it leads.
    pub uploads: BTreeMap<u64, (String, BTreeMap<usize, Bytes>, usize)>,
    pub now: Duration,
    pub actors: Vec<Actor>,
    pub pending: Vec<Pending>,
    /// Requests whose clients were told that they failed, and which may still happen.
    pub late: Vec<(usize, Request)>,
    /// The first rule that was broken.
    pub broken: Option<String>,
    pub polled: Option<usize>,
    /// Moves with whatever happens.
    pub activity: u64,
    pub lie: Lie,
    /// Entity tags are of the content, as with some stores, and not of the write.
    pub content_tags: bool,
    /// Somebody who overslept did something to others: what follows is not judged.
    pub is_void: bool,
    /// Manifests that were deleted between a look and an unconditional delete.
    pub deleted_unseen: usize,
    numbers: u64,
    seed: u64,
}

pub struct World {
    state: Mutex<State>,
}

impl World {
    pub fn new(seed: u64, content_tags: bool, lie: Lie) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                objects: BTreeMap::new(),
                uploads: BTreeMap::new(),
                now: Duration::from_secs(1_700_000_000),
                actors: Vec::new(),
                pending: Vec::new(),
                late: Vec::new(),
                broken: None,
                polled: None,
                activity: 0,
                lie,
                content_tags,
                is_void: false,
                deleted_unseen: 0,
                numbers: 0,
                seed,
            }),
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Ask, and wait until a schedule lets it happen.
    pub fn ask(&self, by: usize, request: Request) -> impl Future<Output = Result<Answer, Refusal>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        let mut state = self.lock();
        state.activity += 1;
        state.actors[by].slept = matches!(request, Request::Sleep);
        state.pending.push(Pending { by, request, reply });
        answer.map(|answer| answer.unwrap_or(Err(Refusal::Broken)))
    }
}

impl State {
    /// Whether this one certainly has a clock, a process table and a boot in common with that one.
    pub fn same_host(&self, one: usize, other: usize) -> bool {
        self.actors[one].host == self.actors[other].host
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// A request happens.
    pub fn happen(&mut self, by: usize, request: &Request) -> Result<Answer, Refusal> {
        self.now += Duration::from_millis(10);
        match request {
            Request::Get(path) => {
                if self.lie == Lie::OwnClaimLooksHeld
                    && path == CLAIM_FILE
                    && let Some(content) = self.actors[by].plain_claim.clone()
                {
                    return Ok(Answer::Found(Object { content, version: String::new(), modified: self.now, by }));
                }
                self.objects.get(path).cloned().map(Answer::Found).ok_or(Refusal::NotFound)
            }
            Request::Head(path) => {
                if self.lie == Lie::FilesLookThere
                    && let Some(content) = self.actors[by].files.get(path).cloned()
                {
                    return Ok(Answer::Found(Object { content, version: String::new(), modified: self.now, by }));
                }
                self.objects.get(path).cloned().map(Answer::Found).ok_or(Refusal::NotFound)
            }
            Request::List(folder) => {
                self.before_list(by, folder);
                let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
                let below = |path: &&String| path.starts_with(&prefix);
                let found = self.objects.iter().filter(|(path, _)| below(path));
                Ok(Answer::Listed(found.map(|(path, object)| (path.clone(), object.clone())).collect()))
            }
            Request::Put(path, content, condition) => {
                let there = self.objects.get(path);
                let holds = match condition {
                    Condition::Always => true,
                    Condition::Absent => there.is_none(),
                    Condition::Version(version) => there.is_some_and(|object| object.version == *version),
                };
                let lies = match self.lie {
                    Lie::ManifestsAlwaysFit => path == MANIFEST_FILE,
                    // The attempt's own second put finds that it is there: so far this lie is not noticed.
                    Lie::ClaimsAlwaysFit => path == CLAIM_FILE && there.is_none_or(|object| object.by != by),
                    _ => false,
                };
                if !holds && !lies {
                    return Err(if matches!(condition, Condition::Absent) { Refusal::Exists } else { Refusal::Precondition });
                }
                if path == CLAIM_FILE {
                    self.actors[by].plain_claim = Some(content.clone());
                }
                Ok(Answer::Written(self.write(by, path, content.clone())))
            }
            Request::Begin(path) => {
                let upload = self.number();
                self.uploads.insert(upload, (path.clone(), BTreeMap::new(), by));
                Ok(Answer::Begun(upload))
            }
            Request::Part(upload, number, content) => {
                let (_, parts, _) = self.uploads.get_mut(upload).ok_or(Refusal::NotFound)?;
                parts.insert(*number, content.clone());
                Ok(Answer::Done)
            }
            Request::Complete(upload, path) => {
                let (_, parts, _) = self.uploads.remove(upload).ok_or(Refusal::NotFound)?;
                let content: Vec<u8> = parts.into_values().flatten().collect();
                Ok(Answer::Written(self.write(by, path, content.into())))
            }
            Request::Abort(upload) => self.uploads.remove(upload).map(|_| Answer::Done).ok_or(Refusal::NotFound),
            Request::Delete(path) => {
                if let Some(object) = self.objects.get(path).cloned() {
                    self.before_delete(by, path, &object);
                    self.objects.remove(path);
                    self.after_change();
                }
                Ok(Answer::Done)
            }
            Request::Sleep => {
                self.now += Duration::from_millis(50);
                Ok(Answer::Done)
            }
        }
    }

    fn write(&mut self, by: usize, path: &str, content: Bytes) -> String {
        self.before_write(by, path, &content);
        let number = if self.content_tags { xxh3_64(&content) } else { self.number() };
        let (version, modified) = (format!("\"{number:x}\""), self.now);
        self.actors[by].newest = modified;
        self.objects.insert(path.to_string(), Object { content, version: version.clone(), modified, by });
        self.after_change();
        version
    }

    /// An actor has heard what a request of its own found.
    pub fn heard(&mut self, by: usize, request: &Request, answer: &Result<Answer, Refusal>) {
        let has_plain = self.actors[by].files.keys().any(|name| ours(name) == Some(Ours::Data(None)));
        match request {
            Request::Get(path) if path == CLAIM_FILE => self.actors[by].overslept = false,
            // Its files, where it can know by no claim.
            Request::List(_) if !has_plain => self.actors[by].overslept = false,
            _ => {}
        }
        if !matches!(request, Request::Get(path) if path == MANIFEST_FILE) {
            return;
        }
        match answer {
            Ok(Answer::Found(object)) => {
                let actor = &mut self.actors[by];
                actor.manifest_read = Some(object.content.clone());
                if actor.deletes && actor.may_replace.is_none() {
                    actor.may_replace = Some(object.content.clone());
                }
            }
            Err(Refusal::NotFound) => self.actors[by].manifest_read = None,
            _ => {}
        }
    }
}

/// What the attempts of a world see of everything but the store.
pub struct OfWorld(pub Arc<World>);

impl Outside for OfWorld {
    fn now(&self) -> SystemTime {
        UNIX_EPOCH + self.0.lock().now
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        let by = self.0.lock().polled.unwrap_or(0);
        // Steps of one pause, of which nobody knows how many there are, count as one.
        if std::mem::replace(&mut self.0.lock().actors[by].slept, true) {
            return futures::future::ready(()).boxed();
        }
        self.0.ask(by, Request::Sleep).map(|_| ()).boxed()
    }

    fn unique(&self) -> String {
        let mut state = self.0.lock();
        let number = state.number() ^ state.seed;
        // Drawn, so that they are not in the order of the attempts.
        format!("{:016x}", xxh3_64(&number.to_le_bytes()))
    }

    fn host(&self) -> String {
        let state = self.0.lock();
        state.polled.map_or_else(String::new, |by| format!("host {}", state.actors[by].host))
    }

    fn process(&self) -> u32 {
        let state = self.0.lock();
        state.polled.map_or(0, |by| state.actors[by].process)
    }

    fn started(&self, pid: u32) -> Option<String> {
        let state = self.0.lock();
        let this = state.polled.map(|by| state.actors[by].process);
        if state.lie == Lie::OthersLookGone && this != Some(pid) {
            return None;
        }
        // A process without any attempt that was killed goes on after they ended.
        let gone = state.actors.iter().any(|actor| actor.process == pid && actor.life == Life::Killed);
        (!gone).then(|| "1".to_string())
    }
}
