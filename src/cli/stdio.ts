import { Effect, type Scope, Stream } from "effect"

/** What the program is given on stdin. Reading stops with the scope, so that an idle terminal does not keep the program alive. */
export const stdin: Effect.Effect<Stream.Stream<Uint8Array>, never, Scope.Scope> = Effect.acquireRelease(
  Effect.sync(() => process.stdin),
  (input) => Effect.sync(() => void input.destroy())
).pipe(
  Effect.map((input) =>
    Stream.fromAsyncIterable<Uint8Array, unknown>(input, (error) => error).pipe(Stream.orElse(() => Stream.empty))
  )
)

/** Writes with the backpressure of the pipe or terminal behind it; fails when nobody reads any more (`| head`). */
export const write =
  (channel: "stdout" | "stderr") =>
  (bytes: Uint8Array | string): Effect.Effect<void, NodeJS.ErrnoException> =>
    Effect.async((resume) => {
      process[channel].write(bytes, (error) => resume(error == null ? Effect.void : Effect.fail(error)))
    })

/** Waits until what was written has left the process. */
export const flush: Effect.Effect<void> = Effect.ignore(Effect.zip(write("stdout")(""), write("stderr")("")))
