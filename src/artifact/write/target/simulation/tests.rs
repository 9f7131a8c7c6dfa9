//! The promises, for every schedule that is tried; that the rules notice what breaks them; and schedules that once did.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::actors::{Plan, Role};
use super::choosers::Step::{End, Make, Until, UntilWorld};
use super::choosers::{Exhaustive, Script, Seeded, Step};
use super::schedule::{After, Faults, Move, Run, Scenario, run};
use super::world::{Lie, Request, State, Told};
use crate::artifact::format::{CLAIM_FILE, MANIFEST_FILE};

const DELETER: Role = Role::Deleter;
const FRESH: Role = Role::Writer { overwrite: false, aborts: false, again: 0, large: false };
const OVER: Role = Role::Writer { overwrite: true, aborts: false, again: 0, large: false };
const ABORTS: Role = Role::Writer { overwrite: true, aborts: true, again: 0, large: false };

/// A number of the environment, for the long form: see `docs/reliability.md`.
fn wanted(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: got {text:?}, expected a number")))
}

/// Roles of processes of their own, on the first machine.
fn stage(roles: &[Role]) -> Vec<Plan> {
    roles.iter().map(|role| Plan { role: *role, host: 0, process: 0 }).collect()
}

fn scenario(stages: &[&[Role]]) -> Scenario {
    let mut stages: Vec<Vec<Plan>> = stages.iter().map(|roles| stage(roles)).collect();
    for (plan, process) in stages.iter_mut().flatten().zip(100..) {
        plan.process = process;
    }
    Scenario { stages, faults: Faults::default(), content_tags: false, lie: Lie::None }
}

fn checked(run: Run, what: &str) -> Run {
    if let Some(broken) = &run.broken {
        panic!("{broken}\n{what}\nwhat happened:\n  {}", run.trace.join("\n  "));
    }
    run
}

/// Every schedule of a scenario with at most so many interferences; how many there are.
fn all(scenario: &Scenario, interferences: usize) -> usize {
    let mut chooser = Exhaustive::new(interferences);
    while chooser.again() {
        let run = checked(run(scenario, 0, &mut chooser), &format!("schedule {} of {scenario:?}", chooser.runs));
        if scenario.faults == Faults::default() {
            let writers = scenario.stages.iter().flatten().zip(&run.told).filter(|(plan, _)| matches!(plan.role, Role::Writer { .. }));
            assert!(writers.clone().all(|(_, told)| *told != Told::Unknown), "{:?}", run.told);
            assert!(writers.clone().any(|(_, told)| *told == Told::Published), "{:?}", run.told);
        }
    }
    chooser.runs
}

/// A scenario of a seed.
fn drawn(seed: u64, late: bool) -> Scenario {
    let mut die = SmallRng::seed_from_u64(seed ^ 0x5ced_u64);
    let writer = |die: &mut SmallRng| Role::Writer {
        overwrite: die.random_bool(0.6),
        aborts: die.random_bool(0.15),
        again: die.random_range(0..3),
        large: die.random_bool(0.3),
    };
    let mut stages = Vec::new();
    for at in 0..die.random_range(1..4) {
        let (writers, deleters, sweepers) = match at {
            0 => (1, 0, 0),
            _ => (die.random_range(1..4), [0, 0, 1, 2][die.random_range(0..4)], usize::from(die.random_bool(0.2))),
        };
        let mut roles: Vec<Role> = (0..writers).map(|_| writer(&mut die)).collect();
        roles.extend(std::iter::repeat_n(Role::Deleter, deleters));
        roles.extend(std::iter::repeat_n(Role::Sweeper, sweepers));
        stages.push(stage(&roles));
    }
    let elsewhere = [0.0, 0.3][die.random_range(0..2)];
    let mut process = 100;
    for plan in stages.iter_mut().flatten() {
        plan.host = u32::from(die.random_bool(elsewhere));
        // A number is another process on another machine: one for each host here.
        process += u32::from(die.random_bool(0.85)) * 2;
        plan.process = process + plan.host;
    }
    let faults = Faults {
        answers: die.random_bool(0.6),
        late,
        kills: die.random_bool(0.5),
        stops: die.random_bool(0.3),
        pauses: die.random_bool(0.2),
    };
    Scenario { stages, faults, content_tags: die.random_bool(0.5), lie: Lie::None }
}

