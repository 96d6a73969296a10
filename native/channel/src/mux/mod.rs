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

use crate::frame::{Frame, Id, MAX_DATA, Reason};
use crate::limits::{LARGE_WINDOW, MAX_GUEST_STREAMS, MAX_LARGE, MAX_STREAMS, WINDOW};
use crate::output::Output;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::task::{Context, Poll, Waker};
use tokio::io::ReadBuf;

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

/// The operations of the streams' users.
impl Mux {
    /// Takes a place for a new stream, of which the peer does not know yet.
    pub(crate) fn place(&mut self, urgent: bool) -> io::Result<Id> {
        if self.over {
            return Err(reset());
        }
        if self.ours >= self.side.limit(urgent) {
            return Err(ErrorKind::ResourceBusy.into());
        }
        // The numbers begin anew after two thousand million streams, so one may be in use.
        while self.slots.contains_key(&self.next) {
            self.next = self.next.wrapping_add(2);
        }
        let id = self.next;
        self.next = id.wrapping_add(2);
        self.ours += 1;
        self.slots.insert(id, Slot::new(Opening::Unasked));
        Ok(id)
    }

    /// Asks the peer to open the stream.
    pub(crate) fn poll_ask(&mut self, id: Id, port: u32, urgent: bool, cx: &Context<'_>) -> Poll<io::Result<()>> {
        if self.over {
            return Poll::Ready(Err(reset()));
        }
        std::task::ready!(self.poll_put(Frame::Open { id, port, urgent }, id, cx));
        self.slot(id)?.opening = Opening::Asked;
        Poll::Ready(Ok(()))
    }

