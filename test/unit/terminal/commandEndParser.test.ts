import { assert, describe, it } from "@effect/vitest"
import { FastCheck as fc } from "effect"
import { CommandEndParser } from "../../../src/terminal/CommandEndParser.ts"

const read = (bytes: Buffer, cuts: ReadonlyArray<number>) => {
  const marked = new CommandEndParser("t0k")
  const seen: Array<string> = []
  let from = 0
  for (const at of [...cuts.map((cut) => cut % (bytes.length + 1)).sort((a, b) => a - b), bytes.length]) {
    for (const piece of marked.push(bytes.subarray(from, at))) {
      const last = seen.at(-1)
      if ("status" in piece) seen.push(`#${piece.status}`)
      else if (last === undefined || last.startsWith("#")) seen.push(Buffer.from(piece.text).toString("latin1"))
      else seen[seen.length - 1] = last + Buffer.from(piece.text).toString("latin1")
    }
    from = at
  }
  return seen
}

describe("a shell's marks", () => {
  it("are found, and nothing else is one", () => {
    assert.deepStrictEqual(read(Buffer.from("a\x1et0k:0\x1eb\x1et0k:255\x1e"), []), ["a", "#0", "b", "#255"])
    assert.deepStrictEqual(read(Buffer.from("\x1e\x1eother:1\x1e x\x1et0k:x\x1et0k:1\x1ey"), []), [
      "\x1e\x1eother:1\x1e x\x1et0k:x",
      "#1",
      "y"
    ])
    const long = `\x1e${"x".repeat(100)}`
    assert.deepStrictEqual(read(Buffer.from(long), []), [long])
  })

  it("are found however the output is cut", () => {
    const part = fc.constantFrom("text", "\x1e", "\x1et0k:7\x1e", "t0k:", "\x1et0k")
    fc.assert(
      fc.property(fc.array(part, { maxLength: 12 }), fc.array(fc.nat(200), { maxLength: 20 }), (parts, cuts) => {
        // a mark that has only begun waits for its end
        const bytes = Buffer.from(`${parts.join("")}${".".repeat(64)}`)
        assert.deepStrictEqual(read(bytes, cuts), read(bytes, []))
      })
    )
  })
})
