import * as net from "node:net"
import { Effect, type Scope } from "effect"
import { encodeFrame, FrameDecoder, FrameType } from "../src/guest/AgentProtocol.ts"

const json = (type: FrameType, value: unknown) => encodeFrame(type, Buffer.from(JSON.stringify(value)))

/** What an agent says to `pull`, instead of a tree as the real one would pack it. */
export type Pulled = (send: (bytes: Uint8Array) => void) => void

/** As the agent of a guest that packs what it likes would send this archive. */
export const archive =
  (tar: Uint8Array): Pulled =>
  (send) => {
    send(json(FrameType.started, {}))
    for (let at = 0; at < tar.length; at += 10_000) send(encodeFrame(FrameType.data, tar.subarray(at, at + 10_000)))
    send(encodeFrame(FrameType.eof, Buffer.alloc(0)))
    send(json(FrameType.end, { entries: 1 }))
  }

/** A VM's socket at `path` with an agent behind it that has taken leave of the protocol's intentions; every path is a directory to it. */
export const hostileAgent = (path: string, pulled: Pulled): Effect.Effect<string, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.async<net.Server>((resume) => {
      const server = net.createServer((socket) => {
        const decoder = new FrameDecoder()
        let head: Buffer | undefined = Buffer.alloc(0)
        socket.on("error", () => {})
        socket.on("data", (bytes) => {
          let rest: Uint8Array = bytes
          if (head !== undefined) {
            head = Buffer.concat([head, bytes])
            const at = head.indexOf("\n")
            if (at === -1) return
            rest = head.subarray(at + 1)
            head = undefined
            socket.write("OK 1\n")
          }
          for (const { payload, type } of decoder.push(rest)) {
            if (type !== FrameType.request) continue
            const { op } = JSON.parse(Buffer.from(payload).toString())
            if (op === "pull") pulled((frame) => socket.write(frame))
            else
              socket.write(json(FrameType.end, { kind: "directory", size: 0, mode: 0o755, mtimeMs: 0, uid: 0, gid: 0 }))
            socket.end()
          }
        })
      })
      server.listen(path, () => resume(Effect.succeed(server)))
    }),
    (server) => Effect.sync(() => server.close())
  ).pipe(Effect.as(path))
