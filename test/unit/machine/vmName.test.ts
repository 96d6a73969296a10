import { assert, describe, it } from "@effect/vitest"
import { FastCheck as fc, Schema } from "effect"
import { VmName } from "../../../src/machine/MachineSpec.ts"

describe("names", () => {
  it("path-like ones are fine, what a path or a pid could hide in is not", () => {
    const ok = Schema.is(VmName)
    for (const name of ["web", "team/job-1", "a.b_c~1", "1a"]) assert.isTrue(ok(name), name)
    for (const name of ["", "/a", "a//b", "a/", "..", "a/./b", "a b", "-x", "12", "a\0", "ä", "x".repeat(129)]) {
      assert.isFalse(ok(name), name)
    }
  })

  it("no accepted name leaves its directory when it becomes a file name", () => {
    fc.assert(
      fc.property(fc.string(), (name) => {
        if (!Schema.is(VmName)(name)) return
        const file = encodeURIComponent(name)
        assert.notInclude(file, "/")
        assert.notInclude([".", ".."], file)
      })
    )
  })
})
