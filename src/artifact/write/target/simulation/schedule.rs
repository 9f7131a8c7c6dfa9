//! Runs of a scenario: again and again one of the moves that are possible is chosen, until everybody has ended or was killed.

use std::sync::Arc;
use std::time::Duration;

use super::actors::{Acting, Plan, Role, act};
use super::world::{Answer, Lie, Life, OfWorld, Pending, Refusal, Request, State, Told, World};
use crate::artifact::write::target::leftovers::ABANDONED_AFTER;
use crate::io::outside::stand_in;

/// Moves after which a run is taken for endless.
const MOST_MOVES: usize = 20_000;
/// Times that nothing happens before it is believed that everybody waits.
const CALM: usize = 3;

/// What may go wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Requests fail, before or after they happen, or are repeated by the client.
    pub answers: bool,
    /// Requests that failed happen later.
    pub late: bool,
    /// Processes are killed.
    pub kills: bool,
    /// Builds are told to stop.
    pub stops: bool,
    /// Eight days pass while everybody waits.
    pub pauses: bool,
}

#[derive(Debug, Clone)]
pub struct Scenario {
    /// Those of a stage act at once; the next one comes when they are done.
    pub stages: Vec<Vec<Plan>>,
    pub faults: Faults,
    pub content_tags: bool,
    pub lie: Lie,
}

/// What a schedule does next; requests by their place among those that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// A request happens and is answered.
    Go(usize),
    /// It does not happen.
    Fail(usize),
    /// It happens, and the answer is lost.
    Lose(usize),
    /// It happens twice, and the second one is answered.
    Repeat(usize),
    /// It fails, and may happen later.
    Delay(usize),
    /// A delayed request happens.
    Land(usize),
    /// A process is killed; its requests happen, never, or later.
    Kill(u32, After),
    /// A build is told to stop.
    Stop(usize),
    Pause,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    Never,
    Happen,
    Later,
}

/// A move, and what it costs: nothing where it goes on as it would without anybody's interference.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    pub what: Move,
    /// Who moves.
    pub by: Option<usize>,
    pub cost: usize,
}

/// Chooses the schedule.
pub trait Choose {
    /// The place of the choice; `acting` is who moved last.
    fn choose(&mut self, state: &State, acting: Option<usize>, choices: &[Choice]) -> usize;
}

/// What came of a run.
pub struct Run {
    /// The rule that was broken.
    pub broken: Option<String>,
    /// Moves, as they may be shown.
    pub trace: Vec<String>,
    pub told: Vec<Told>,
    pub moves: usize,
    /// Artifacts deleted between a look and an unconditional delete.
    pub deleted_unseen: usize,
    /// Somebody acted on others in the moment in which he was taken for abandoned.
    pub is_void: bool,
}

struct Runner<'a> {
    world: Arc<World>,
    scenario: &'a Scenario,
    chooser: &'a mut dyn Choose,
    acting: Option<usize>,
    moves: Vec<(Move, Option<(usize, Request)>)>,
}

/// Run a scenario, then two builds that come when all is over: the second of them a week later, when all processes are gone.
pub fn run(scenario: &Scenario, seed: u64, chooser: &mut dyn Choose) -> Run {
    let world = World::new(seed, scenario.content_tags, scenario.lie);
    stand_in::set(Some(Arc::new(OfWorld(world.clone()))));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut runner = Runner { world: world.clone(), scenario, chooser, acting: None, moves: Vec::new() };
    runtime.block_on(runner.all());
    let moves = runner.moves;
    // What is killed is dropped without a word.
    for actor in &mut world.lock().actors {
        actor.life = Life::Killed;
    }
    runtime.shutdown_background();
    stand_in::set(None);
    let mut state = world.lock();
    state.pending.clear();
    let trace = if state.broken.is_some() { moves.iter().map(shown).collect() } else { Vec::new() };
    let told = state.actors.iter().map(|actor| actor.told).collect();
    Run { broken: state.broken.take(), trace, told, moves: moves.len(), deleted_unseen: state.deleted_unseen, is_void: state.is_void }
}

