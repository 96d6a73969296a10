import * as path from "node:path"
import { Chunk, Effect, ExecutionStrategy, Exit, Option, Scope, Stream } from "effect"
import { type ExecError, TunnelError } from "../errors.ts"
import { showAddress, showTarget, type TunnelMapping, type TunnelTarget } from "../machine/TunnelAddress.ts"
import { given } from "../platform/given.ts"
import { portHolder } from "../platform/portHolder.ts"
import * as TcpListener from "../platform/TcpListener.ts"
import { encodeFrame, type Frame, FrameType, pieces } from "./AgentProtocol.ts"
import type { AgentRefusal } from "./agentErrors.ts"
import type { Operations } from "./operation.ts"

/** A connection to a listener in the guest. Closing the scope before the connection's end resets the connection in the guest. */
export interface TunnelConnection {
  /** Bytes from the guest, up to its end of file. May be run once. */
  readonly bytes: Stream.Stream<Uint8Array, TunnelError>
  /** Sends bytes. Completes when the channel takes more. */
  readonly write: (bytes: Uint8Array) => Effect.Effect<void, TunnelError>
  /** Half-closes the connection: the guest reads to the end of file, and this side can still read. */
  readonly end: Effect.Effect<void>
  /** After the end of `bytes`: completes when the guest's listener has received everything that was written, up to `end`. */
  readonly finished: Effect.Effect<void, TunnelError>
}

/** A port of this host that is forwarded into a guest. */
export interface TunnelListener {
  readonly hostAddress: string
  readonly hostPort: number
  readonly guest: TunnelTarget
}

/** Connections into a guest over the private channel. The VM needs no network for them. Failures are TUNNEL_* errors. */
export interface Tunnels {
  /** Connects to a listener in the guest. Fails with TUNNEL_REFUSED when nothing listens there. */
  readonly connect: (guest: TunnelTarget) => Effect.Effect<TunnelConnection, TunnelError, Scope.Scope>
  /**
   * Listens on the host until the scope closes. Each client has a stream of its own. A client that the guest refuses is reset; the others are not
   * affected.
   */
  readonly tunnel: (mapping: TunnelMapping) => Effect.Effect<TunnelListener, TunnelError, Scope.Scope>
}

export const make = ({ operate }: Operations): Tunnels => {
  const connect = Effect.fn("Agent.connect")(function* (guest: TunnelTarget) {
    yield* checkTarget(guest)
    const operation = yield* Effect.mapError(operate({ op: "tunnel", to: guest }), toTunnelError(guest))
    const pull = yield* Stream.toPull(operation.frames)
    const next = Effect.mapError(pull, Option.map(toTunnelError(guest)))
    let ended = false
    const data = (frames: Chunk.Chunk<Frame>) => {
      ended = Chunk.some(frames, ({ type }) => type === FrameType.eof)
      return Chunk.filterMap(frames, ({ payload, type }) =>
        type === FrameType.data ? Option.some(payload) : Option.none()
      )
    }
    const connection: TunnelConnection = {
      bytes: Stream.repeatEffectChunkOption(
        Effect.suspend(() => (ended ? Effect.fail(Option.none()) : Effect.map(next, data)))
      ),
      write: (bytes) =>
        Effect.forEach(pieces(bytes), (piece) => operation.send(encodeFrame(FrameType.data, piece)), {
          discard: true
        }).pipe(Effect.mapError((cause) => broken(guest, cause))),
      end: Effect.ignore(operation.send(encodeFrame(FrameType.eof, new Uint8Array(0)))),
      finished: Effect.catchAll(
        Effect.forever(next),
        Option.match({ onNone: () => Effect.void, onSome: (error) => Effect.fail(error) })
      )
    }
    return connection
  })

  /** Copies both directions, each at the pace of its reader, until both have ended. */
  const carry = (client: TcpListener.Client, guest: TunnelTarget) =>
    Effect.gen(function* () {
      const connection = yield* connect(guest)
      const inwards = Effect.zipRight(Stream.runForEach(client.bytes, connection.write), connection.end)
      const outwards = Stream.runForEach(connection.bytes, client.write).pipe(
        Effect.zipRight(client.finish),
        Effect.zipRight(connection.finished)
      )
      yield* Effect.all([inwards, outwards], { concurrency: 2, discard: true })
    }).pipe(
      Effect.scoped,
      Effect.tapError((error) => Effect.logDebug("a tunnel's connection broke", error)),
      Effect.onExit((exit) => (Exit.isSuccess(exit) ? Effect.void : client.reset)),
      Effect.ignore
    )

  const tunnel = Effect.fn("Agent.tunnel")(function* (mapping: TunnelMapping) {
    const { guest, hostAddress = "127.0.0.1", hostPort = 0 } = mapping
    yield* checkTarget(guest)
    if (!isPort(hostPort) && hostPort !== 0) return yield* notPort(hostPort)
    const listener = yield* Effect.catchAll(TcpListener.listen(hostAddress, hostPort), (cause) =>
      cannotListen(hostAddress, hostPort, cause)
    )
    const all = yield* Effect.scope
    const serveNext = Effect.gen(function* () {
      const one = yield* Scope.fork(all, ExecutionStrategy.sequential)
      const client = yield* Scope.extend(listener.accept, one)
      yield* Effect.forkIn(
        Effect.onExit(carry(client, guest), (exit) => Scope.close(one, exit)),
        all
      )
    })
    yield* Effect.forkIn(Effect.forever(serveNext), all)
    const started: TunnelListener = { hostAddress: listener.address, hostPort: listener.port, guest }
    return started
  })

  return { connect, tunnel }
}

