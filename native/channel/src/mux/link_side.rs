//! Frames from the peer and to the peer.

use super::{Asked, BACKLOG, CONTROL, Mux, Opening, REFUSALS, SHARE, Slot, Violation};
use crate::frame::{Frame, Id, Reason};
use crate::limits::{LARGE_WINDOW, MAX_LARGE, WINDOW};

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