fn shown((what, request): &(Move, Option<(usize, Request)>)) -> String {
    let kind = match what {
        Move::Go(_) => "",
        Move::Fail(_) => "  [fails]",
        Move::Lose(_) => "  [answer lost]",
        Move::Repeat(_) => "  [happens twice]",
        Move::Delay(_) => "  [fails, may happen later]",
        Move::Land(_) => "  [happens late]",
        Move::Kill(process, after) => return format!("-- process {process} is killed, its requests: {after:?}"),
        Move::Stop(actor) => return format!("-- actor {actor} is told to stop"),
        Move::Pause => return "-- eight days pass".into(),
    };
    let Some((by, request)) = request else { return kind.into() };
    let text = match request {
        Request::Put(path, content, condition) => {
            format!("put {path} ({condition:?}) {:?}", String::from_utf8_lossy(&content[..content.len().min(40)]))
        }
        other => format!("{other:?}"),
    };
    format!("{by}: {text}{kind}")
}

impl Runner<'_> {
    async fn all(&mut self) {
        for stage in &self.scenario.stages {
            self.stage(stage, self.scenario.faults).await;
            self.acting = None;
        }
        if self.is_decided() {
            return;
        }
        // A process of its own, on the first machine, that sees who is gone.
        let last = Plan { role: Role::Writer { overwrite: true, aborts: false, again: 0, large: false }, host: 0, process: 1_000_000 };
        self.last(&last, false).await;
        {
            let mut state = self.world.lock();
            for actor in &mut state.actors {
                actor.life = Life::Killed;
            }
            state.now += ABANDONED_AFTER + Duration::from_secs(60);
        }
        if !self.is_decided() {
            self.last(&Plan { process: 1_000_001, ..last }, true).await;
        }
    }

    async fn last(&mut self, plan: &Plan, long_after: bool) {
        self.stage(&[*plan], Faults::default()).await;
        if self.is_decided() {
            return;
        }
        let mut state = self.world.lock();
        let last = state.actors.len() - 1;
        if state.actors[last].told != Told::Published {
            let what = format!("a build that came when all was over was not published: {:?}", state.actors[last].told);
            state.breaks(what);
        }
        state.check_left(last, long_after);
    }

    fn is_decided(&self) -> bool {
        let state = self.world.lock();
        state.broken.is_some() || state.is_void
    }

    async fn stage(&mut self, plans: &[Plan], faults: Faults) {
        let mut tasks = Vec::new();
        let first = self.world.lock().actors.len();
        for plan in plans {
            let id = self.world.lock().enter(plan);
            let work = Box::pin(act(self.world.clone(), id, plan.role));
            tasks.push(tokio::spawn(Acting { world: self.world.clone(), id, work }));
        }
        let mut moves = 0;
        loop {
            self.settle().await;
            if self.is_decided() {
                return;
            }
            let choices = choices(&self.world.lock(), first, self.acting, faults);
            if choices.is_empty() {
                break;
            }
            moves += 1;
            if moves > MOST_MOVES {
                return self.world.lock().breaks("it does not end".into());
            }
            let chosen = self.chooser.choose(&self.world.lock(), self.acting, &choices);
            self.make(choices[chosen]);
        }
        for (task, id) in tasks.into_iter().zip(first..) {
            let life = self.world.lock().actors[id].life;
            if task.is_finished() && life == Life::Running {
                let panic = task.await.err().map(|error| error.to_string());
                self.world.lock().breaks(format!("actor {id} ended with {panic:?}"));
            } else if life == Life::Running {
                self.world.lock().breaks(format!("actor {id} waits for nothing"));
            }
        }
    }

    /// Let everybody go on until they all wait.
    async fn settle(&self) {
        let (mut calm, mut before) = (0, self.world.lock().activity);
        while calm < CALM {
            tokio::task::yield_now().await;
            let now = self.world.lock().activity;
            calm = if now == before { calm + 1 } else { 0 };
            before = now;
        }
    }

    fn make(&mut self, choice: Choice) {
        let mut state = self.world.lock();
        state.activity += 1;
        let mut made = None;
        match choice.what {
            Move::Go(at) | Move::Fail(at) | Move::Lose(at) | Move::Repeat(at) | Move::Delay(at) => {
                let Pending { by, request, reply } = state.pending.remove(at);
                let answer = match choice.what {
                    Move::Fail(_) => Err(Refusal::Broken),
                    Move::Delay(_) => {
                        state.late.push((by, request.clone()));
                        Err(Refusal::Broken)
                    }
                    Move::Lose(_) => {
                        let _: Result<Answer, Refusal> = state.happen(by, &request);
                        Err(Refusal::Broken)
                    }
                    Move::Repeat(_) => {
                        let _: Result<Answer, Refusal> = state.happen(by, &request);
                        state.happen(by, &request)
                    }
                    _ => state.happen(by, &request),
                };
                state.actors[by].failures += usize::from(!matches!(choice.what, Move::Go(_)));
                state.heard(by, &request, &answer);
                let _ = reply.send(answer);
                self.acting = Some(by);
                made = Some((by, request));
            }
            Move::Land(at) => {
                let (by, request) = state.late.remove(at);
                let _: Result<Answer, Refusal> = state.happen(by, &request);
                made = Some((by, request));
            }
            Move::Kill(process, after) => {
                let is_gone = |state: &State, by: usize| state.actors[by].process == process;
                for actor in state.actors.iter_mut().filter(|actor| actor.process == process && actor.life == Life::Running) {
                    actor.life = Life::Killed;
                }
                let pending = std::mem::take(&mut state.pending);
                let (gone, others): (Vec<_>, Vec<_>) = pending.into_iter().partition(|pending| is_gone(&state, pending.by));
                state.pending = others;
                for Pending { by, request, .. } in gone.into_iter().filter(|pending| pending.request.changes()) {
                    match after {
                        After::Never => {}
                        After::Happen => {
                            let _: Result<Answer, Refusal> = state.happen(by, &request);
                        }
                        After::Later => state.late.push((by, request)),
                    }
                }
                self.acting = None;
            }
            Move::Stop(id) => {
                state.actors[id].stopped = true;
                if let Some(waker) = state.actors[id].waker.take() {
                    waker.wake();
                }
            }
            Move::Pause => state.now += ABANDONED_AFTER + Duration::from_secs(24 * 3600),
        }
        self.moves.push((choice.what, made));
    }
}