    /// Waits for the peer's answer.
    pub(crate) fn poll_answer(&mut self, id: Id, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let over = self.over;
        let slot = self.slot(id)?;
        if slot.opening == Opening::Accepted {
            return Poll::Ready(Ok(()));
        }
        match slot.reset {
            Some(Reason::Busy) => Poll::Ready(Err(ErrorKind::ResourceBusy.into())),
            Some(Reason::Refused | Reason::Dropped) => Poll::Ready(Err(ErrorKind::ConnectionRefused.into())),
            None if over => Poll::Ready(Err(reset())),
            None => {
                slot.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Accepts a stream that the peer has opened.
    pub(crate) fn poll_accept(&mut self, id: Id, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let over = self.over;
        if over || self.slot(id)?.reset.is_some() {
            return Poll::Ready(Err(reset()));
        }
        std::task::ready!(self.poll_put(Frame::Accept { id }, id, cx));
        self.slot(id)?.opening = Opening::Accepted;
        Poll::Ready(Ok(()))
    }

    pub(crate) fn poll_read(&mut self, id: Id, buf: &mut ReadBuf<'_>, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let over = self.over;
        let slot = self.slot(id)?;
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if slot.received.is_empty() {
            if slot.finished {
                return Poll::Ready(Ok(()));
            }
            if over || slot.reset.is_some() {
                return Poll::Ready(Err(reset()));
            }
            // The user has read everything, so the buffer is freed: an idle stream holds no memory.
            slot.received = VecDeque::new();
            slot.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let bytes = slot.received.as_slices().0;
        let n = bytes.len().min(buf.remaining());
        buf.put_slice(&bytes[..n]);
        slot.received.drain(..n);
        slot.consumed += n;
        if slot.consumed >= slot.size / 2 && !slot.finished && slot.reset.is_none() && !over {
            self.mark_due(id);
        }
        Poll::Ready(Ok(()))
    }

    pub(crate) fn poll_write(&mut self, id: Id, bytes: &[u8], cx: &Context<'_>) -> Poll<io::Result<usize>> {
        let over = self.over;
        let slot = self.slot(id)?;
        if slot.shut {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        if over || slot.reset.is_some() {
            return Poll::Ready(Err(reset()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if slot.credit == 0 || slot.unsent >= SHARE {
            slot.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = bytes.len().min(slot.credit).min(MAX_DATA);
        std::task::ready!(self.poll_room(id, BACKLOG, cx));
        let more = self.output.put_data(id, &bytes[..n]);
        let slot = self.slot(id)?;
        slot.credit -= n;
        slot.unsent += more;
        self.wake_driver();
        Poll::Ready(Ok(n))
    }

    /// Ends the data of our side.
    pub(crate) fn poll_shut(&mut self, id: Id, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let over = self.over;
        let slot = self.slot(id)?;
        if slot.shut {
            return Poll::Ready(Ok(()));
        }
        if over || slot.reset.is_some() {
            return Poll::Ready(Err(reset()));
        }
        std::task::ready!(self.poll_put(Frame::Finish { id }, id, cx));
        self.slot(id)?.shut = true;
        Poll::Ready(Ok(()))
    }

    /// Records that the user is gone. The peer is told, unless both sides have ended their data.
    pub(crate) fn leave(&mut self, id: Id, reason: Reason) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let done = slot.shut && slot.finished;
        if self.over || done || slot.reset.is_some() || slot.opening == Opening::Unasked {
            return self.remove(id);
        }
        if slot.left.is_some() {
            return;
        }
        slot.left = Some(reason);
        slot.consumed += slot.received.len();
        slot.received = VecDeque::new();
        self.mark_due(id);
    }
}

/// The operations of the link: frames from the peer and to the peer.
impl Mux {
    /// Handles a frame of the peer; `data` is the payload of a data frame.
    pub(crate) fn take(&mut self, frame: Frame, data: &[u8]) -> Result<Option<Asked>, Violation> {
        if let Frame::Open { id, port, urgent } = frame {
            return self.asked(id, port, urgent);
        }
        let (Frame::Open { id, .. }
        | Frame::Accept { id }
        | Frame::Data { id, .. }
        | Frame::Credit { id, .. }
        | Frame::Finish { id }
        | Frame::Reset { id, .. }) = frame;
        let ours = self.side.opened(id);
        // Frames of a stream that this end has forgotten may still be under way.
        let Some(slot) = self.slots.get_mut(&id) else { return Ok(None) };
        // On our own stream the peer must answer before it sends anything else. On its own stream it may send before our answer.
        let open = slot.reset.is_none() && (!ours || slot.opening == Opening::Accepted);
        match frame {
            Frame::Open { .. } => {}
            Frame::Accept { .. } => {
                if !ours || slot.opening != Opening::Asked || slot.reset.is_some() {
                    return Err(Violation);
                }
                slot.opening = Opening::Accepted;
                slot.wake_reader();
            }
            Frame::Data { .. } => {
                if !open || slot.finished || data.len() > slot.window {
                    return Err(Violation);
                }
                slot.window -= data.len();
                if slot.left.is_some() {
                    slot.consumed += data.len();
                } else {
                    if slot.received.capacity() < slot.received.len() + data.len() {
                        // Rounded up to a power of two. A window is one, so the buffer never exceeds it.
                        let wanted = (slot.received.len() + data.len()).next_power_of_two();
                        slot.received.reserve_exact(wanted - slot.received.len());
                    }
                    slot.received.extend(data);
                    slot.wake_reader();
                }
            }
            Frame::Credit { bytes, .. } => {
                let credit = slot.credit.saturating_add(bytes as usize);
                if !open || bytes == 0 || credit > LARGE_WINDOW {
                    return Err(Violation);
                }
                slot.credit = credit;
                slot.wake_writer();
            }
            Frame::Finish { .. } => {
                if !open || slot.finished {
                    return Err(Violation);
                }
                slot.finished = true;
                slot.wake_reader();
            }
            Frame::Reset { reason, .. } => {
                if slot.opening == Opening::Unasked || slot.reset.is_some() {
                    return Err(Violation);
                }
                if slot.left.is_some() {
                    self.remove(id);
                } else {
                    slot.reset = Some(reason);
                    slot.wake_reader();
                    slot.wake_writer();
                }
            }
        }
        Ok(None)
    }

    fn asked(&mut self, id: Id, port: u32, urgent: bool) -> Result<Option<Asked>, Violation> {
        if self.side.opened(id) || self.slots.contains_key(&id) {
            return Err(Violation);
        }
        if self.slots.len() - self.ours < self.side.peer().limit(urgent) {
            self.slots.insert(id, Slot::new(Opening::Asked));
            return Ok(Some(Asked { id, port }));
        }
        if self.refusals.len() >= REFUSALS {
            return Err(Violation);
        }
        self.refusals.push_back(id);
        Ok(None)
    }

    /// Puts credits and resets that are due into the output, as far as there is room.
    pub(crate) fn put_due(&mut self) {
        while self.output.len() < BACKLOG + CONTROL {
            if let Some(id) = self.refusals.pop_front() {
                self.output.put(Frame::Reset { id, reason: Reason::Busy });
            } else if let Some(id) = self.due.pop_front() {
                self.put_due_of(id);
            } else {
                break;
            }
        }
    }

    fn put_due_of(&mut self, id: Id) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.due = false;
        if let Some(reason) = slot.left {
            self.output.put(Frame::Reset { id, reason });
            return self.remove(id);
        }
        if slot.finished || slot.reset.is_some() {
            return;
        }
        let mut bytes = std::mem::take(&mut slot.consumed);
        // A reader that has kept up with half a window would wait for the peer, which waits for credit; so it gets a large window.
        if slot.received.is_empty() && slot.size == WINDOW && self.large < MAX_LARGE {
            self.large += 1;
            slot.size = LARGE_WINDOW;
            bytes += LARGE_WINDOW - WINDOW;
        }
        slot.window += bytes;
        // The credit is at most a large window, so it fits.
        self.output.put(Frame::Credit { id, bytes: u32::try_from(bytes).unwrap_or(u32::MAX) });
    }

    /// Records that `n` bytes of the output have been sent.
    pub(crate) fn left(&mut self, n: usize) {
        let slots = &mut self.slots;
        self.output.left(n, |id, bytes| {
            if let Some(slot) = slots.get_mut(&id) {
                slot.unsent -= bytes.min(slot.unsent);
                if slot.unsent < SHARE {
                    slot.wake_writer();
                }
            }
        });
        // Waiting streams are woken only when there is ample room, because each of them tries again.
        if self.output.len() < BACKLOG / 2 {
            for id in std::mem::take(&mut self.waiting) {
                if let Some(slot) = self.slots.get_mut(&id) {
                    slot.waiting = false;
                    slot.wake_writer();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAMS: usize = MAX_STREAMS + MAX_GUEST_STREAMS + 2 * RESERVE;
    /// The memory that the output may take: its limit and a frame, in a buffer that doubles, with a record for every data frame.
    const OUTPUT: usize = 8 << 20;

    /// An event of a host's session: the peer says something, a user does something, or some output leaves.
    #[derive(Clone, Debug)]
    enum Event {
        Says(Frame),
        Opens,
        Accepts(Id),
        Reads(Id, usize),
        Writes(Id, usize),
        Shuts(Id),
        Leaves(Id),
        Sends(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        // Only a few streams, so that much happens to each.
        let id = 0u32..24;
        let reason = prop_oneof![Just(Reason::Dropped), Just(Reason::Refused), Just(Reason::Busy)];
        let size = prop_oneof![1usize..50, 1usize..MAX_DATA];
        let credit = prop_oneof![1u32..100, Just(131_072), any::<u32>()];
        let says = prop_oneof![
            (id.clone(), any::<u32>(), any::<bool>()).prop_map(|(id, port, urgent)| Frame::Open { id, port, urgent }),
            id.clone().prop_map(|id| Frame::Accept { id }),
            (id.clone(), size.clone()).prop_map(|(id, length)| Frame::Data { id, length }),
            (id.clone(), credit).prop_map(|(id, bytes)| Frame::Credit { id, bytes }),
            id.clone().prop_map(|id| Frame::Finish { id }),
            (id.clone(), reason).prop_map(|(id, reason)| Frame::Reset { id, reason }),
        ];
        prop_oneof![
            6 => says.prop_map(Event::Says),
            2 => Just(Event::Opens),
            1 => id.clone().prop_map(Event::Accepts),
            2 => (id.clone(), size.clone()).prop_map(|(id, n)| Event::Reads(id, n)),
            2 => (id.clone(), size.clone()).prop_map(|(id, n)| Event::Writes(id, n)),
            1 => id.clone().prop_map(Event::Shuts),
            1 => id.prop_map(Event::Leaves),
            1 => size.prop_map(Event::Sends),
        ]
    }

    /// Applies the event, as far as a user could: only to streams that the user holds.
    fn happen(mux: &mut Mux, event: &Event, cx: &Context<'_>) -> Result<(), Violation> {
        let held = |mux: &Mux, id: &Id| mux.slots.get(id).is_some_and(|slot| slot.left.is_none());
        let open = |mux: &Mux, id: &Id| held(mux, id) && mux.slots[id].opening == Opening::Accepted;
        match event {
            Event::Says(frame @ Frame::Data { length, .. }) => {
                mux.take(*frame, &vec![1; *length])?;
            }
            Event::Says(frame) => {
                mux.take(*frame, &[])?;
            }
            Event::Opens => {
                if let Ok(id) = mux.place(false) {
                    let _ = mux.poll_ask(id, 1, false, cx);
                }
            }
            Event::Accepts(id) if held(mux, id) && !mux.side.opened(*id) => drop(mux.poll_accept(*id, cx)),
            Event::Reads(id, n) if open(mux, id) => {
                drop(mux.poll_read(*id, &mut ReadBuf::new(&mut vec![0; *n]), cx));
            }
            Event::Writes(id, n) if open(mux, id) => drop(mux.poll_write(*id, &vec![2; *n], cx)),
            Event::Shuts(id) if open(mux, id) => drop(mux.poll_shut(*id, cx)),
            Event::Leaves(id) if held(mux, id) => mux.leave(*id, Reason::Dropped),
            Event::Sends(n) => {
                mux.put_due();
                let n = (*n).min(mux.output.front().len());
                mux.left(n);
            }
            _ => {}
        }
        Ok(())
    }

    proptest! {
        /// After any events in any order the accounts agree and no limit is exceeded.
        #[test]
        fn accounts_are_kept(events in prop::collection::vec(event(), 1..400)) {
            let cx = Context::from_waker(Waker::noop());
            let mut mux = Mux::new(Side::Host, Vec::new());
            for event in events {
                // A violation, which would end the session, is ignored to go on.
                let _ = happen(&mut mux, &event, &cx);
                for (id, slot) in &mux.slots {
                    prop_assert_eq!(slot.window + slot.received.len() + slot.consumed, slot.size, "{} after {:?}", id, event);
                    prop_assert!(slot.size == WINDOW || slot.size == LARGE_WINDOW);
                    prop_assert!(slot.credit <= LARGE_WINDOW && slot.received.capacity() <= slot.size);
                    prop_assert!(slot.unsent < SHARE + MAX_DATA + 100);
                    prop_assert_eq!(slot.due, mux.due.contains(id));
                    prop_assert_eq!(slot.waiting, mux.waiting.contains(id));
                }
                prop_assert!(mux.due.len() <= mux.slots.len() && mux.waiting.len() <= mux.slots.len());
                prop_assert_eq!(mux.large, mux.slots.values().filter(|slot| slot.size == LARGE_WINDOW).count());
                prop_assert!(mux.large <= MAX_LARGE);
                prop_assert_eq!(mux.ours, mux.slots.keys().filter(|id| Side::Host.opened(**id)).count());
                prop_assert!(mux.refusals.len() <= REFUSALS && mux.slots.len() <= STREAMS);
                prop_assert!(mux.output.len() <= BACKLOG + CONTROL + MAX_DATA + 100);
                prop_assert!(mux.held() <= OUTPUT + STREAMS * (WINDOW + 1000) + MAX_LARGE * (LARGE_WINDOW - WINDOW));
            }
        }
    }
}
