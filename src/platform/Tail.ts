/** Keeps the last `capacity` bytes of everything that is pushed. */
export class Tail {
  readonly capacity: number
  #buffer = Buffer.alloc(0)
  #end = 0

  constructor(capacity: number) {
    this.capacity = capacity
  }

  push(bytes: Uint8Array): void {
    const more = bytes.subarray(Math.max(0, bytes.length - this.capacity))
    if (this.#end + more.length > this.#buffer.length) this.#makeRoom(more.length)
    this.#buffer.set(more, this.#end)
    this.#end += more.length
  }

  get bytes(): Buffer {
    return Buffer.from(this.#buffer.subarray(Math.max(0, this.#end - this.capacity), this.#end))
  }

  toString(): string {
    return this.bytes.toString()
  }

  /** Makes room for `length` bytes. The buffer grows to twice the capacity, so that the tail is rarely moved to the front. */
  #makeRoom(length: number): void {
    const kept = this.#buffer.subarray(Math.max(0, this.#end + length - this.capacity), this.#end)
    const wanted = Math.min(2 * this.capacity, Math.max(4096, 2 * (kept.length + length)))
    const room = wanted > this.#buffer.length ? Buffer.allocUnsafe(wanted) : this.#buffer
    room.set(kept)
    this.#buffer = room
    this.#end = kept.length
  }
}
