import { Readable } from "node:stream"
import { Effect } from "effect"
import { Tail } from "./Tail.ts"

/**
 * A Node stream that does not hold its writer back before somebody reads it: until then only the last bytes are kept for them. From the first
 * read on nothing is lost, and a reader that stalls stalls the writer; one that destroys the stream does not.
 */
export class TailReadable extends Readable {
  /** The last of all that was written, read or not. */
  readonly tail: Tail
  #state: "unread" | "read" = "unread"
  #ended = false
  #unlimited = false
  #resume: (() => void) | undefined

  constructor(tailBytes: number) {
    super({ autoDestroy: true })
    this.tail = new Tail(tailBytes)
  }

  /** Copies the bytes. Completes when there is room for more. */
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

  /** Whoever writes does not wait for the reader any more: what is left is not much. */
  readonly unlimit: Effect.Effect<void> = Effect.sync(() => {
    this.#unlimited = true
    this.#goOn()
  })

  /** Nothing more will be written. */
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