fn of_seed(seed: u64, late: bool) -> Run {
    run(&drawn(seed, late), seed, &mut Seeded::new(seed, (seed % 5) as usize))
}

/// Seeds of a range, on all cores; moves, and what was told.
fn seeds(first: u64, count: u64) {
    let (next, told) = (AtomicU64::new(first), [const { AtomicUsize::new(0) }; 6]);
    let [moves, unseen, void] = [const { AtomicUsize::new(0) }; 3];
    let start = Instant::now();
    crate::sync::fan_out(std::thread::available_parallelism().map_or(1, usize::from), "schedules", || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return;
            }
            let run = checked(of_seed(seed, false), &format!("LANCE_ARTIFACT_SEED={seed} of {:?}", drawn(seed, false)));
            moves.fetch_add(run.moves, Ordering::Relaxed);
            unseen.fetch_add(run.deleted_unseen, Ordering::Relaxed);
            void.fetch_add(usize::from(run.is_void), Ordering::Relaxed);
            for one in run.told {
                told[one as usize].fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let kinds = [Told::Nothing, Told::Published, Told::Lost, Told::Removed, Told::Unknown, Told::Deleted];
    let told: Vec<String> = kinds.iter().zip(&told).map(|(kind, count)| format!("{kind:?} {}", count.load(Ordering::Relaxed))).collect();
    println!(
        "{count} schedules, {} requests, in {:.0} s; told: {}; deleted unseen: {}; void: {}",
        moves.into_inner(),
        start.elapsed().as_secs_f64(),
        told.join(", "),
        unseen.into_inner(),
        void.into_inner()
    );
}

#[test]
fn schedules_of_seeds() {
    match (wanted("LANCE_ARTIFACT_SEED"), wanted("LANCE_ARTIFACT_SCHEDULES")) {
        (Some(seed), None) => seeds(seed, 1),
        (seed, count) => seeds(seed.unwrap_or(0), count.unwrap_or(300)),
    }
}

#[test]
fn a_seed_is_a_schedule() {
    for seed in 0..20 {
        let (one, other) = (of_seed(seed, false), of_seed(seed, false));
        assert_eq!((one.moves, one.told), (other.moves, other.told), "seed {seed}");
    }
}

#[test]
fn every_schedule_of_few_with_few_interferences() {
    let most = wanted("LANCE_ARTIFACT_INTERFERENCES").map_or(1, |most| most as usize);
    let faulty = Faults { answers: true, kills: true, stops: true, ..Faults::default() };
    let two: [&[&[Role]]; 6] = [
        &[&[FRESH, FRESH]],
        &[&[FRESH, OVER]],
        &[&[FRESH], &[OVER, OVER]],
        &[&[FRESH], &[OVER, DELETER]],
        &[&[FRESH], &[DELETER, DELETER, FRESH]],
        &[&[FRESH, ABORTS]],
    ];
    let (start, mut runs) = (Instant::now(), 0);
    for (at, stages) in two.into_iter().enumerate() {
        runs += all(&scenario(stages), most);
        // Faults at every request of all of them are for the long form.
        if at == 1 || wanted("LANCE_ARTIFACT_INTERFERENCES").is_some() {
            runs += all(&Scenario { faults: faulty, ..scenario(stages) }, most);
        }
    }
    println!("{runs} schedules with up to {most} interferences or faults in {:.0} s", start.elapsed().as_secs_f64());
}

/// The first rule that a world of lies breaks, in a search.
fn noticed(lie: Lie, stages: &[&[Role]]) -> Option<String> {
    let mut chooser = Exhaustive::new(1);
    let scenario = Scenario { lie, ..scenario(stages) };
    while chooser.again() {
        if let Some(broken) = run(&scenario, 0, &mut chooser).broken {
            return Some(broken);
        }
    }
    None
}

/// A schedule that is written down.
fn scripted(scenario: &Scenario, steps: Vec<Step>) -> Run {
    let mut script = Script::new(steps);
    let run = run(scenario, 0, &mut script);
    assert!(script.is_over() || run.broken.is_some(), "the schedule ended before its steps did");
    run
}

fn puts(request: &Request, file: &str) -> bool {
    matches!(request, Request::Put(path, ..) if path == file)
}

fn puts_manifest(request: &Request) -> bool {
    puts(request, MANIFEST_FILE)
}

fn puts_plain_claim(request: &Request) -> bool {
    puts(request, CLAIM_FILE)
}

fn deletes_manifest(request: &Request) -> bool {
    matches!(request, Request::Delete(path) if path == MANIFEST_FILE)
}

fn deletes(request: &Request) -> bool {
    matches!(request, Request::Delete(_))
}

fn gets_manifest(request: &Request) -> bool {
    matches!(request, Request::Get(path) if path == MANIFEST_FILE)
}

fn gets_claim(request: &Request) -> bool {
    matches!(request, Request::Get(path) if path.starts_with(CLAIM_FILE))
}

fn lists(request: &Request) -> bool {
    matches!(request, Request::List(_))
}

fn has_claimed(state: &State, actor: usize) -> bool {
    state.actors[actor].json.is_some()
}

fn has_written(state: &State, actor: usize) -> bool {
    let files = &state.actors[actor].files;
    !files.is_empty() && files.iter().all(|(name, content)| state.objects.get(name).is_some_and(|there| there.content == *content))
}

/// A writer elsewhere claims the plain names and is stopped for a week. Another one takes it for abandoned and publishes, that
/// artifact is deleted, and a third one writes to the plain names when the first wakes up.
fn a_claim_that_was_taken_over(lie: Lie) -> Run {
    let mut scenario = Scenario { lie, ..scenario(&[&[FRESH, OVER, DELETER, FRESH]]) };
    scenario.faults.pauses = true;
    scenario.stages[0][0].host = 1;
    let steps = vec![UntilWorld(0, |state| has_claimed(state, 0)), Step::Pause, End(1), End(2), Until(3, puts_manifest), End(0), End(3)];
    scripted(&scenario, steps)
}

/// A writer elsewhere has written its files and is stopped for a week. Another one takes it for abandoned and publishes, and that
/// artifact is deleted.
fn files_that_were_taken_for_waste(lie: Lie) -> Run {
    let mut scenario = Scenario { lie, ..scenario(&[&[FRESH], &[OVER, OVER, DELETER]]) };
    scenario.faults.pauses = true;
    scenario.stages[1][0].host = 1;
    let steps = vec![End(0), UntilWorld(1, |state| has_written(state, 1)), Step::Pause, End(2), End(3), End(1)];
    scripted(&scenario, steps)
}

#[test]
fn what_would_break_the_promises_is_noticed() {
    for (lie, stages, expected) in [
        (
            Lie::ManifestsAlwaysFit,
            &[&[FRESH] as &[Role], &[OVER, OVER]] as &[&[Role]],
            "replaces an artifact that was not there when it began",
        ),
        (Lie::OthersLookGone, &[&[FRESH], &[OVER, OVER]], "who lives"),
        (Lie::ClaimsAlwaysFit, &[&[FRESH, FRESH]], "writes over .lance-artifact-claim, which is of actor"),
    ] {
        assert_eq!(noticed(Lie::None, stages), None);
        let broken = noticed(lie, stages).unwrap_or_else(|| panic!("{lie:?} was not noticed"));
        assert!(broken.contains(expected), "{lie:?}: {broken}");
    }
    for (tried, lie, expected) in [
        (a_claim_that_was_taken_over as fn(Lie) -> Run, Lie::OwnClaimLooksHeld, "actor 0 writes over"),
        (files_that_were_taken_for_waste, Lie::FilesLookThere, "the artifact of actor 1 is published, and its"),
    ] {
        let honest = checked(tried(Lie::None), "without a lie");
        assert!(honest.told.contains(&Told::Removed) || honest.told.contains(&Told::Lost), "{:?}", honest.told);
        let broken = tried(lie).broken.unwrap_or_else(|| panic!("{lie:?} was not noticed"));
        assert!(broken.contains(expected), "{lie:?}: {broken}");
    }
}

/// One of two that delete an artifact waits for the claim on its files, while the other one deletes them and the next build takes
/// their names.
#[test]
fn a_late_deleter_leaves_the_next_artifact_alone() {
    let scenario = scenario(&[&[FRESH], &[DELETER, DELETER, FRESH]]);
    let run = scripted(&scenario, vec![End(0), Until(2, deletes_manifest), Until(1, puts_plain_claim), End(2), End(3), End(1)]);
    assert_eq!(checked(run, "").told[1..4], [Told::Deleted, Told::Deleted, Told::Published]);
}

/// The same of a writer that removes what it replaced, where its own artifact is deleted meanwhile.
#[test]
fn a_late_cleaner_leaves_the_next_artifact_alone() {
    let scenario = scenario(&[&[FRESH], &[OVER, DELETER, FRESH]]);
    let steps = vec![End(0), Until(2, deletes_manifest), Until(1, puts_plain_claim), End(2), End(3), End(1)];
    assert_eq!(checked(scripted(&scenario, steps), "").told[1..4], [Told::Published, Told::Deleted, Told::Published]);
}

/// Two that delete what a killed build left, and the next build takes its names between them.
#[test]
fn a_late_sweeper_leaves_the_next_build_alone() {
    let mut scenario = scenario(&[&[FRESH], &[Role::Sweeper, Role::Sweeper, FRESH]]);
    scenario.faults.kills = true;
    let kill = |_: usize| Move::Kill(100, After::Never);
    let steps = vec![
        UntilWorld(0, |state| has_written(state, 0)),
        Make(0, kill),
        Until(1, deletes),
        End(2),
        UntilWorld(3, |state| has_written(state, 3)),
        End(1),
        End(3),
    ];
    assert_eq!(checked(scripted(&scenario, steps), "").told[3], Told::Published);
}

/// One that looks for what builds left is stopped for a week between two looks, and an artifact is published meanwhile.
#[test]
fn a_sweeper_that_was_stopped_leaves_what_was_published_meanwhile() {
    let mut scenario = scenario(&[&[FRESH], &[Role::Sweeper, OVER]]);
    scenario.faults.pauses = true;
    for step in [gets_manifest as fn(&Request) -> bool, lists, gets_claim] {
        let steps = vec![End(0), Until(1, step), End(2), Step::Pause, End(1)];
        assert_eq!(checked(scripted(&scenario, steps), "").told[2], Told::Published);
        let steps = vec![End(0), Until(1, step), UntilWorld(2, |state| has_written(state, 2)), Step::Pause, End(1), End(2)];
        assert_eq!(checked(scripted(&scenario, steps), "").told[2], Told::Published);
    }
}

/// One elsewhere looks for what builds left, and between two of its looks an artifact of eight days is deleted, and the next build claims its
/// names: the claim is not as old as the files that were there before it.
#[test]
fn a_sweeper_takes_no_claim_for_as_old_as_files_that_were_there_before_it() {
    let mut scenario = scenario(&[&[FRESH], &[Role::Sweeper, DELETER, FRESH]]);
    scenario.faults.pauses = true;
    scenario.stages[1][0].host = 1;
    for step in [gets_claim as fn(&Request) -> bool, lists, gets_manifest] {
        let steps = vec![End(0), Step::Pause, Until(1, step), End(2), UntilWorld(3, |state| has_written(state, 3)), End(1), End(3)];
        assert_eq!(checked(scripted(&scenario, steps), "").told[3], Told::Published);
    }
}

/// The same of a writer that deletes what others left, while one elsewhere does so too.
#[test]
fn a_cleaner_takes_no_claim_for_as_old_as_the_one_before_it() {
    let mut scenario = scenario(&[&[FRESH], &[FRESH, Role::Sweeper]]);
    (scenario.faults.pauses, scenario.faults.kills) = (true, true);
    (scenario.stages[0][0].host, scenario.stages[1][1].host) = (1, 1);
    let kill = |_: usize| Move::Kill(100, After::Never);
    let steps = vec![
        UntilWorld(0, |state| has_written(state, 0)),
        Make(0, kill),
        Step::Pause,
        UntilWorld(1, |state| state.actors[1].was_published),
        Until(1, gets_claim),
        Until(2, deletes),
        End(1),
        End(2),
    ];
    assert_eq!(checked(scripted(&scenario, steps), "").told[1], Told::Published);
}

/// A writer that was stopped for a week publishes, and has not cleaned up when one elsewhere looks for what builds left.
#[test]
fn a_sweeper_leaves_the_claim_of_who_has_just_published() {
    let mut scenario = scenario(&[&[FRESH], &[OVER, Role::Sweeper]]);
    scenario.faults.pauses = true;
    scenario.stages[1][0].host = 1;
    for step in [lists as fn(&Request) -> bool, deletes] {
        let steps = vec![
            End(0),
            UntilWorld(1, |state| has_written(state, 1)),
            Step::Pause,
            UntilWorld(1, |state| state.actors[1].was_published),
            Until(1, step),
            End(2),
            End(1),
        ];
        assert_eq!(checked(scripted(&scenario, steps), "").told[1], Told::Published);
    }
}

/// One elsewhere is stopped for a week after it has looked what is there: what was young then is not old by that.
#[test]
fn a_sweeper_that_was_stopped_takes_nobody_for_abandoned_by_that() {
    let mut scenario = scenario(&[&[FRESH], &[Role::Sweeper, OVER]]);
    scenario.faults.pauses = true;
    scenario.stages[1][0].host = 1;
    let look = || vec![End(0), UntilWorld(2, |state| has_written(state, 2)), Until(1, gets_manifest), Step::Pause];
    for mut meanwhile in [vec![UntilWorld(2, |state| state.actors[2].was_published)], Vec::new()] {
        let mut steps = look();
        steps.append(&mut meanwhile);
        steps.extend([End(1), End(2)]);
        assert_eq!(checked(scripted(&scenario, steps), "").told[2], Told::Published);
    }
}

/// A writer that was stopped for a week goes on after it was taken for abandoned, and before its claim is deleted.
#[test]
fn who_wakes_up_while_he_is_taken_for_abandoned_is_told() {
    let mut scenario = scenario(&[&[FRESH], &[OVER, OVER]]);
    scenario.faults.pauses = true;
    scenario.stages[1][0].host = 1;
    let steps = vec![
        End(0),
        UntilWorld(1, |state| state.objects.values().any(|object| object.by == 1)),
        Step::Pause,
        Until(1, |request| matches!(request, Request::Put(path, ..) if path.ends_with(".lance"))),
        Until(2, gets_claim),
        UntilWorld(1, |state| state.objects.iter().any(|(path, object)| object.by == 1 && path.ends_with(".lance"))),
        End(2),
    ];
    assert_eq!(checked(scripted(&scenario, steps), "").told[1..3], [Told::Removed, Told::Published]);
}
