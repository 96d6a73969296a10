import { Readable } from "node:stream"
import { Effect } from "effect"
import { Tail } from "./Tail.ts"

/**
 * A Node stream that nobody has to read. Until the first read it keeps the last `tailBytes` bytes only and never holds the writer back. From
 * then on no byte is lost, and a reader that stalls holds the writer back; a reader that destroys the stream does not.
 */
export class TailReadable extends Readable {
  /** The last bytes that were written, whether they have been read or not. */
  readonly tail: Tail
  #state: "unread" | "read" = "unread"
  #ended = false
  #unlimited = false
  #resume: (() => void) | undefined

  constructor(tailBytes: number) {
    super({ autoDestroy: true })
    this.tail = new Tail(tailBytes)
  }

  /** Copies the bytes into the stream. Completes when the stream takes more. */
  write(bytes: Uint8Array): Effect.Effect<void> {
    return Effect.async((resume) => {
      this.tail.push(bytes)
      const mayGoOn = this.#state === "unread" || this.destroyed || this.push(Buffer.from(bytes)) || this.#unlimited
      if (mayGoOn) return resume(Effect.void)
      this.#resume = () => resume(Effect.void)
      return Effect.sync(() => {
        this.#resume = undefined
      })
    })
  }

  /** From now on `write` does not wait for the reader. For the last bytes of a source that has ended: there are few of them. */
  readonly unlimit: Effect.Effect<void> = Effect.sync(() => {
    this.#unlimited = true
    this.#goOn()
  })

  /** Ends the stream after the bytes written so far. */
  readonly end: Effect.Effect<void> = Effect.sync(() => {
    if (this.#ended) return
    this.#ended = true
    if (this.#state === "read") this.push(null)
  })

  override _read(): void {
    if (this.#state === "unread") {
      this.#state = "read"
      const kept = this.tail.bytes
      if (kept.length > 0) this.push(kept)
      if (this.#ended) this.push(null)
    }
    this.#goOn()
  }

  override _destroy(error: Error | null, callback: (error?: Error | null) => void): void {
    this.#goOn()
    callback(error)
  }

  #goOn(): void {
    const resume = this.#resume
    this.#resume = undefined
    resume?.()
  }
}
