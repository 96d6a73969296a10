import * as NodeStream from "@effect/platform-node/NodeStream"
import { Effect, type Scope, Stream } from "effect"

/** What the program is given on stdin. Reading stops with the scope, so that an idle terminal does not keep the program alive. */
export const stdin: Effect.Effect<Stream.Stream<Uint8Array>, never, Scope.Scope> = Effect.acquireRelease(
  Effect.sync(() => process.stdin),
  (input) => Effect.sync(() => void input.destroy())
).pipe(
  // not by its async iterator: that one cannot be interrupted while it waits for input
  Effect.map((input) =>
    NodeStream.fromReadable<unknown, Uint8Array>(
      () => input,
      (error) => error
    )
  ),
  Effect.map(Stream.orElse(() => Stream.empty))
)

// A reader that is gone is told by the failed write; without a listener the same error would end the process.
for (const channel of ["stdout", "stderr"] as const) process[channel].on("error", () => {})

/** Writes with the backpressure of the pipe or terminal behind it; fails when nobody reads any more (`| head`). */
export const write =
  (channel: "stdout" | "stderr") =>
  (bytes: Uint8Array | string): Effect.Effect<void, NodeJS.ErrnoException> =>
    Effect.async((resume) => {
      process[channel].write(bytes, (error) => resume(error == null ? Effect.void : Effect.fail(error)))
    })

/** Waits until what was written has left the process. */
export const flush: Effect.Effect<void> = Effect.ignore(Effect.zip(write("stdout")(""), write("stderr")("")))
