import * as net from "node:net"
import { Effect, Queue, type Scope } from "effect"
import { type Connection, fromSocket } from "./UnixSocket.ts"

/** A client's connection. Closing its scope closes it at once, with bytes that were not sent yet; run `finish` before to have them sent. */
export interface Client extends Connection {
  /** Half-closes the connection. Completes when all bytes have been handed to the kernel. */
  readonly finish: Effect.Effect<void>
  /** Resets the connection (RST), which tells the client that this was no orderly end. */
  readonly reset: Effect.Effect<void>
}

export interface TcpListener {
  readonly address: string
  readonly port: number
  /** Waits for the next client. The connection belongs to the caller's scope. */
  readonly accept: Effect.Effect<Client, never, Scope.Scope>
}

/** Clients that may be connected at once. Node closes further ones. */
const maxClients = 256

/**
 * Listens on an address of this host; port 0 takes a free port. Closing the scope closes the listener and the clients that were not
 * accepted. Fails with Node's error (EADDRINUSE, EACCES, ...).
 */
export const listen = (host: string, port: number): Effect.Effect<TcpListener, NodeJS.ErrnoException, Scope.Scope> =>
  Effect.gen(function* () {
    const arrived = yield* Queue.unbounded<net.Socket>()
    const server = yield* Effect.acquireRelease(
      Effect.async<net.Server, NodeJS.ErrnoException>((resume) => {
        const server = net.createServer({ allowHalfOpen: true, pauseOnConnect: true, noDelay: true })
        server.maxConnections = maxClients
        server.once("error", (error) => resume(Effect.fail(error)))
        server.on("connection", (socket) => {
          // before the client is accepted nobody listens for its errors, and an error without a listener would end this process
          socket.on("error", () => {})
          arrived.unsafeOffer(socket)
        })
        server.listen({ host, port }, () => resume(Effect.succeed(server)))
      }),
      (server) =>
        Effect.gen(function* () {
          server.close()
          for (const socket of yield* Queue.takeAll(arrived)) socket.destroy()
        })
    )
    const bound = server.address()
    if (bound === null || typeof bound === "string") return yield* Effect.dieMessage("a TCP server without an address")
    const listener: TcpListener = {
      address: bound.address,
      port: bound.port,
      accept: Effect.acquireRelease(Effect.interruptible(Queue.take(arrived)), (socket) =>
        Effect.sync(() => socket.destroy())
      ).pipe(Effect.map(toClient))
    }
    return listener
  })

const toClient = (socket: net.Socket): Client => ({
  ...fromSocket(socket),
  finish: Effect.async((resume) => {
    if (socket.destroyed) return resume(Effect.void)
    const done = () => resume(Effect.void)
    socket.once("close", done).end(done)
  }),
  reset: Effect.sync(() => void socket.resetAndDestroy())
})
