import { Effect, Option, Stream } from "effect"
import { ExecError } from "../errors.ts"

type Next<A> = Effect.Effect<A, Option.Option<ExecError>>

/** Bytes of output that are kept for a reader that begins after `exit` was asked for. */
const maxUnread = 1024 * 1024

/**
 * Output that may be read or not. `drained` reads it while no reader does, so that its end comes. A reader that begins later first gets the bytes
 * that were kept; when a reader leaves, `drained` goes on. `over` says that the output has ended or failed.
 */
export const drainable = Effect.fnUntraced(function* <A extends { readonly bytes: Uint8Array }>(
  next: Next<A>,
  over: Effect.Effect<boolean>,
  ended: Effect.Effect<unknown, ExecError>
) {
  const turns = yield* Effect.makeSemaphore(1)
  const unread = yield* Effect.makeLatch(true)
  const kept: Array<A> = []
  let [isRead, isDraining, isCut, bytes] = [false, false, false, 0]
  const dropped = new ExecError({
    code: "EXEC_OUTPUT_TOO_LARGE",
    message: `nobody read the command's output while its end was awaited, and only ${maxUnread} bytes of it were kept`,
    hint: "begin to read `output` before `exit` is awaited"
  })
  const keep = (piece: A) => {
    isCut = isCut || bytes + piece.bytes.length > maxUnread
    if (isCut) return
    bytes += piece.bytes.length
    kept.push({ ...piece, bytes: Buffer.from(piece.bytes) })
  }
  const afterKept: Next<A> = Effect.suspend(() => {
    const first = kept.shift()
    if (first !== undefined) return Effect.succeed(first)
    if (isCut) return Effect.fail(Option.some(dropped))
    const end = Effect.zipRight(Effect.mapError(ended, Option.some), Effect.fail(Option.none()))
    return Effect.if(over, { onTrue: () => end, onFalse: () => next })
  })
  const piece: Next<A> = Effect.suspend(() => {
    isRead = true
    return isDraining ? turns.withPermits(1)(afterKept) : next
  })
  const turn = turns.withPermits(1)(
    Effect.if(over, {
      onTrue: () => Effect.fail(Option.none()),
      onFalse: () => (isRead ? Effect.void : Effect.map(next, keep))
    })
  )
  const drained = Effect.suspend(() => {
    isDraining = true
    // the operation's result says why the output ended
    return Effect.ignore(Effect.forever(unread.whenOpen(turn)))
  }).pipe(Effect.unlessEffect(over))
  const output = Stream.unwrap(Effect.as(unread.close, Stream.repeatEffectOption(piece))).pipe(
    Stream.ensuring(
      Effect.zipRight(
        Effect.sync(() => {
          isRead = false
        }),
        unread.open
      )
    )
  )
  return { drained, output, piece }
})
