//! The bytes that an end has to send: whole frames in order, with the stream that each byte belongs to.

use crate::frame::{self, DATA_OVERHEAD, Frame, HEAD, Id, MAX_DATA};
use std::collections::VecDeque;

/// How many bytes an idle session keeps allocated for the next burst.
const KEEP: usize = 256 * 1024;

/// The bytes that have not been sent yet.
#[derive(Debug, Default)]
pub(crate) struct Output {
    bytes: VecDeque<u8>,
    /// How many bytes were sent before those.
    sent: u64,
    /// The data frames among the unsent bytes, oldest first.
    data: VecDeque<Data>,
    /// Whether the last of `data` is the last frame and may still grow: its length and its end byte are not written yet.
    growing: bool,
}

#[derive(Debug)]
struct Data {
    id: Id,
    /// The position of its end, counted from the session's first byte.
    end: u64,
    payload: usize,
    /// How many bytes the frame has added to the output: payload and overhead.
    bytes: usize,
}

impl Output {
    /// An output that begins with `first`, bytes that are no frames.
    pub(crate) fn new(first: Vec<u8>) -> Self {
        Output { bytes: first.into(), ..Output::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// How many bytes of memory are held.
    pub(crate) fn held(&self) -> usize {
        self.bytes.capacity() + self.data.capacity() * size_of::<Data>()
    }

    /// Appends a frame that carries no data.
    pub(crate) fn put(&mut self, frame: Frame) {
        self.complete();
        frame::put(&mut self.bytes, frame);
    }

    /// Appends data frames, and fills up the last frame first if it is this stream's. Returns how many bytes the output has grown by.
    pub(crate) fn put_data(&mut self, id: Id, mut payload: &[u8]) -> usize {
        let mut more = payload.len();
        while !payload.is_empty() {
            if !self.growing || self.data.back().is_none_or(|last| last.id != id) {
                self.complete();
                frame::put_data_head(&mut self.bytes, id, 0);
                self.data.push_back(Data { id, end: 0, payload: 0, bytes: DATA_OVERHEAD });
                self.growing = true;
                more += DATA_OVERHEAD;
            }
            let Some(last) = self.data.back_mut() else { break };
            let (now, later) = payload.split_at(payload.len().min(MAX_DATA - last.payload));
            self.bytes.extend(now);
            last.payload += now.len();
            last.bytes += now.len();
            if last.payload == MAX_DATA {
                self.complete();
            }
            payload = later;
        }
        more
    }

    /// Completes the last frame. Only then may its bytes be sent.
    pub(crate) fn complete(&mut self) {
        if !std::mem::take(&mut self.growing) {
            return;
        }
        frame::put_end(&mut self.bytes);
        let Some(last) = self.data.back_mut() else { return };
        let start = self.bytes.len() - DATA_OVERHEAD - last.payload;
        for (at, byte) in frame::data_length(last.payload).into_iter().enumerate() {
            self.bytes[start + HEAD - 4 + at] = byte;
        }
        last.end = self.sent + self.bytes.len() as u64;
    }

    /// The next bytes to send.
    pub(crate) fn front(&mut self) -> &[u8] {
        self.complete();
        self.bytes.as_slices().0
    }

    /// Records that `n` bytes have been sent. Calls `freed` for each data frame that has been sent whole, with its stream and its length.
    pub(crate) fn left(&mut self, n: usize, mut freed: impl FnMut(Id, usize)) {
        self.bytes.drain(..n);
        self.sent += n as u64;
        while let Some(first) = self.data.front()
            && first.end <= self.sent
            && first.end > 0
        {
            freed(first.id, first.bytes);
            self.data.pop_front();
        }
        if self.bytes.is_empty() && self.bytes.capacity() > KEEP {
            self.bytes.shrink_to(KEEP);
        }
    }

    /// All unsent bytes.
    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        self.complete();
        self.bytes.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Found, decode};
    use proptest::prelude::*;

    proptest! {
        /// However data is put and sent, the frames carry it in order, and every stream gets back all the room it took.
        #[test]
        fn frames_come_out_as_they_went_in(
            puts in prop::collection::vec((0u32..3, 0usize..100_000, any::<bool>()), 1..30),
            cut in 1usize..70_000,
        ) {
            let (mut output, mut taken, mut expected, mut received) = (Output::default(), [0; 3], [0usize; 3], [0usize; 3]);
            let mut bytes = Vec::new();
            for (id, length, send) in puts {
                taken[id as usize] += output.put_data(id, &vec![7; length]);
                expected[id as usize] += length;
                if length % 3 == 0 {
                    output.put(Frame::Credit { id, bytes: 1 });
                }
                while send && output.len() > 0 {
                    let n = output.front().len().min(cut);
                    bytes.extend_from_slice(&output.front()[..n]);
                    output.left(n, |id, n| taken[id as usize] -= n);
                }
            }
            while output.len() > 0 {
                let n = output.front().len();
                bytes.extend_from_slice(output.front());
                output.left(n, |id, n| taken[id as usize] -= n);
            }
            prop_assert_eq!(taken, [0; 3]);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let Found::Frame(frame, length) = decode(rest) else { panic!("{:?}", decode(rest)) };
                if let Frame::Data { id, length } = frame {
                    received[id as usize] += length;
                }
                rest = &rest[length..];
            }
            prop_assert_eq!(received, expected);
        }
    }
}