/// What may happen next; first what would without interference: whoever acts goes on until he ends or sleeps.
fn choices(state: &State, first: usize, acting: Option<usize>, faults: Faults) -> Vec<Choice> {
    let mut choices = Vec::new();
    // The first request of each actor that is awake, then of those that sleep.
    let mut waiting: Vec<(usize, &Pending)> = Vec::new();
    for (at, pending) in state.pending.iter().enumerate() {
        if !waiting.iter().any(|(_, other)| other.by == pending.by) {
            waiting.push((at, pending));
        }
    }
    waiting.sort_by_key(|(at, pending)| (matches!(pending.request, Request::Sleep), Some(pending.by) != acting, *at));
    let awake = waiting.iter().filter(|(_, pending)| !matches!(pending.request, Request::Sleep)).count();
    let goes_on = waiting.first().is_some_and(|(_, pending)| Some(pending.by) == acting && !matches!(pending.request, Request::Sleep));
    let private = goes_on && waiting[0].1.request.is_private();
    for (place, (at, pending)) in waiting.iter().enumerate() {
        let interferes = if goes_on || awake == 0 { place > 0 } else { place >= awake };
        if interferes && private {
            break;
        }
        let (by, cost) = (Some(pending.by), usize::from(interferes));
        choices.push(Choice { what: Move::Go(*at), by, cost });
        if matches!(pending.request, Request::Sleep) {
            continue;
        }
        let mut fault = |what| choices.push(Choice { what, by, cost: cost + 1 });
        if faults.answers {
            fault(Move::Fail(*at));
            if pending.request.changes() {
                fault(Move::Lose(*at));
            }
            if pending.request.differs_twice() {
                fault(Move::Repeat(*at));
            }
        }
        if faults.late && pending.request.changes() {
            fault(Move::Delay(*at));
        }
        if faults.kills && place == 0 {
            let process = state.actors[pending.by].process;
            fault(Move::Kill(process, After::Never));
            if pending.request.changes() {
                fault(Move::Kill(process, After::Happen));
                if faults.late {
                    fault(Move::Kill(process, After::Later));
                }
            }
        }
        if faults.stops && place == 0 && !state.actors[pending.by].stopped {
            fault(Move::Stop(pending.by));
        }
        if faults.pauses && place == 0 {
            fault(Move::Pause);
        }
    }
    let is_over = !state.actors[first..].iter().any(|actor| actor.life == Life::Running);
    for (at, (by, _)) in state.late.iter().enumerate() {
        // At the latest when all others have ended.
        choices.push(Choice { what: Move::Land(at), by: Some(*by), cost: usize::from(!is_over) });
    }
    choices
}
