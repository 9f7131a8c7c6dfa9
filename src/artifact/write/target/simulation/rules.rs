//! What must hold after every request, whatever is lost, stopped or killed.

use std::time::Duration;

use bytes::Bytes;

use super::world::{Life, Object, State, Told};
use crate::artifact::format::{MANIFEST_FILE, Ours, claim_file, ours};
use crate::artifact::write::target::leftovers::ABANDONED_AFTER;

/// An object, until it is written anew.
fn seen_as((path, object): (&String, &Object)) -> (String, Duration) {
    (path.clone(), object.modified)
}

impl State {
    pub fn breaks(&mut self, what: String) {
        if !self.is_void {
            self.broken.get_or_insert(what);
        }
    }

    /// Whether `of` may be taken for abandoned by `by`: nothing was heard of it for a week, from elsewhere.
    fn looks_abandoned(&self, of: usize, by: usize) -> bool {
        !self.same_host(of, by) && self.now.saturating_sub(self.actors[of].newest) > ABANDONED_AFTER
    }

    /// An actor looks for whose files are there.
    pub fn before_list(&mut self, by: usize, folder: &str) {
        let abandoned: Vec<_> = self.objects.iter().filter(|(_, object)| self.looks_abandoned(object.by, by)).map(seen_as).collect();
        let took = &mut self.actors[by].took_for_abandoned;
        if folder.is_empty() {
            took.clear();
        }
        took.extend(abandoned);
    }

    pub fn before_write(&mut self, by: usize, path: &str, content: &Bytes) {
        if path == MANIFEST_FILE {
            self.before_publish(by, content);
        } else if let Some(there) = self.objects.get(path).cloned() {
            self.touched(by, path, &there, "writes over");
        }
    }

    pub fn before_delete(&mut self, by: usize, path: &str, there: &Object) {
        if path != MANIFEST_FILE {
            return self.touched(by, path, there, "deletes");
        }
        if self.actors[by].may_replace.as_ref() != Some(&there.content) {
            // A store has no conditional deletes that could be asked for: see `Store::delete_if`.
            self.deleted_unseen += 1;
        }
    }

    /// The files of a live attempt are its own, and its claim is until it gives it up.
    fn touched(&mut self, by: usize, path: &str, there: &Object, how: &str) {
        let of = there.by;
        if of == by || self.actors[of].life != Life::Running {
            return;
        }
        // Whoever was taken for abandoned may have woken up since.
        if self.actors[by].took_for_abandoned.contains(&seen_as((&path.to_string(), there))) {
            self.actors[of].overslept = true;
            return;
        }
        self.is_void |= self.actors[by].overslept;
        let is_claim = matches!(ours(path), Some(Ours::Claim(_)));
        // What was published may be replaced by others before the writer hears of it.
        if is_claim || !self.actors[of].was_published {
            self.breaks(format!("actor {by} {how} {path}, which is of actor {of}, who lives"));
        }
    }

    fn before_publish(&mut self, by: usize, content: &Bytes) {
        let there = self.objects.get(MANIFEST_FILE).map(|object| object.content.clone());
        let actor = &self.actors[by];
        self.is_void |= actor.overslept;
        let told = actor.told;
        if actor.json.as_ref() != Some(content) {
            self.breaks(format!("actor {by} publishes a manifest that is not its own"));
        } else if there.is_some() && there != actor.may_replace {
            self.breaks(format!("actor {by} replaces an artifact that was not there when it began"));
        } else if matches!(told, Told::Lost | Told::Removed) {
            self.breaks(format!("actor {by} publishes after it was told that it has not: {told:?}"));
        }
        self.actors[by].was_published = true;
    }

    /// Where a manifest is, all of its files are there, and its own.
    pub fn after_change(&mut self) {
        let Some(manifest) = self.objects.get(MANIFEST_FILE) else { return };
        let Some(of) = self.actors.iter().position(|actor| actor.json.as_ref() == Some(&manifest.content)) else {
            return self.breaks("the manifest is nobody's".into());
        };
        for (name, content) in &self.actors[of].files {
            let what = match self.objects.get(name) {
                Some(there) if there.content == *content => continue,
                Some(there) => format!("is actor {}'s", there.by),
                None => "is not there".into(),
            };
            let what = format!("the artifact of actor {of} is published, and its {name} {what}");
            return self.breaks(what);
        }
    }

    /// An attempt was answered.
    pub fn tell(&mut self, to: usize, told: Told) {
        let actor = &mut self.actors[to];
        actor.told = told;
        let was_published = actor.was_published;
        let is_there = actor.json.is_some() && self.objects.get(MANIFEST_FILE).map(|object| &object.content) == actor.json.as_ref();
        match told {
            Told::Published if !was_published => self.breaks(format!("actor {to} was told that it published, and it has not")),
            Told::Lost | Told::Removed if is_there => {
                self.breaks(format!("actor {to} was told that it is not published, and it is: {told:?}"))
            }
            _ => {}
        }
    }

    /// Whose the claim on a file's name is.
    fn claim_of(&self, path: &str) -> Option<usize> {
        match ours(path) {
            Some(Ours::Data(tag) | Ours::Claim(tag)) => self.objects.get(&claim_file(tag)).map(|claim| claim.by),
            _ => None,
        }
    }

    /// Whether `last` cannot know that somebody is over: he was killed on another machine, or his process goes on after his requests failed.
    fn may_live(&self, by: usize, last: usize) -> bool {
        let actor = &self.actors[by];
        match actor.life {
            Life::Killed => !self.same_host(by, last),
            _ => actor.failures > 0,
        }
    }

    /// What is left at the place beside the artifact of `last`, which came when all was over: only what nobody can know the owner of,
    /// or, of owners that may live, what is young.
    pub fn check_left(&mut self, last: usize, long_after: bool) {
        let names = &self.actors[last].files;
        let mut wrong = Vec::new();
        for (path, object) in &self.objects {
            let owner = &self.actors[object.by];
            if path == MANIFEST_FILE || (object.by == last && names.contains_key(path)) {
                continue;
            }
            // By its claim it is known whose a file is. Without one it may be anybody's, unless its writer ended as it should.
            let allowed = match self.claim_of(path) {
                Some(by) => self.may_live(by, last),
                None => owner.was_published || owner.life == Life::Killed || owner.failures > 0,
            };
            if long_after || !allowed {
                wrong.push(format!("{path} of actor {} ({:?}, {:?})", object.by, owner.life, owner.told));
            }
        }
        if !wrong.is_empty() {
            self.breaks(format!("left when all was over: {}", wrong.join(", ")));
        }
        // Uploads are aborted by whoever lives to do it.
        let mut open = self.uploads.values().filter(|(_, _, by)| self.actors[*by].life == Life::Ended && self.actors[*by].failures == 0);
        if let Some((path, _, by)) = open.next() {
            let what = format!("an upload of {path} by actor {by} is open when all is over");
            self.breaks(what);
        }
    }
}
