import { truncateSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { NodeContext } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { probeHash } from "../../../src/platform/probeHash.ts"
import { temporaryDirectory } from "../../sourceTree.ts"

describe("a look at a file's ends", () => {
  it.scoped("sees no difference between a hole and zeros, and any other", () =>
    Effect.gen(function* () {
      const dir = yield* temporaryDirectory
      const file = path.join(dir, "file")
      const looked = (content: Buffer, size: number) =>
        Effect.suspend(() => {
          writeFileSync(file, content)
          truncateSync(file, size)
          return probeHash(file)
        })
      const block = Buffer.alloc(4096, 1)
      const at = (offset: number) => Buffer.concat([Buffer.alloc(offset), block])
      const size = 8 * 2 ** 20
      const head = yield* looked(at(4096), size)
      assert.strictEqual(yield* looked(Buffer.concat([at(4096), Buffer.alloc(100_000)]), size), head)
      assert.notStrictEqual(yield* looked(at(8192), size), head)
      assert.notStrictEqual(yield* looked(at(size - 4096), size), yield* looked(at(size - 8192), size))
    }).pipe(Effect.provide(NodeContext.layer))
  )
})
