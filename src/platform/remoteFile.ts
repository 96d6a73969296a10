import { createReadStream } from "node:fs"
import { FetchHttpClient, HttpClient, type HttpClientError } from "@effect/platform"
import { type Duration, Effect, type Option, Stream } from "effect"

const isUrl = (location: string) => /^https?:\/\//.test(location)

/** The location of a file below a directory or a URL. In a URL each part is escaped. */
export const join = (base: string, ...parts: ReadonlyArray<string>): string =>
  [base.replace(/\/+$/, ""), ...parts.map((part) => (isUrl(base) ? encodeURIComponent(part) : part))].join("/")

/** How long to wait for a server's answer, and for each piece of the body. */
const timeLimits: Record<"answer" | "nextPiece", Duration.DurationInput & string> = {
  answer: "30 seconds",
  nextPiece: "1 minute"
}

/** Opens a file or an http(s) URL for reading. `None` when there is no such file (ENOENT, ENOTDIR, 404); fails on any other answer. */
export const open = (
  location: string,
  limits = timeLimits
): Effect.Effect<Option.Option<Stream.Stream<Uint8Array, Error>>, Error> =>
  isUrl(location)
    ? Effect.flatMap(HttpClient.HttpClient, (client) => withoutTracing(client).get(location)).pipe(
        Effect.mapError(toFetchError),
        Effect.provide(FetchHttpClient.layer),
        Effect.timeoutFail({
          duration: limits.answer,
          onTimeout: () => new Error(`${location}: no answer within ${limits.answer}`)
        }),
        Effect.flatMap(({ status, stream }) => {
          if (status === 404) return Effect.succeedNone
          if (status < 200 || status > 299) return Effect.fail(new Error(`${location}: HTTP ${status}`))
          return Effect.succeedSome(
            Stream.mapError(stream, toFetchError).pipe(
              Stream.timeoutFail(() => new Error(`${location}: nothing came for ${limits.nextPiece}`), limits.nextPiece)
            )
          )
        })
      )
    : Effect.async((resume) => {
        const file = createReadStream(location, { highWaterMark: 1024 * 1024 })
        file.once("error", (error: NodeJS.ErrnoException) =>
          resume(error.code === "ENOENT" || error.code === "ENOTDIR" ? Effect.succeedNone : Effect.fail(error))
        )
        file.once("open", () => resume(Effect.succeedSome(Stream.fromAsyncIterable(file, toError))))
      })

/** A server is told nothing of this program's traces. */
const withoutTracing = HttpClient.withTracerPropagation(false)

/** The client's errors name the request; what fetch said is their cause. */
const toFetchError = (error: HttpClientError.HttpClientError) => toError(error.cause ?? error)

const toError = (cause: unknown) => {
  if (!(cause instanceof Error)) return new Error(String(cause))
  // fetch's own message is "fetch failed"; the reason is its cause
  return cause.cause instanceof Error ? new Error(`${cause.message}: ${cause.cause.message}`, { cause }) : cause
}
