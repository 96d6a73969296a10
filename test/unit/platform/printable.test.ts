import { assert, describe, it } from "@effect/vitest"
import * as render from "../../../src/cli/render.ts"
import { ExecError, render as renderError } from "../../../src/errors.ts"
import { printable } from "../../../src/platform/printable.ts"

describe("text that a guest chose", () => {
  it("has no controls left, nor what reorders or hides others", () => {
    assert.strictEqual(
      printable("a\x1b[2J\x9b\x07\r\n\tb\u202e\u2028\u{e0041}"),
      "a\\e[2J\\x9b\\x07\\r\\n\\tb\\u{202e}\\u{2028}\\u{e0041}"
    )
    assert.strictEqual(printable("größer 日本 🚀"), "größer 日本 🚀")
    assert.strictEqual(printable("a\n\tb\r", { lines: true }), "a\n\tb\\r")
  })

  it("does not steer the terminal from an error", () => {
    const error = new ExecError({
      code: "EXEC_FAILED",
      message: "no \x1b]0;title\x07",
      console: "one\r\n\x1b[31mtwo\r\n",
      hint: "look"
    })
    assert.strictEqual(
      renderError(error),
      "(EXEC_FAILED): no \\e]0;title\\x07\n  last console lines:\n    one\n    \\e[31mtwo\n  hint: look"
    )
  })

  it("is one line of a table, and the same value in JSON", () => {
    assert.strictEqual(render.table(["A", "B"], [["x\ny", "z"]]), "A      B\nx\\ny   z")
    const value = { name: "\x9b\u202e\u{e0041}\n" }
    assert.deepStrictEqual(JSON.parse(render.jsonText(value, 2)), value)
    assert.strictEqual(render.jsonText(value), '{"name":"\\u009b\\u202e\\udb40\\udc41\\n"}')
  })
})
