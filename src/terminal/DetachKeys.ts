/** Ctrl-] */
const key = 0x1d

/** What typed bytes mean. */
export interface Typed {
  /** Bytes to send to the terminal. */
  readonly forward: Uint8Array
  /** The detach keys were typed; `rest` is what was typed after them. */
  readonly detached: boolean
  readonly rest: Uint8Array
}

/**
 * Finds Ctrl-] Ctrl-] in typed bytes, however they arrive. The first Ctrl-] is held back until the next byte: another Ctrl-] detaches, and
 * neither is forwarded; any other byte is forwarded behind the held one.
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
