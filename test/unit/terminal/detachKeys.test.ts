import { assert, describe, it } from "@effect/vitest"
import { FastCheck as fc } from "effect"
import { DetachKeys } from "../../../src/terminal/DetachKeys.ts"

const key = 0x1d
const push = (chunks: ReadonlyArray<ReadonlyArray<number>>) => {
  const keys = new DetachKeys()
  const forward: Array<number> = []
  for (const [at, chunk] of chunks.entries()) {
    const typed = keys.push(Uint8Array.from(chunk))
    forward.push(...typed.forward)
    if (typed.detached) return { forward, rest: [...typed.rest, ...chunks.slice(at + 1).flat()] }
  }
  return { forward, rest: undefined }
}

describe("the detach keys", () => {
  const cases: ReadonlyArray<readonly [what: string, chunks: Array<Array<number>>, ReturnType<typeof push>]> = [
    ["are not forwarded", [[1, key, key, 2]], { forward: [1], rest: [2] }],
    ["may be split", [[1, key], [key], [2]], { forward: [1], rest: [2] }],
    [
      "are two: one goes on with what follows it",
      [[key, 1], [key], [2]],
      { forward: [key, 1, key, 2], rest: undefined }
    ],
    ["wait for the second", [[1, key]], { forward: [1], rest: undefined }]
  ]
  for (const [what, chunks, expected] of cases) {
    it(what, () => assert.deepStrictEqual(push(chunks), expected))
  }

  it("are found however the bytes are cut, and all other bytes are forwarded as they are", () => {
    const byte = fc.oneof(fc.nat(255), fc.constant(key))
    fc.assert(
      fc.property(fc.array(byte), fc.array(fc.nat(3), { maxLength: 40 }), (bytes, cuts) => {
        const chunks: Array<Array<number>> = []
        let from = 0
        for (const length of cuts) {
          chunks.push(bytes.slice(from, from + length))
          from += length
        }
        chunks.push(bytes.slice(from))
        const at = bytes.findIndex((b, i) => b === key && bytes[i + 1] === key)
        const { forward, rest } = push(chunks)
        if (at >= 0)
          assert.deepStrictEqual({ forward, rest }, { forward: bytes.slice(0, at), rest: bytes.slice(at + 2) })
        else {
          assert.isUndefined(rest)
          assert.deepStrictEqual(forward, bytes.at(-1) === key ? bytes.slice(0, -1) : bytes)
        }
      })
    )
  })
})
