import { assert, describe, it } from "@effect/vitest"
import { Option } from "effect"
import { availableIn } from "../../../src/platform/memory.ts"

describe("the host's memory", () => {
  it("memory that is free is what the kernel calls available", () => {
    assert.deepStrictEqual(availableIn("MemTotal:       100 kB\nMemAvailable:    42 kB\n"), Option.some(43008))
    assert.deepStrictEqual(availableIn("MemTotal: 100 kB\n"), Option.none())
  })
})
