//! One piece of work for any number of waiters.
//!
//! The first to ask starts the work as a task of its own, so a waiter that leaves cancels nothing. A success stays; a
//! failure is told to those who wait for it, and the next to ask starts anew. If the task dies, its waiters get
//! [`FetchError::Lost`]: the channel closes when its sender is dropped, also by a panic, so nobody waits for ever.
//!
//! Lock: a plain mutex around the state, held for a few instructions and never across an await.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;

use super::FetchError;

/// What a flight ends with.
pub type Outcome<T> = Result<T, Arc<FetchError>>;

/// A single flight.
#[derive(Debug)]
pub struct Flight<T> {
    what: String,
    state: Arc<Mutex<State<T>>>,
}

#[derive(Debug)]
enum State<T> {
    Idle,
    Running(watch::Receiver<Option<Outcome<T>>>),
    Done(T),
}

impl<T: Clone + Send + Sync + 'static> Flight<T> {
    /// Work that nobody has asked for yet; `what` names it in errors.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), state: Arc::new(Mutex::new(State::Idle)) }
    }

    /// The result, if there is one already.
    pub fn done(&self) -> Option<T> {
        match &*lock(&self.state) {
            State::Done(value) => Some(value.clone()),
            State::Idle | State::Running(_) => None,
        }
    }

    /// Whether somebody is at it.
    pub fn is_running(&self) -> bool {
        matches!(&*lock(&self.state), State::Running(_))
    }

    /// Forgets a result, so that the next to ask starts anew. A flight under way is left alone.
    pub fn forget(&self) {
        let mut state = lock(&self.state);
        if matches!(*state, State::Done(_)) {
            *state = State::Idle;
        }
    }

    /// Puts what is as good in the place of a result, if there is one.
    pub fn replace(&self, value: T) {
        let mut state = lock(&self.state);
        if matches!(*state, State::Done(_)) {
            *state = State::Done(value);
        }
    }

    /// Waits for the result; starts `work` if nobody has. The wait may be dropped at any time.
    pub async fn join<F>(&self, work: impl FnOnce() -> F) -> Result<T, FetchError>
    where
        F: Future<Output = Result<T, FetchError>> + Send + 'static,
    {
        let mut receiver = match self.receiver(work) {
            Ok(value) => return Ok(value),
            Err(receiver) => receiver,
        };
        match receiver.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Ok(value))) => Ok(value.clone()),
            Ok(Some(Err(error))) => Err(FetchError::Shared(error.clone())),
            Ok(None) | Err(_) => Err(FetchError::Lost { what: self.what.clone() }),
        }
    }

    fn receiver<F>(&self, work: impl FnOnce() -> F) -> Result<T, watch::Receiver<Option<Outcome<T>>>>
    where
        F: Future<Output = Result<T, FetchError>> + Send + 'static,
    {
        let mut state = lock(&self.state);
        match &*state {
            State::Done(value) => return Ok(value.clone()),
            // A closed channel without an outcome is a task that died.
            State::Running(receiver) if receiver.has_changed().is_ok() || receiver.borrow().is_some() => {
                return Err(receiver.clone());
            }
            State::Running(_) | State::Idle => {}
        }
        let (sender, receiver) = watch::channel(None);
        *state = State::Running(receiver.clone());
        drop(state);
        let work = work();
        let shared = self.state.clone();
        tokio::spawn(async move {
            let outcome = work.await.map_err(|error| match error {
                FetchError::Shared(inner) => inner,
                other => Arc::new(other),
            });
            *lock(&shared) = match &outcome {
                Ok(value) => State::Done(value.clone()),
                Err(_) => State::Idle,
            };
            // Nobody may be waiting any more.
            let _ = sender.send(Some(outcome));
        });
        Err(receiver)
    }
}

fn lock<T>(state: &Mutex<State<T>>) -> MutexGuard<'_, State<T>> {
    state.lock().unwrap_or_else(|held| held.into_inner())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn lost(what: &str) -> FetchError {
        FetchError::Lost { what: what.to_owned() }
    }

    #[tokio::test]
    async fn many_waiters_share_one_flight_and_a_success_stays() {
        let flight = Flight::new("test");
        let runs = Arc::new(AtomicUsize::new(0));
        let work = || {
            let runs = runs.clone();
            async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok(runs.fetch_add(1, Ordering::SeqCst))
            }
        };
        let results = futures_util::future::join_all((0..64).map(|_| flight.join(work))).await;
        assert!(results.iter().all(|result| matches!(result, Ok(0))));
        assert!(matches!(flight.join(work).await, Ok(0)));
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_failure_is_told_to_the_waiters_and_the_next_starts_anew() {
        let flight = Flight::new("test");
        let failed = flight.join(|| async { Err::<u32, _>(lost("first")) }).await;
        assert!(matches!(failed.as_ref().map_err(FetchError::root), Err(FetchError::Lost { what }) if what == "first"));
        assert!(matches!(flight.join(|| async { Ok(7) }).await, Ok(7)));
    }

    #[tokio::test]
    async fn only_a_result_is_replaced() {
        let flight = Flight::new("test");
        flight.replace(1);
        assert_eq!(flight.done(), None);
        assert!(matches!(flight.join(|| async { Ok(2) }).await, Ok(2)));
        flight.replace(3);
        assert_eq!(flight.done(), Some(3));
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_cancels_nothing() {
        let flight = Flight::new("test");
        let work = || async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Ok(1)
        };
        assert!(tokio::time::timeout(Duration::from_millis(1), flight.join(work)).await.is_err());
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(flight.done(), Some(1));
    }

    #[tokio::test]
    async fn a_panic_ends_the_wait_and_the_flight_can_start_again() {
        let flight = Flight::new("test");
        let died = flight.join(|| async { panic!("on purpose") }).await;
        assert!(matches!(died, Err(FetchError::Lost { .. })));
        assert!(matches!(flight.join(|| async { Ok(2) }).await, Ok(2)));
    }
}
