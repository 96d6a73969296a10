//! Tests of the accounts of a session's streams.

use super::*;
use crate::frame::MAX_DATA;
use crate::limits::MAX_LARGE;
use proptest::prelude::*;
use tokio::io::ReadBuf;

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
