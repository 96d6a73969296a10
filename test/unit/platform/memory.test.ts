import { assert, describe, it } from "@effect/vitest"
import { parseAvailable } from "../../../src/platform/memory.ts"

describe("the host's memory", () => {
  it("memory that is free is what the kernel calls available", () => {
    assert.strictEqual(parseAvailable("MemTotal:       100 kB\nMemAvailable:    42 kB\n"), 43008)
    assert.strictEqual(parseAvailable("MemTotal: 100 kB\n"), undefined)
  })
})
