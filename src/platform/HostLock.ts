import { createHash } from "node:crypto"
import * as net from "node:net"
import { Effect } from "effect"

/** A name in the kernel's abstract socket namespace (unix(7)): it has no file, and vanishes with the process that bound it. */
const address = (key: string) => `\0machinen-${createHash("sha256").update(key).digest("hex").slice(0, 32)}`

interface Held {
  readonly server: net.Server
  /** Connections of those who wait; cutting them tells them to try again. */
  readonly waiters: Set<net.Socket>
}

const bind = (key: string): Effect.Effect<Held | "taken"> =>
  Effect.async((resume) => {
    const waiters = new Set<net.Socket>()
    const server = net.createServer((socket) => {
      waiters.add(socket)
      socket.on("error", () => {})
      socket.on("close", () => waiters.delete(socket))
    })
    server.once("error", () => resume(Effect.succeed("taken")))
    server.listen(address(key), () => resume(Effect.succeed({ server, waiters })))
  })

const release = ({ server, waiters }: Held): Effect.Effect<void> =>
  Effect.async((resume) => {
    for (const socket of waiters) socket.destroy()
    server.close(() => resume(Effect.void))
  })

/** Completes when the holder lets go or dies: its end closes our connection. */
const holderGone = (key: string): Effect.Effect<void> =>
  Effect.async((resume) => {
    const socket = net.connect(address(key))
    socket.once("error", () => resume(Effect.void))
    socket.once("close", () => resume(Effect.void))
    socket.resume()
    return Effect.sync(() => socket.destroy())
  })

const acquire = (key: string): Effect.Effect<Held> =>
  Effect.flatMap(bind(key), (got) =>
    got === "taken"
      ? Effect.zipRight(
          holderGone(key),
          Effect.suspend(() => acquire(key))
        )
      : Effect.succeed(got)
  )

/**
 * Runs an effect while no other process on this host runs one under the same key. Waiting is an event, not a poll, and a holder that is
 * killed holds nothing.
 */
export const withLock =
  (key: string) =>
  <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
    // acquire runs uninterruptibly; the wait for another holder must opt back in
    Effect.acquireUseRelease(Effect.interruptible(acquire(key)), () => effect, release)
