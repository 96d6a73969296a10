import { Effect, Option, type Scope, Stream } from "effect"
import { type Connection, unread } from "./UnixSocket.ts"

/**
 * Reads the first line from a connection. Returns it, and the connection from behind the line. Fails with `ended` when the peer ends before the
 * line does, and with `tooLong` after more than `maxBytes` without a newline.
 */
export const firstLine = <E>(
  connection: Connection,
  failures: { readonly ended: () => E; readonly maxBytes?: number; readonly tooLong?: () => E }
): Effect.Effect<{ readonly line: string; readonly after: Connection }, E | NodeJS.ErrnoException> =>
  Effect.gen(function* () {
    const { ended, maxBytes = Number.POSITIVE_INFINITY, tooLong = ended } = failures
    let head = Buffer.alloc(0)
    while (!head.includes("\n")) {
      if (head.length > maxBytes) return yield* Effect.fail(tooLong())
      const piece = yield* Effect.mapError(connection.read, Option.getOrElse<E | NodeJS.ErrnoException>(ended))
      head = Buffer.concat([head, piece])
    }
    const at = head.indexOf("\n")
    return { line: head.subarray(0, at).toString(), after: unread(connection, head.subarray(at + 1)) }
  })

/** Reads a connection line by line: each run of the inner effect returns the next line. Fails with `None` at the end of file. */
export const lineByLine = (
  connection: Connection
): Effect.Effect<Effect.Effect<string, Option.Option<NodeJS.ErrnoException>>, never, Scope.Scope> =>
  Effect.map(
    Stream.toPull(connection.bytes.pipe(Stream.decodeText(), Stream.splitLines, Stream.rechunk(1))),
    Effect.map(([line = ""]) => line)
  )
