//! What the users of streams do.

use super::{BACKLOG, Mux, Opening, SHARE, Slot, reset};
use crate::frame::{Frame, Id, MAX_DATA, Reason};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::task::{Context, Poll};
use tokio::io::ReadBuf;

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
