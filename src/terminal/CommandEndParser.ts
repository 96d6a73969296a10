/** Output of a shell, or how a command ended: its exit code, or `"more"` when the command is not complete and the shell wants another line. */
export type Piece = { readonly text: Uint8Array } | { readonly status: number | "more" }

const mark = 0x1e
/** Longest mark in bytes. */
const longest = 64

/**
 * Splits the output of a shell at the marks of ended commands: record separator, token, `:`, exit code or `more`, record separator.
 */
export class CommandEndParser {
  readonly #inner: RegExp
  #pending = Buffer.alloc(0)

  constructor(token: string) {
    this.#inner = new RegExp(`^${token}:([0-9]{1,3}|more)$`)
  }

  push(bytes: Uint8Array): ReadonlyArray<Piece> {
    let rest = Buffer.concat([this.#pending, bytes])
    const pieces: Array<Piece> = []
    const show = (text: Buffer) => {
      if (text.length > 0) pieces.push({ text })
    }
    for (;;) {
      const begin = rest.indexOf(mark)
      if (begin === -1) break
      show(rest.subarray(0, begin))
      rest = rest.subarray(begin)
      const end = rest.indexOf(mark, 1)
      if (end === -1 && rest.length < longest) {
        this.#pending = rest
        return pieces
      }
      const status = this.#inner.exec(rest.subarray(1, Math.max(end, 1)).toString("latin1"))?.[1]
      if (status === undefined) {
        // a record separator that begins no mark of ours is output
        show(rest.subarray(0, 1))
        rest = rest.subarray(1)
      } else {
        pieces.push({ status: status === "more" ? status : Number(status) })
        rest = rest.subarray(end + 1)
      }
    }
    show(rest)
    this.#pending = Buffer.alloc(0)
    return pieces
  }
}
