//! Who chooses a schedule: a die, a search through all with few interferences, or a list of steps.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::schedule::{Choice, Choose, Move};
use super::world::{Life, Request, State};

/// A die: who acts mostly goes on, and now and then something goes wrong.
pub struct Seeded {
    die: SmallRng,
    goes_on: f64,
    fails: f64,
    faults: usize,
}

impl Seeded {
    pub fn new(seed: u64, faults: usize) -> Self {
        let mut die = SmallRng::seed_from_u64(seed);
        let goes_on = [0.0, 0.5, 0.8, 0.95][die.random_range(0..4)];
        let fails = [0.0, 0.01, 0.05, 0.2][die.random_range(0..4)];
        Self { die, goes_on, fails, faults }
    }
}

impl Choose for Seeded {
    fn choose(&mut self, _: &State, acting: Option<usize>, choices: &[Choice]) -> usize {
        let (calm, wild): (Vec<usize>, Vec<usize>) =
            (0..choices.len()).partition(|at| matches!(choices[*at].what, Move::Go(_) | Move::Land(_)));
        if self.faults > 0 && !wild.is_empty() && self.die.random_bool(self.fails) {
            self.faults -= 1;
            return wild[self.die.random_range(0..wild.len())];
        }
        if choices[0].by == acting && self.die.random_bool(self.goes_on) {
            return 0;
        }
        calm[self.die.random_range(0..calm.len())]
    }
}

/// Every schedule with at most so many interferences, one after the other.
pub struct Exhaustive {
    most: usize,
    /// Of each moment where there was a choice: what was chosen, of how many that could be afforded, and what is left to spend after it.
    path: Vec<(usize, usize)>,
    at: usize,
    spent: usize,
    pub runs: usize,
}

impl Exhaustive {
    pub fn new(most: usize) -> Self {
        Self { most, path: Vec::new(), at: 0, spent: 0, runs: 0 }
    }

    /// Get ready for the next schedule; false where there is none.
    pub fn again(&mut self) -> bool {
        if self.runs > 0 {
            while let Some((chosen, of)) = self.path.pop() {
                if chosen + 1 < of {
                    self.path.push((chosen + 1, of));
                    break;
                }
            }
            if self.path.is_empty() {
                return false;
            }
        }
        self.runs += 1;
        (self.at, self.spent) = (0, 0);
        true
    }
}

impl Choose for Exhaustive {
    fn choose(&mut self, _: &State, _: Option<usize>, choices: &[Choice]) -> usize {
        let affordable: Vec<usize> = (0..choices.len()).filter(|at| self.spent + choices[*at].cost <= self.most).collect();
        let chosen = match self.path.get(self.at) {
            Some((chosen, of)) => {
                assert_eq!(*of, affordable.len(), "a schedule cannot be repeated");
                *chosen
            }
            None => {
                self.path.push((0, affordable.len()));
                0
            }
        };
        self.at += 1;
        self.spent += choices[affordable[chosen]].cost;
        affordable[chosen]
    }
}

/// One step of a schedule that is written down.
pub enum Step {
    /// Let an actor go on until it is about to do this.
    Until(usize, fn(&Request) -> bool),
    /// Let an actor go on until the world is so.
    UntilWorld(usize, fn(&State) -> bool),
    /// Let an actor go on until it has ended.
    End(usize),
    /// Something becomes of what an actor is about to do.
    Make(usize, fn(usize) -> Move),
    /// Eight days pass.
    Pause,
}

/// A schedule that is written down; what follows goes on without interference.
pub struct Script {
    steps: std::vec::IntoIter<Step>,
    step: Option<Step>,
}

impl Script {
    pub fn new(steps: Vec<Step>) -> Self {
        let mut steps = steps.into_iter();
        let step = steps.next();
        Self { steps, step }
    }

    pub fn is_over(&self) -> bool {
        self.step.is_none()
    }
}

impl Choose for Script {
    fn choose(&mut self, state: &State, _: Option<usize>, choices: &[Choice]) -> usize {
        let go = |actor: usize| {
            choices.iter().enumerate().find_map(|(at, choice)| match choice.what {
                Move::Go(pending) if choice.by == Some(actor) => Some((at, pending)),
                _ => None,
            })
        };
        // Behind a request of another that nobody can tell the moment of.
        let waits = |actor: usize| state.pending.iter().any(|pending| pending.by == actor);
        loop {
            match &self.step {
                Some(Step::Until(actor, is)) => match go(*actor) {
                    Some((at, pending)) if !is(&state.pending[pending].request) => return at,
                    Some(_) => {}
                    None if waits(*actor) => return 0,
                    None => panic!("actor {actor} does not come to it"),
                },
                Some(Step::UntilWorld(_, is)) if is(state) => {}
                Some(Step::UntilWorld(actor, _)) => match go(*actor) {
                    Some((at, _)) => return at,
                    None if waits(*actor) => return 0,
                    None => panic!("actor {actor} does not come to it"),
                },
                Some(Step::End(actor)) => match go(*actor) {
                    Some((at, _)) => return at,
                    None if waits(*actor) => return 0,
                    None => assert_ne!(state.actors[*actor].life, Life::Running, "actor {actor} does not end"),
                },
                Some(Step::Make(actor, what)) => {
                    let (_, pending) = go(*actor).unwrap_or_else(|| panic!("actor {actor} waits for nothing"));
                    let what = what(pending);
                    self.step = self.steps.next();
                    return choices.iter().position(|choice| choice.what == what).unwrap_or_else(|| panic!("{what:?} is not possible"));
                }
                Some(Step::Pause) => {
                    self.step = self.steps.next();
                    return choices.iter().position(|choice| choice.what == Move::Pause).unwrap_or_else(|| panic!("no time can pass"));
                }
                None => return 0,
            }
            self.step = self.steps.next();
        }
    }
}
