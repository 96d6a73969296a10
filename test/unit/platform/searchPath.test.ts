import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import * as command from "../../../src/platform/command.ts"
import { searchPath } from "../../../src/platform/searchPath.ts"
import * as streamCommand from "../../../src/platform/streamCommand.ts"

/** The PATH of a Debian user who is not root. */
const withoutSystemPrograms = Effect.acquireRelease(
  Effect.sync(() => {
    const before = process.env["PATH"]
    process.env["PATH"] = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
    return before
  }),
  (before) =>
    Effect.sync(() => {
      if (before === undefined) delete process.env["PATH"]
      else process.env["PATH"] = before
    })
)

describe("searchPath", () => {
  it("adds the directories of system programs, last and once", () => {
    assert.strictEqual(searchPath("/a:/usr/bin"), "/a:/usr/bin:/usr/sbin:/sbin")
    assert.strictEqual(searchPath("/sbin:/usr/sbin:/bin"), "/sbin:/usr/sbin:/bin")
    assert.strictEqual(searchPath("/usr/bin:"), "/usr/bin:/usr/sbin:/sbin") // an empty entry would be the current directory
  })

  it.scoped("a host program in /usr/sbin is found for a user whose PATH lacks it", () =>
    Effect.gen(function* () {
      yield* withoutSystemPrograms
      const short = yield* command.run(["mke2fs", "-V"])
      assert.strictEqual(short.code, 0)
      assert.match(short.stderr, /^mke2fs \d/)
      const inShell = yield* command.run(["sh", "-c", "command -v debugfs"])
      assert.match(inShell.stdout, /\/debugfs\n$/)
      const long = yield* streamCommand.run(["mke2fs", "-V"], { onLine: () => Effect.void })
      assert.strictEqual(long.code, 0)
      assert.match(long.tail[0] ?? "", /^mke2fs \d/)
    }).pipe(Effect.provide(NodeContext.layer))
  )
})
