import { existsSync, readFileSync } from "node:fs"
import { assert, describe, it } from "@effect/vitest"

/** The areas of the specification and how many rows each has. */
const areas = {
  BOOT: 19,
  DISK: 9,
  INITRD: 7,
  EXEC: 16,
  SNAP: 19,
  MNT: 10,
  NET: 6,
  REG: 10,
  PROV: 9,
  MEM: 5,
  MUX: 6,
  ERR: 3,
  LOG: 4,
  API: 2
} as const
const ids = Object.entries(areas).flatMap(([area, count]) =>
  [...Array(count).keys()].map((i) => `${area}-${String(i + 1).padStart(2, "0")}`)
)

const rows = readFileSync("docs/capabilities.md", "utf8")
  .split("\n")
  .flatMap((line) => {
    const match = /^\| ([A-Z]+-[0-9]{2}) \| (.*?) \| (.*?) \|$/.exec(line)
    return match === null ? [] : [{ id: match[1] ?? "", state: match[2] ?? "", tests: match[3] ?? "" }]
  })

describe("capabilities", () => {
  it("every row of the specification is there once, in order", () => {
    assert.deepStrictEqual(
      rows.map((row) => row.id),
      ids
    )
  })

  it("a row is open, part or done, and names tests unless it is open", () => {
    for (const { id, state, tests } of rows) {
      assert.include(["open", "part", "done"], state, id)
      assert.strictEqual(/`/.test(tests), state !== "open", id)
    }
  })

  it("every test a row names exists", () => {
    const missing = rows.flatMap(({ id, tests }) =>
      [...tests.matchAll(/`([^`]+?): ([^`]+)`/g)]
        .filter(([, file = "", name = ""]) => !existsSync(file) || !readFileSync(file, "utf8").includes(name))
        .map(([named]) => `${id}: ${named}`)
    )
    assert.deepStrictEqual(missing, [])
  })
})
