/** `"more"`: the shell wants another line, as the command is not complete. */
export type Piece = { readonly text: Uint8Array } | { readonly status: number | "more" }

const mark = 0x1e
/** No mark is longer. */
const longest = 64

/**
 * Finds in what a shell prints the marks that tell of a command's end: record separator, token, `:`, exit code or `more`, record separator.
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
        // somebody else's: text like any other
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
