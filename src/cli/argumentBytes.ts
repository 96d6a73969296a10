import { readFileSync } from "node:fs"
import { Effect } from "effect"
import { ParseError } from "../errors.ts"

/** The character that Node puts in the place of bytes that are not UTF-8. A user may also have meant it. */
const replacement = "\uFFFD"

export const isUtf8 = (bytes: Uint8Array): boolean => {
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(bytes)
    return true
  } catch {
    return false
  }
}

/** The entries as the kernel has them: bytes, each entry ending with NUL (proc(5)). */
const entriesOf = (file: "cmdline" | "environ"): ReadonlyArray<Buffer> => {
  const bytes = readFileSync(`/proc/self/${file}`)
  const entries: Array<Buffer> = []
  for (let at = 0; at < bytes.length; ) {
    const end = bytes.indexOf(0, at)
    const until = end === -1 ? bytes.length : end
    entries.push(bytes.subarray(at, until))
    at = until + 1
  }
  return entries
}

/** Refuses arguments that Node has changed in decoding them: a guest would get other ones than the user meant. */
export const argumentsAreText = (argv: ReadonlyArray<string>): Effect.Effect<void, ParseError> =>
  Effect.suspend(() => {
    const changed = argv.find((arg) => arg.includes(replacement))
    return changed === undefined || entriesOf("cmdline").every(isUtf8)
      ? Effect.void
      : new ParseError({
          code: "PARSE_ARGUMENT_INVALID",
          message: `the argument ${JSON.stringify(changed)} is not UTF-8`,
          hint: "pass such bytes on stdin or in a file, and name such a file through a directory or a link"
        })
  })

/** A variable of this process's environment, unless its bytes are not UTF-8. */
export const variable = (name: string): { readonly value: string } | "absent" | "not text" => {
  const value = process.env[name]
  if (value === undefined) return "absent"
  if (!value.includes(replacement)) return { value }
  const entry = entriesOf("environ").find((bytes) => bytes.toString("utf8").startsWith(`${name}=`))
  return entry === undefined || isUtf8(entry) ? { value } : "not text"
}