const isPort = (port: number) => Number.isSafeInteger(port) && port >= 1 && port <= 65535

const checkTarget = (guest: TunnelTarget): Effect.Effect<void, TunnelError> => {
  if ("port" in guest) return isPort(guest.port) ? Effect.void : notPort(guest.port)
  return path.posix.isAbsolute(guest.path) && !guest.path.includes("\0")
    ? Effect.void
    : new TunnelError({
        code: "TUNNEL_TARGET_INVALID",
        message: `${JSON.stringify(guest.path)} is not the absolute path of a socket in the guest`,
        hint: "begin it with `/`"
      })
}

const notPort = (port: number) =>
  new TunnelError({
    code: "TUNNEL_TARGET_INVALID",
    message: `${port} is not a port`,
    hint: "give a whole number from 1 to 65535"
  })

const cannotListen = Effect.fnUntraced(function* (host: string, port: number, cause: NodeJS.ErrnoException) {
  const shown = showAddress(host, port)
  if (cause.code === "EADDRINUSE") {
    const holder = Option.match(yield* portHolder(port), {
      onNone: () => "",
      onSome: ({ command, pid }) => ` by ${command} (pid ${pid})`
    })
    return yield* new TunnelError({
      code: "TUNNEL_PORT_IN_USE",
      message: `${shown} is in use${holder}`,
      hint: "take another port of the host, or 0 for any that is free",
      cause
    })
  }
  if (cause.code === "EACCES") {
    return yield* new TunnelError({
      code: "TUNNEL_PORT_PRIVILEGED",
      message: `this user may not listen on ${shown}`,
      hint: "take a port from 1024 on",
      cause
    })
  }
  return yield* new TunnelError({
    code: "TUNNEL_ADDRESS_INVALID",
    message: `this host cannot listen on ${shown}: ${cause.message}`,
    hint: "give an address of this host, such as 127.0.0.1",
    cause
  })
})

const broken = (guest: TunnelTarget, cause: unknown) =>
  new TunnelError({
    code: "TUNNEL_BROKEN",
    message: `the connection to ${showTarget(guest)} in the guest broke: ${cause instanceof Error ? cause.message : String(cause)}`,
    cause
  })

const toTunnelError =
  (guest: TunnelTarget) =>
  (error: ExecError | AgentRefusal): TunnelError => {
    if (error._tag === "ExecError") {
      return error.code === "EXEC_AGENT_UNAVAILABLE"
        ? new TunnelError({
            code: "TUNNEL_AGENT_UNAVAILABLE",
            message: error.message,
            ...given({ hint: error.hint }),
            cause: error
          })
        : broken(guest, error)
    }
    const { code, errno, message } = error.fault
    if (errno === "ECONNREFUSED" || code === "AGENT_NOT_FOUND") {
      return new TunnelError({
        code: "TUNNEL_REFUSED",
        message: `nothing listens on ${showTarget(guest)} in the guest`,
        hint: "is the server up, and does it listen on the loopback interface?",
        cause: new Error(message)
      })
    }
    return code === "AGENT_BAD_REQUEST"
      ? new TunnelError({ code: "TUNNEL_TARGET_INVALID", message })
      : broken(guest, new Error(message))
  }
