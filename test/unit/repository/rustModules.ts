/**
 * Which files of a Rust crate use which. A module's declaration (`mod x;`) is no use. Tests are left out: the module at a file's end that
 * `#[cfg(test)]` is before, and files whose names end in `tests.rs`.
 */

/** The sources of a crate, by their paths below its `src`. */
export type Sources = ReadonlyMap<string, string>

const isTest = (file: string) => file.endsWith("tests.rs")

/** `agent/criu/dump.rs` is the module `agent`, `criu`, `dump`; a `mod.rs` is its folder's, `lib.rs` and `main.rs` are the crate. */
const moduleOf = (file: string): ReadonlyArray<string> =>
  file
    .replace(/\.rs$/, "")
    .split("/")
    .filter((part, n, parts) => n < parts.length - 1 || !["mod", "lib", "main"].includes(part))

/** Without comments and without tests. */
const codeOf = (source: string) =>
  source.replace(/#\[cfg\(test\)\]\s*mod \w+ \{[\s\S]*$/, "").replace(/(^|\s)\/\/.*$/gm, "")

/** The parts of `a, b::{c, d}`. */
const splitList = (list: string): ReadonlyArray<string> => {
  const parts: Array<string> = [""]
  let depth = 0
  for (const character of list) {
    if (character === "{") depth++
    if (character === "}") depth--
    if (character === "," && depth === 0) parts.push("")
    else parts[parts.length - 1] += character
  }
  return parts.map((part) => part.trim()).filter((part) => part !== "")
}

/** `a::{b, c::d as e}` is `a::b` and `a::c::d`. */
const expand = (tree: string): ReadonlyArray<string> => {
  const brace = tree.indexOf("{")
  if (brace < 0) return [tree.replace(/\s+as\s+\w+$/, "").trim()]
  return splitList(tree.slice(brace + 1, tree.lastIndexOf("}"))).flatMap((part) =>
    expand(part).map((path) => tree.slice(0, brace).trim() + path)
  )
}

/** Every path in the code that may lead to another file, as it is written. */
const pathsIn = (code: string): ReadonlyArray<string> => {
  const uses = /\buse\s+([^;]+);/g
  const inUses = [...code.matchAll(uses)].flatMap(([, tree = ""]) => expand(tree))
  const elsewhere = [...code.replace(uses, "").matchAll(/(?<![\w:])[a-z_]\w*(?:::\w+)+/g)].map(([path]) => path)
  return [...inUses, ...elsewhere]
}

/** The files that each file of a crate uses. */
export const rustUses = (sources: Sources): ReadonlyMap<string, ReadonlySet<string>> => {
  // A `main.rs` beside a `lib.rs` is a crate of its own that no other uses.
  const isOther = (file: string) => file === "main.rs" && sources.has("lib.rs")
  const files = [...sources.keys()].filter((file) => !isTest(file) && !isOther(file))
  const fileOf = new Map(files.map((file) => [moduleOf(file).join("::"), file]))
  const longest = (path: ReadonlyArray<string>): string | undefined =>
    fileOf.get(path.join("::")) ?? (path.length === 0 ? undefined : longest(path.slice(0, -1)))

  const target = (from: ReadonlyArray<string>, path: string) => {
    let [first = "", ...rest] = path.split("::")
    let at = from
    if (first === "crate") at = []
    else if (first === "super") {
      at = from.slice(0, -1)
      while (rest[0] === "super") {
        at = at.slice(0, -1)
        rest = rest.slice(1)
      }
    } else if (first !== "self") {
      // Another crate, something imported by a `use`, or a module below this one.
      if (!fileOf.has([...from, first].join("::"))) return undefined
      rest = [first, ...rest]
    }
    return longest([...at, ...rest])
  }

  return new Map(
    files.map((file) => {
      const targets = pathsIn(codeOf(sources.get(file) ?? "")).map((path) => target(moduleOf(file), path))
      return [file, new Set(targets.filter((other) => other !== undefined && other !== file))] as const
    }) as ReadonlyArray<readonly [string, ReadonlySet<string>]>
  )
}
