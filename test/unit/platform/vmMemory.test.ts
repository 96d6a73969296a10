import { assert, describe, it } from "@effect/vitest"
import { guestBytes } from "../../../src/platform/vmMemory.ts"

describe("a VMM's mappings", () => {
  const mapping = (path: string, kib: number) =>
    `7f7e07fff000-7f7e27fff000 rw-p 00000000 fe:00 10053894                   ${path}\nSize:  524288 kB\nRss:   ${kib} kB\nPss:   1 kB\n`
  it("are the guest's memory where they are of its file", () => {
    const smaps = [
      mapping("/memfd:machinen-memory (deleted)", 100),
      mapping("", 7),
      "7f7e07fff000-7f7e27fff000 rw-p 00000000 00:00 0 \nRss:   9 kB\n",
      mapping("/home/a b/bundle/memory", 30),
      mapping("/home/bundle/memory (deleted)", 3),
      mapping("/usr/lib/libmemory", 11)
    ].join("")
    assert.strictEqual(guestBytes(smaps), 133 * 1024)
  })
})
