import { readFileSync } from "node:fs"
import { Option } from "effect"

/** Reads a file of /proc at once, which costs no disk access. `None` when its process has ended, or belongs to another user. */
export const read = (file: string): Option.Option<string> => {
  try {
    return Option.some(readFileSync(file, "utf8"))
  } catch {
    return Option.none()
  }
}

/** Bytes of a size in a table of /proc, such as `VmRSS:   1234 kB`. */
export const sizeIn = (table: string, name: string): Option.Option<number> =>
  Option.map(
    Option.fromNullable(new RegExp(`^${name}:\\s+(\\d+) kB$`, "m").exec(table)?.[1]),
    (kib) => Number(kib) * 1024
  )
