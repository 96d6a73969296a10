import { createServer, type Server } from "node:http"
import type { AddressInfo } from "node:net"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Option, Stream } from "effect"
import * as remoteFile from "../../../src/platform/remoteFile.ts"

const waiting = { answer: "200 millis", nextPiece: "200 millis" } as const

/** A server that answers as told and is gone with the scope, whatever hangs on it. */
const serving = (answer: Parameters<typeof createServer>[1]) =>
  Effect.acquireRelease(
    Effect.async<Server>((resume) => {
      const server = createServer(answer ?? (() => {}))
      server.listen(0, "127.0.0.1", () => resume(Effect.succeed(server)))
    }),
    (server) =>
      Effect.async<void>((resume) => {
        server.closeAllConnections()
        server.close(() => resume(Effect.void))
      })
  ).pipe(Effect.map((server) => `http://127.0.0.1:${(server.address() as AddressInfo).port}/file`))

describe("a file of a server", () => {
  it.scopedLive("fails when no answer comes", () =>
    Effect.gen(function* () {
      const location = yield* serving(() => {})
      const error = yield* Effect.flip(remoteFile.open(location, waiting))
      assert.include(error.message, `${location}: no answer within 200 millis`)
    })
  )

  it.scopedLive("is requested without headers of this program's traces", () =>
    Effect.gen(function* () {
      const asked: Array<string> = []
      const location = yield* serving((request, response) => {
        asked.push(...Object.keys(request.headers))
        response.end("file")
      })
      const found = yield* Effect.withSpan(remoteFile.open(location, waiting), "install")
      assert.isTrue(Option.isSome(found))
      assert.include(asked, "host")
      for (const header of ["traceparent", "b3"]) assert.notInclude(asked, header)
    })
  )

  it.live("fails with the reason when the server cannot be reached", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(remoteFile.open("http://127.0.0.1:2/file", waiting))
      assert.include(error.message, "ECONNREFUSED 127.0.0.1:2")
    })
  )

  it.scopedLive("fails with the status of any answer but the file and 404", () =>
    Effect.gen(function* () {
      const answer = (status: number) => serving((_, response) => void response.writeHead(status).end("no"))
      const location = yield* answer(500)
      assert.strictEqual((yield* Effect.flip(remoteFile.open(location, waiting))).message, `${location}: HTTP 500`)
      assert.isTrue(Option.isNone(yield* remoteFile.open(yield* answer(404), waiting)))
    })
  )

  it.scopedLive("fails when the rest does not come", () =>
    Effect.gen(function* () {
      const location = yield* serving((_, response) => void response.write("begun"))
      const found = yield* remoteFile.open(location, waiting)
      const error = yield* Effect.flip(Stream.runCollect(Option.getOrThrow(found)))
      assert.include(error.message, `${location}: nothing came for 200 millis`)
    })
  )

  it.scopedLive("may take longer in all than any one wait", () =>
    Effect.gen(function* () {
      const location = yield* serving((_, response) => {
        let left = 6
        const timer = setInterval(() => {
          if (left-- > 0) return void response.write("x")
          clearInterval(timer)
          response.end()
        }, 60)
      })
      const bytes = Option.getOrThrow(yield* remoteFile.open(location, waiting))
      const text = yield* Stream.mkString(Stream.decodeText(bytes))
      assert.strictEqual(text, "xxxxxx")
      assert.isTrue(Option.isNone(yield* remoteFile.open("/no/such/file", waiting)))
    })
  )
})
