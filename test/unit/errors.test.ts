import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Schema } from "effect"
import {
  BootError,
  ExecError,
  format,
  isMachinenError,
  MachinenError,
  RegistryError,
  render
} from "../../src/errors.ts"

describe("errors", () => {
  it("survive JSON with code, hint and cause", () => {
    const error = new BootError({
      code: "BOOT_NO_SPACE",
      message: "full",
      hint: "free some",
      cause: new Error("ENOSPC")
    })
    const back = Schema.decodeSync(Schema.parseJson(MachinenError))(
      JSON.stringify(Schema.encodeSync(MachinenError)(error))
    )
    assert.isTrue(isMachinenError(back))
    assert.strictEqual(back.code, "BOOT_NO_SPACE")
    assert.strictEqual(back.message, "full")
    assert.strictEqual((back.cause as Error).message, "ENOSPC")
  })

  it("are retryable or not by their code", () => {
    assert.isTrue(new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "" }).retryable)
    // it was under way: nobody knows what a second run would do
    assert.isFalse(new ExecError({ code: "EXEC_AGENT_TIMEOUT", message: "" }).retryable)
    assert.isFalse(new ExecError({ code: "EXEC_NONZERO_EXIT", message: "" }).retryable)
    assert.isFalse(new RegistryError({ code: "REGISTRY_NAME_IN_USE", message: "" }).retryable)
  })

  it("format as code, message and the whole chain of causes", () => {
    const cause = new Error("middle", { cause: "bottom" })
    const error = new BootError({
      code: "BOOT_VMM_FAILED",
      message: "top",
      hint: "do this",
      console: "one\ntwo\n",
      cause
    })
    assert.strictEqual(format(error), "(BOOT_VMM_FAILED): top\n  caused by: middle\n  caused by: bottom")
    assert.include(render(error), "    two")
    assert.include(render(error), "hint: do this")
  })

  it("are not confused with others", () => {
    assert.isFalse(isMachinenError(new Error("x")))
    assert.isFalse(isMachinenError({ code: "BOOT_NO_SPACE" }))
    assert.isTrue(Exit.isFailure(Effect.runSyncExit(new BootError({ code: "BOOT_NO_SPACE", message: "x" }))))
  })
})
