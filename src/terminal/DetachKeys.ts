/** Ctrl-] */
const key = 0x1d

export interface Typed {
  /** What is for the terminal. */
  readonly forward: Uint8Array
  /** Both keys have been seen; `rest` followed them. */
  readonly detached: boolean
  readonly rest: Uint8Array
}

/**
 * Finds Ctrl-] pressed twice in what is typed, however it is cut. The first waits for what follows; neither is forwarded. One alone is, with
 * what follows it.
 */
export class DetachKeys {
  #held = false

  push(bytes: Uint8Array): Typed {
    const forward: Array<number> = []
    for (const [at, byte] of bytes.entries()) {
      if (byte === key && this.#held) {
        this.#held = false
        return { forward: Uint8Array.from(forward), detached: true, rest: bytes.subarray(at + 1) }
      }
      if (this.#held) forward.push(key)
      this.#held = byte === key
      if (!this.#held) forward.push(byte)
    }
    return { forward: Uint8Array.from(forward), detached: false, rest: new Uint8Array(0) }
  }
}
