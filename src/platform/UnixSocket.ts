import * as net from "node:net"
import { Deferred, Effect, Option, type Scope, Stream } from "effect"

/** Longest socket path in bytes: sun_path holds 108 bytes with the final NUL (unix(7)). */
export const maxPath = 107

/**
 * A connection with backpressure both ways. Closed with its scope. Failures are Node's system errors (`code` ECONNREFUSED, ENOENT,
 * EPIPE, ...), because only the caller knows what they mean.
 */
export interface Connection {
  /** The next bytes that the peer sends, as they arrive; `None` at the end of file. Reads nothing ahead of the caller. */
  readonly read: Effect.Effect<Uint8Array, Option.Option<NodeJS.ErrnoException>>
  /** All bytes up to the end of file, by `read`. */
  readonly bytes: Stream.Stream<Uint8Array, NodeJS.ErrnoException>
  /** Writes bytes. Completes when the kernel or Node's queue has room for more. */
  readonly write: (bytes: Uint8Array) => Effect.Effect<void, NodeJS.ErrnoException>
  /** Half-closes the connection: the peer reads to the end of file, and this side can still read. */
  readonly end: Effect.Effect<void>
  /** The socket itself, to be handed to a child process, which goes on where this process has stopped reading and writing. */
  readonly socket: net.Socket
}

const destroy = (socket: net.Socket) => Effect.sync(() => socket.destroy())

/** A connection around any Node socket. The caller closes the socket. */
export const fromSocket = (socket: net.Socket): Connection => {
  let failure: NodeJS.ErrnoException | undefined
  socket.on("error", (error) => {
    failure = error
  })
  const next = read(socket, () => failure)
  return {
    read: next,
    bytes: Stream.repeatEffectOption(next),
    write: (bytes) =>
      Effect.async((resume) => {
        if (failure !== undefined || socket.destroyed || socket.writableEnded) {
          return resume(Effect.fail(failure ?? closed()))
        }
        if (socket.write(bytes)) return resume(Effect.void)
        const settle = () => {
          socket.off("drain", settle).off("close", settle)
          resume(socket.destroyed ? Effect.fail(failure ?? closed()) : Effect.void)
        }
        socket.on("drain", settle).on("close", settle)
        return Effect.sync(() => socket.off("drain", settle).off("close", settle))
      }),
    end: Effect.sync(() => void socket.end()),
    socket
  }
}

const closed = () => Object.assign(new Error("the connection is closed"), { code: "EPIPE" })

/** The same connection, with `bytes` given to the reader first: they were read too far. */
export const unread = (connection: Connection, bytes: Uint8Array): Connection => {
  let rest = bytes
  const read = Effect.suspend(() => {
    if (rest.length === 0) return connection.read
    const first = rest
    rest = new Uint8Array(0)
    return Effect.succeed(first)
  })
  return { ...connection, read, bytes: Stream.repeatEffectOption(read) }
}

/**
 * Reads the bytes that have arrived, or waits for the next. One read at a time. The reading fiber takes the bytes itself, so an interrupted
 * read loses none and has nothing to undo. The listeners stay from the first read on. With listeners or a finalizer for each read, the garbage
 * of one read would hold that of the next until a full collection (50 MiB for each GiB read, measured with --trace-gc).
 */
const read = (socket: net.Socket, failure: () => NodeJS.ErrnoException | undefined) => {
  let wake: (() => void) | undefined
  const listen = () => {
    const call = () => wake?.()
    socket.on("readable", call).on("end", call).on("close", call)
  }
  const take: Connection["read"] = Effect.suspend(() => {
    const chunk: Buffer | null = socket.read()
    if (chunk !== null) return Effect.succeed(chunk)
    const error = failure()
    if (error !== undefined) return Effect.fail(Option.some(error))
    return socket.readableEnded || socket.destroyed ? Effect.fail(Option.none()) : next
  })
  const next: Connection["read"] = Effect.async((resume) => {
    if (wake === undefined) listen()
    wake = () => resume(take)
  })
  return take
}

/** Connects to a listening unix socket. Can be interrupted only where the caller can be. Fails with Node's error (ENOENT, ECONNREFUSED, ...). */
export const connect = (path: string): Effect.Effect<Connection, NodeJS.ErrnoException, Scope.Scope> =>
  acquire(
    Effect.async<net.Socket, NodeJS.ErrnoException>((resume) => {
      const socket = net.connect({ path, allowHalfOpen: true })
      const fail = (error: Error) => resume(Effect.fail(error))
      socket.once("error", fail)
      socket.once("connect", () => {
        socket.off("error", fail)
        resume(Effect.succeed(socket))
      })
      return destroy(socket)
    })
  )

/** A socket that the scope destroys. Waiting for it can be interrupted only where the caller can be. */
const acquire = <E>(waiting: Effect.Effect<net.Socket, E>): Effect.Effect<Connection, E, Scope.Scope> =>
  Effect.uninterruptibleMask((restore) =>
    restore(waiting).pipe(
      Effect.tap((socket) => Effect.addFinalizer(() => destroy(socket))),
      Effect.map(fromSocket)
    )
  )

/**
 * Listens on a path. The inner effect gives the first connection, also one that came before the effect was run; later ones are refused.
 * Closing the scope removes the socket file, and closes a first connection that was never taken.
 */
export const listenOnce = (
  path: string
): Effect.Effect<Effect.Effect<Connection, NodeJS.ErrnoException, Scope.Scope>, NodeJS.ErrnoException, Scope.Scope> =>
  Effect.gen(function* () {
    const first = yield* Deferred.make<net.Socket>()
    yield* Effect.acquireRelease(
      Effect.async<net.Server, NodeJS.ErrnoException>((resume) => {
        const server = net.createServer({ allowHalfOpen: true, pauseOnConnect: true })
        server.once("error", (error) => resume(Effect.fail(error)))
        server.once("connection", (socket) => {
          server.close()
          // a reset before the first read is no event then: the reader finds the end of file
          socket.on("error", () => {})
          Deferred.unsafeDone(first, Effect.succeed(socket))
        })
        server.listen(path, () => resume(Effect.succeed(server)))
      }),
      (server) =>
        Effect.flatMap(Deferred.poll(first), (arrived) => {
          server.close()
          return Option.isSome(arrived) ? Effect.flatMap(arrived.value, destroy) : Effect.void
        })
    )
    return acquire(Deferred.await(first))
  })
