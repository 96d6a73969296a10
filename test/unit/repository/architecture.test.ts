import { existsSync, readdirSync, readFileSync } from "node:fs"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { circles } from "./circles.ts"

/** Each place may import those above it. A folder's files may import each other. ARCHITECTURE.md describes the places in this order. */
const order = [
  "src/version.ts",
  "src/platform/",
  "src/terminal/",
  "src/errors.ts",
  "src/Settings.ts",
  "src/machine/",
  "src/host/",
  "src/guest/",
  "src/image/",
  "src/mount/",
  "src/vm/",
  "src/snapshot/",
  "src/boot/",
  "src/initramfs/",
  "src/Machinen.ts",
  "backends/",
  "src/runtime/",
  "src/index.ts",
  "src/promise/",
  "src/promise.ts",
  "src/cli/"
]
const rank = (file: string) => order.findIndex((place) => file.startsWith(place))

/** The facade's: no Effect reaches those who call it. */
const isFacade = (file: string) => file === "src/promise.ts" || file.startsWith("src/promise/")

const filesOf = (...dirs: ReadonlyArray<string>) =>
  dirs.flatMap((dir) =>
    readdirSync(dir, { recursive: true, encoding: "utf8" })
      .map((file) => path.join(dir, file))
      .filter((file) => file.endsWith(".ts"))
  )
const files = filesOf("src", "backends")
const imports = (file: string) =>
  [...readFileSync(file, "utf8").matchAll(/(?:from|import) "([^"]+)"/g)].map(([, target = ""]) => target)
const ownImports = (file: string) =>
  imports(file)
    .filter((target) => target.startsWith("."))
    .map((target) => path.normalize(path.join(path.dirname(file), target)))

/** The imports between places, as `importer -> imported`, without those that follow from two or more others. */
const directImports = (): ReadonlyArray<string> => {
  const imported = new Map(order.map((place) => [place, new Set<string>()]))
  for (const file of files) {
    for (const target of ownImports(file)) {
      const [from = "", to = ""] = [order[rank(file)], order[rank(target)]]
      if (from !== to) imported.get(from)?.add(to)
    }
  }
  const reaches = (from: string, to: string): boolean =>
    [...(imported.get(from) ?? [])].some((next) => next === to || reaches(next, to))
  return order.flatMap((from) => {
    const all = [...(imported.get(from) ?? [])]
    return all.filter((to) => !all.some((other) => other !== to && reaches(other, to))).map((to) => `${from} -> ${to}`)
  })
}

/** The Mermaid block of ARCHITECTURE.md whose nodes are places: `id["src/place/"]`, and `id --> id` for an import. */
const picture = () => {
  const blocks = readFileSync("ARCHITECTURE.md", "utf8").match(/^```mermaid\n[\s\S]*?^```$/gm) ?? []
  const block = blocks.find((text) => text.includes(`["${order[0]}"]`)) ?? ""
  const nodes = [...block.matchAll(/^ *(\w+)\["([^"]+)"\]$/gm)].map(([, id = "", place = ""]) => [id, place] as const)
  const places = new Map(nodes)
  const edges = [...block.matchAll(/^ *(\w+) --> (\w+)$/gm)].map(
    ([, from = "", to = ""]) => `${places.get(from)} -> ${places.get(to)}`
  )
  return { places: nodes.map(([, place]) => place), edges }
}

describe("architecture", () => {
  it("every file has a place in the order, and every place has files", () => {
    assert.deepStrictEqual(
      files.filter((file) => rank(file) < 0),
      []
    )
    assert.deepStrictEqual(
      order.filter((place) => !files.some((file) => file.startsWith(place))),
      []
    )
  })

  it("imports only point upwards in the order", () => {
    const wrong = files.flatMap((file) =>
      ownImports(file)
        .filter((target) => rank(target) > rank(file))
        .map((target) => `${file} -> ${target}`)
    )
    assert.deepStrictEqual(wrong, [])
  })

  it("no files import each other in a circle, not for types either", () => {
    const all = filesOf("src", "backends", "test", "bench")
    const importsOf = (file: string) => ownImports(file).filter((target) => target.endsWith(".ts"))
    assert.deepStrictEqual(circles(all, importsOf), [])
  })

  it("ARCHITECTURE.md says what each place is, in the same order", () => {
    const told = [...readFileSync("ARCHITECTURE.md", "utf8").matchAll(/^\| `((?:src|backends)\/[^`]*)` +\|/gm)]
    assert.deepStrictEqual(
      told.map(([, place]) => place),
      order
    )
  })

  it("ARCHITECTURE.md draws the places in the same order, and the imports there are between them", () => {
    const { edges, places } = picture()
    assert.deepStrictEqual(places, order)
    assert.deepStrictEqual([...edges].sort(), [...directImports()].sort())
  })

  it("every file and folder that ARCHITECTURE.md names exists", () => {
    const named = [
      ...readFileSync("ARCHITECTURE.md", "utf8").matchAll(/`((?:src|backends|test|guest|native|docs)\/[\w./-]+)`/g)
    ]
    assert.isAbove(named.length, 40)
    assert.deepStrictEqual(
      named.map(([, place = ""]) => place).filter((place) => !existsSync(place)),
      []
    )
  })

  it("only the wiring names a backend", () => {
    const wrong = files.filter(
      (file) =>
        !file.startsWith("backends/") &&
        file !== "src/runtime/layers.ts" &&
        imports(file).some((target) => target.includes("backends/"))
    )
    assert.deepStrictEqual(wrong, [])
  })

  it("Node's processes and sockets are started in platform only", () => {
    const wrong = files.filter(
      (file) =>
        !file.startsWith("src/platform/") &&
        imports(file).some((target) => ["node:child_process", "node:net"].includes(target))
    )
    assert.deepStrictEqual(wrong, [])
  })

  it("services neither print, nor exit, nor return promises", () => {
    const wrong = files
      .filter((file) => !file.startsWith("src/cli/") && !isFacade(file))
      .flatMap((file) =>
        [/\bconsole\.(log|error|warn)\(/, /\bprocess\.exit\b/, /\bPromise</, /\basync (function|\()/]
          .filter((pattern) => pattern.test(readFileSync(file, "utf8")))
          .map((pattern) => `${file}: ${pattern}`)
      )
    assert.deepStrictEqual(wrong, [])
  })
})
