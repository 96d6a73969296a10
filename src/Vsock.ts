import { Context, Effect, Layer, Schema, type Scope, Stream } from "effect"
import * as UnixSocket from "./platform/UnixSocket.ts"

/** A guest port could not be reached: no VM behind the socket, nobody listening, or the VM went away in between. */
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
 * Byte streams to and from guest ports, the same on every backend: Firecracker's hybrid vsock over unix sockets (docs/protocol.md §2).
 */
export class Vsock extends Context.Tag("machinen/Vsock")<
  Vsock,
  {
    /** Connects to a port in the guest. */
    readonly dial: (
      vsockPath: string,
      port: number
    ) => Effect.Effect<UnixSocket.Connection, VsockUnreachable, Scope.Scope>
    /** Waits where the guest will call: returns once listening; the inner effect is the guest's first call. */
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
      function* (vsockPath, port) {
        const connection = yield* UnixSocket.connect(vsockPath)
        yield* connection.write(Buffer.from(`CONNECT ${port}\n`))
        const rest = yield* readGreeting(connection.bytes)
        return { ...connection, bytes: rest }
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

/** Reads `OK <n>\n` and gives the stream that follows it, which may have begun in the same piece. */
const readGreeting = (bytes: UnixSocket.Connection["bytes"]) =>
  Effect.gen(function* () {
    const pull = yield* Stream.toPull(bytes)
    let line = Buffer.alloc(0)
    while (!line.includes("\n")) {
      if (line.length > maxGreeting) return yield* Effect.fail(refused("no greeting"))
      const pieces = yield* Effect.mapError(pull, (end) => (end._tag === "Some" ? end.value : refused("refused")))
      line = Buffer.concat([line, ...pieces])
    }
    const at = line.indexOf("\n")
    if (!/^OK \d+$/.test(line.subarray(0, at).toString("latin1"))) return yield* Effect.fail(refused("no greeting"))
    const rest = line.subarray(at + 1)
    const more = Stream.fromPull(Effect.succeed(pull))
    return rest.length === 0 ? more : Stream.concat(Stream.make<[Uint8Array]>(rest), more)
  })

const refused = (why: string) =>
  Object.assign(new Error(why === "refused" ? "nobody listens on that guest port" : "not a vsock socket"), {
    code: "ECONNREFUSED"
  })
