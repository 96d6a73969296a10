//! The streams of one session: what each has received and may send. No I/O here.
//!
//! Everything an end keeps for its peer is bounded, whatever the peer sends and though it may read nothing:
//!
//! - Received and unread: `WINDOW` bytes a stream, `LARGE_WINDOW` of at most `MAX_LARGE` streams, whose readers have kept up. More than was
//!   granted ends the session.
//! - Put and unsent: data waits once `BACKLOG` bytes are unsent, or `SHARE` of one stream. Frames that carry no data wait at `BACKLOG +
//!   CONTROL`: until then they are marks on their stream, of which each has at most one of a kind.
//! - Streams: `MAX_STREAMS` that the host opened, `MAX_GUEST_STREAMS` that the guest opened, and `RESERVE` of either. Further ones are
//!   refused; more unsent refusals than an honest peer can cause end the session.

mod link_side;
mod user_side;

use crate::frame::{Frame, Id, Reason};
use crate::limits::{LARGE_WINDOW, MAX_GUEST_STREAMS, MAX_STREAMS, WINDOW};
use crate::output::Output;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::task::{Context, Poll, Waker};

/// A stream with so many unsent bytes waits, to let other streams send.
const SHARE: usize = 128 * 1024;
/// With so many unsent bytes in all, data of every stream waits.
const BACKLOG: usize = 1024 * 1024;
/// Room above `BACKLOG` for frames that carry no data.
const CONTROL: usize = 64 * 1024;
/// How many streams either end may open above its limit, for what must get through: the end of the machine.
const RESERVE: usize = 8;
/// The most refusals that an honest opener can be waiting for.
const REFUSALS: usize = MAX_STREAMS + RESERVE;

/// Says which end this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Guest,
}

impl Side {
    fn opened(self, id: Id) -> bool {
        (id % 2 == 1) == (self == Side::Host)
    }

    fn peer(self) -> Side {
        match self {
            Side::Host => Side::Guest,
            Side::Guest => Side::Host,
        }
    }

    /// How many streams this end may have open.
    pub(crate) fn limit(self, urgent: bool) -> usize {
        let limit = match self {
            Side::Host => MAX_STREAMS,
            Side::Guest => MAX_GUEST_STREAMS,
        };
        if urgent { limit + RESERVE } else { limit }
    }
}

/// The peer has broken the protocol.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation;

/// The progress of a stream's opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// The peer does not know of it yet.
    Unasked,
    /// The acceptor has not decided.
    Asked,
    Accepted,
}

#[derive(Debug)]
struct Slot {
    opening: Opening,
    received: VecDeque<u8>,
    /// How many bytes the peer may send.
    window: usize,
    /// Bytes that were read and have not been granted to the peer again. With `window` and `received` they always add up to `size`.
    consumed: usize,
    /// `WINDOW`, or `LARGE_WINDOW`.
    size: usize,
    /// How many bytes we may send.
    credit: usize,
    /// How many of the stream's bytes are in the output.
    unsent: usize,
    /// The peer has ended its data.
    finished: bool,
    /// We have ended our data.
    shut: bool,
    /// The peer has reset the stream.
    reset: Option<Reason>,
    /// Our user has dropped the stream, and the peer is to be told.
    left: Option<Reason>,
    /// Whether the stream is in `Mux::due`.
    due: bool,
    /// Whether the stream is in `Mux::waiting`.
    waiting: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Slot {
    fn new(opening: Opening) -> Self {
        Slot {
            opening,
            received: VecDeque::new(),
            window: WINDOW,
            consumed: 0,
            size: WINDOW,
            credit: WINDOW,
            unsent: 0,
            finished: false,
            shut: false,
            reset: None,
            left: None,
            due: false,
            waiting: false,
            reader: None,
            writer: None,
        }
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn wake_writer(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
    }
}

/// A stream the peer wants to open.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) id: Id,
    pub(crate) port: u32,
}

/// All streams of a session.
#[derive(Debug)]
pub(crate) struct Mux {
    side: Side,
    over: bool,
    slots: HashMap<Id, Slot>,
    /// How many of the streams we have opened.
    ours: usize,
    /// How many of the streams have a large window.
    large: usize,
    next: Id,
    pub(crate) output: Output,
    /// Streams with a credit or a reset to send.
    due: VecDeque<Id>,
    /// Streams that are to be refused and have no slot.
    refusals: VecDeque<Id>,
    /// Streams that wait for room in the output, in order.
    waiting: VecDeque<Id>,
    driver: Option<Waker>,
}

fn reset() -> io::Error {
    ErrorKind::ConnectionReset.into()
}

impl Mux {
    /// `first` is sent before any frame.
    pub(crate) fn new(side: Side, first: Vec<u8>) -> Self {
        Mux {
            side,
            over: false,
            slots: HashMap::new(),
            ours: 0,
            large: 0,
            next: if side == Side::Host { 1 } else { 2 },
            output: Output::new(first),
            due: VecDeque::new(),
            refusals: VecDeque::new(),
            waiting: VecDeque::new(),
            driver: None,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Ends the session. What has arrived can still be read; then streams fail.
    pub(crate) fn end(&mut self) -> Output {
        self.over = true;
        for slot in self.slots.values_mut() {
            slot.wake_reader();
            slot.wake_writer();
        }
        std::mem::take(&mut self.output)
    }

    /// How many bytes of memory are held for the peer.
    pub(crate) fn held(&self) -> usize {
        let received: usize = self.slots.values().map(|slot| slot.received.capacity()).sum();
        let queued = self.due.capacity() + self.refusals.capacity() + self.waiting.capacity();
        received + self.output.held() + queued * size_of::<Id>() + self.slots.capacity() * size_of::<Slot>()
    }

    /// Sets the task that is woken when there is more to send.
    pub(crate) fn set_driver(&mut self, cx: &Context<'_>) {
        if self.driver.as_ref().is_none_or(|driver| !driver.will_wake(cx.waker())) {
            self.driver = Some(cx.waker().clone());
        }
    }

    fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    fn slot(&mut self, id: Id) -> io::Result<&mut Slot> {
        // A stream's slot exists until its user leaves.
        self.slots.get_mut(&id).ok_or_else(reset)
    }

    fn remove(&mut self, id: Id) {
        let Some(slot) = self.slots.remove(&id) else { return };
        self.ours -= usize::from(self.side.opened(id));
        self.large -= usize::from(slot.size == LARGE_WINDOW);
        if slot.due {
            self.due.retain(|due| *due != id);
        }
        if slot.waiting {
            self.waiting.retain(|waiting| *waiting != id);
        }
    }

    fn mark_due(&mut self, id: Id) {
        if let Some(slot) = self.slots.get_mut(&id)
            && !std::mem::replace(&mut slot.due, true)
        {
            self.due.push_back(id);
            self.wake_driver();
        }
    }

    /// Waits until fewer than `unsent` bytes are in the output.
    fn poll_room(&mut self, id: Id, unsent: usize, cx: &Context<'_>) -> Poll<()> {
        if self.output.len() < unsent {
            return Poll::Ready(());
        }
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.writer = Some(cx.waker().clone());
            if !std::mem::replace(&mut slot.waiting, true) {
                self.waiting.push_back(id);
            }
        }
        Poll::Pending
    }

    /// Puts a frame of one of our streams into the output, once there is room.
    fn poll_put(&mut self, frame: Frame, id: Id, cx: &Context<'_>) -> Poll<()> {
        std::task::ready!(self.poll_room(id, BACKLOG + CONTROL, cx));
        self.output.put(frame);
        self.wake_driver();
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests;
