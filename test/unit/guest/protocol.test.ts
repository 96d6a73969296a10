import { readFileSync } from "node:fs"
import { assert, describe, it } from "@effect/vitest"
import { FastCheck as fc, Schema } from "effect"
import {
  AgentRequest,
  encodeFrame,
  FileChange,
  type Frame,
  FrameDecoder,
  FrameType,
  FrameViolation
} from "../../../src/guest/AgentProtocol.ts"

const Golden = Schema.parseJson(
  Schema.Struct({
    valid: Schema.Array(
      Schema.Struct({
        name: Schema.String,
        hex: Schema.String,
        type: Schema.String,
        json: Schema.optional(Schema.Unknown),
        bytes: Schema.optional(Schema.String)
      })
    ),
    invalid: Schema.Array(Schema.Struct({ name: Schema.String, hex: Schema.String, reason: Schema.String }))
  })
)
const golden = Schema.decodeSync(Golden)(readFileSync("test/golden/agent-frames.json", "utf8"))

/** Pieces of one frame joined again, so that how the bytes were cut does not show. */
const join = (frames: ReadonlyArray<Frame>): ReadonlyArray<readonly [type: number, hex: string]> => {
  const joined: Array<[number, string]> = []
  for (const { payload, type } of frames) {
    const last = joined.at(-1)
    const hex = Buffer.from(payload).toString("hex")
    if (last !== undefined && last[0] === type && type !== FrameType.request) last[1] += hex
    else joined.push([type, hex])
  }
  return joined
}

const decode = (bytes: Uint8Array, cuts: ReadonlyArray<number>) => {
  const decoder = new FrameDecoder()
  const frames: Array<Frame> = []
  let from = 0
  for (const cut of [...cuts].sort((a, b) => a - b).concat(bytes.length)) {
    frames.push(...decoder.push(bytes.subarray(from, cut)))
    from = cut
  }
  return { frames, atBoundary: decoder.atBoundary }
}

describe("agent frames", () => {
  it("the golden file covers every type", () => {
    assert.deepStrictEqual(new Set(golden.valid.map((frame) => frame.type)), new Set<string>(Object.keys(FrameType)))
    assert.isAbove(golden.invalid.length, 0)
  })

  for (const { bytes, hex, json, name, type } of golden.valid) {
    it(`golden: ${name}`, () => {
      const wire = Buffer.from(hex, "hex")
      const { atBoundary, frames } = decode(wire, [])
      assert.isTrue(atBoundary)
      const expectedType = FrameType[type as keyof typeof FrameType]
      const payload = Buffer.concat(frames.map((frame) => frame.payload))
      for (const frame of frames) assert.strictEqual(frame.type, expectedType)
      if (json !== undefined) assert.deepStrictEqual(JSON.parse(payload.toString()), json)
      if (bytes !== undefined) assert.strictEqual(payload.toString("hex"), bytes)
      if (type === "request")
        assert.strictEqual(Schema.decodeUnknownEither(AgentRequest)(JSON.parse(payload.toString()))._tag, "Right", name)
      assert.strictEqual(encodeFrame(expectedType, payload).toString("hex"), hex)
    })
  }

  it("golden: a guest's changes", () => {
    const { bytes = "" } = golden.valid.find(({ name }) => name === "data, changes") ?? {}
    const lines = Buffer.from(bytes, "hex").toString().trimEnd().split("\n")
    const changes = lines.map((line) => Schema.decodeSync(Schema.parseJson(FileChange))(line))
    assert.deepStrictEqual(
      changes.map(({ kind }) => kind),
      ["created", "modified", "moved", "removed", "lost"]
    )
    // a byte that is not UTF-8 is a lone surrogate, as in Python's surrogateescape
    assert.deepStrictEqual(changes[3], { kind: "removed", path: 'b/\udcff"' })
  })

  for (const { hex, name, reason } of golden.invalid) {
    it(`golden, refused: ${name} (${reason})`, () => {
      const decoder = new FrameDecoder()
      const refused = (() => {
        try {
          const frames = decoder.push(Buffer.from(hex, "hex"))
          return !decoder.atBoundary || frames.length === 0 // not a whole frame
        } catch (error) {
          return error instanceof FrameViolation
        }
      })()
      assert.isTrue(refused)
    })
  }

  const frame = fc.record({
    type: fc.constantFrom(FrameType.data, FrameType.stdout, FrameType.stderr, FrameType.end, FrameType.eof),
    payload: fc.uint8Array({ maxLength: 300 })
  })

  it("decodes the same however the bytes are cut", () => {
    fc.assert(
      fc.property(fc.array(frame, { maxLength: 8 }), fc.array(fc.nat(4000), { maxLength: 12 }), (frames, cuts) => {
        const whole = frames.map(({ payload, type }) =>
          encodeFrame(type, type === FrameType.eof ? new Uint8Array(0) : payload)
        )
        const bytes = Buffer.concat(whole)
        const inside = cuts.map((cut) => (bytes.length === 0 ? 0 : cut % bytes.length))
        const cut = decode(bytes, inside)
        assert.isTrue(cut.atBoundary)
        assert.deepStrictEqual(join(cut.frames), join(decode(bytes, []).frames))
      })
    )
  })

  it("arbitrary bytes are frames or a violation, never anything else", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 2000 }), (bytes) => {
        try {
          decode(bytes, [])
        } catch (error) {
          assert.instanceOf(error, FrameViolation)
        }
      })
    )
  })
})
