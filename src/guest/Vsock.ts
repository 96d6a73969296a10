import { Context, Effect, Layer, Schema, type Scope } from "effect"
import { firstLine } from "../platform/connectionLines.ts"
import * as UnixSocket from "../platform/UnixSocket.ts"

/** A guest port could not be reached: there is no VM behind the socket, no program listens, or the VM ended meanwhile. */
export class VsockUnreachable extends Schema.TaggedError<VsockUnreachable>()("VsockUnreachable", {
  path: Schema.String,
  port: Schema.Int,
  cause: Schema.optional(Schema.Defect)
}) {
  override get message(): string {
    return `guest port ${this.port} cannot be reached through ${this.path}`
  }
}

/**
 * Byte streams to and from guest ports, by Firecracker's hybrid vsock over unix sockets (docs/protocol.md §2), which every backend has.
 */
export class Vsock extends Context.Tag("machinen/Vsock")<
  Vsock,
  {
    /** Connects to a port in the guest. `first` is sent with the request, which saves a round trip; it is lost if the request is refused. */
    readonly dial: (
      vsockPath: string,
      port: number,
      first?: Uint8Array
    ) => Effect.Effect<UnixSocket.Connection, VsockUnreachable, Scope.Scope>
    /** Listens on a host port that the guest dials. The inner effect waits for the guest's first connection. */
    readonly listen: (
      vsockPath: string,
      port: number
    ) => Effect.Effect<
      Effect.Effect<UnixSocket.Connection, VsockUnreachable, Scope.Scope>,
      VsockUnreachable,
      Scope.Scope
    >
  }
>() {
  static readonly layer = Layer.succeed(Vsock, {
    dial: Effect.fn("Vsock.dial")(
      function* (vsockPath, port, first = new Uint8Array(0)) {
        const connection = yield* UnixSocket.connect(vsockPath)
        yield* connection.write(Buffer.concat([Buffer.from(`CONNECT ${port}\n`), first]))
        return yield* greeted(connection)
      },
      (effect, path, port) => Effect.mapError(effect, (cause) => new VsockUnreachable({ path, port, cause }))
    ),
    listen: Effect.fn("Vsock.listen")(
      function* (vsockPath, port) {
        const accept = yield* UnixSocket.listenOnce(`${vsockPath}_${port}`)
        return Effect.mapError(accept, (cause) => new VsockUnreachable({ path: vsockPath, port, cause }))
      },
      (effect, path, port) => Effect.mapError(effect, (cause) => new VsockUnreachable({ path, port, cause }))
    )
  })
}

const maxGreeting = 32

/** Reads `OK <n>\n` and returns the connection from behind it. */
const greeted = Effect.fnUntraced(function* (connection: UnixSocket.Connection) {
  const { after, line } = yield* firstLine(connection, {
    ended: () => refused("nobody listens on that guest port"),
    maxBytes: maxGreeting,
    tooLong: notVsock
  })
  return /^OK \d+$/.test(line) ? after : yield* Effect.fail(notVsock())
})

const refused = (why: string) => Object.assign(new Error(why), { code: "ECONNREFUSED" })
const notVsock = () => refused("not a vsock socket")
