import * as net from "node:net"
import { Effect, Queue, type Scope } from "effect"
import { type Connection, fromSocket } from "./UnixSocket.ts"

/** A client's connection. It is closed with its scope, and then at once: who wants what was written to arrive runs `finish` before. */
export interface Client extends Connection {
  /** Half-close; completes when everything has been handed to the kernel. */
  readonly finish: Effect.Effect<void>
  /** Tells the client that this was no orderly end. */
  readonly reset: Effect.Effect<void>
}

export interface TcpListener {
  readonly address: string
  readonly port: number
  /** Waits for the next client, which is the caller's from then on. */
  readonly accept: Effect.Effect<Client, never, Scope.Scope>
}

/** Clients that are served at one time; more are turned away. */
const maxClients = 256

/** Listens on an address of this host; port 0: on one that is free. Clients that nobody has accepted are closed with the scope. */
export const listen = (host: string, port: number): Effect.Effect<TcpListener, NodeJS.ErrnoException, Scope.Scope> =>
  Effect.gen(function* () {
    const arrived = yield* Queue.unbounded<net.Socket>()
    const server = yield* Effect.acquireRelease(
      Effect.async<net.Server, NodeJS.ErrnoException>((resume) => {
        const server = net.createServer({ allowHalfOpen: true, pauseOnConnect: true, noDelay: true })
        server.maxConnections = maxClients
        server.once("error", (error) => resume(Effect.fail(error)))
        server.on("connection", (socket) => {
          // until it is accepted: without a listener an error would end the process
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
