import * as net from "node:net"
import { Effect, type Scope } from "effect"
import { BenchError } from "./harness.ts"

const failed = (cause: Error) => new BenchError({ message: `TCP: ${cause.message}`, cause })

/** Connects to a port of this host. The scope closes the connection. */
export const connect = (port: number): Effect.Effect<net.Socket, BenchError, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.async<net.Socket, BenchError>((resume) => {
      const socket = net.connect({ host: "127.0.0.1", port, noDelay: true })
      socket.once("error", (error) => resume(Effect.fail(failed(error))))
      socket.once("connect", () => resume(Effect.succeed(socket)))
    }),
    (socket) => Effect.sync(() => socket.destroy())
  )

/** Sends a byte and waits for one. */
export const ping = (socket: net.Socket): Effect.Effect<void, BenchError> =>
  Effect.async((resume) => {
    socket.once("data", () => resume(Effect.void)).once("close", () => resume(Effect.fail(failed(new Error("closed")))))
    socket.write("x")
  })

/** Reads to the end of file. Returns the number of bytes. */
export const drain = (socket: net.Socket): Effect.Effect<number, BenchError> =>
  Effect.async((resume) => {
    let bytes = 0
    socket.on("data", ({ length }) => {
      bytes += length
    })
    socket.once("end", () => resume(Effect.succeed(bytes))).once("error", (error) => resume(Effect.fail(failed(error))))
  })

/** Writes `total` bytes, half-closes, and waits for the peer's end of file. */
export const fill = (socket: net.Socket, total: number): Effect.Effect<number, BenchError> =>
  Effect.async((resume) => {
    const block = Buffer.alloc(256 * 1024, 7)
    let left = total
    const write = () => {
      while (left > 0) {
        const piece = left < block.length ? block.subarray(0, left) : block
        left -= piece.length
        if (!socket.write(piece)) return void socket.once("drain", write)
      }
      socket.end()
    }
    socket.resume()
    socket.once("end", () => resume(Effect.succeed(total - left)))
    socket.once("error", (error) => resume(Effect.fail(failed(error))))
    write()
  })

/** A port on which no program listens at this moment. */
export const freePort: Effect.Effect<number> = Effect.async((resume) => {
  const server = net.createServer().listen(0, "127.0.0.1", () => {
    const address = server.address()
    server.close(() => resume(Effect.succeed(typeof address === "object" ? (address?.port ?? 0) : 0)))
  })
})
