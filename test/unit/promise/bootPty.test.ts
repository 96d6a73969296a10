import { assert, describe, it } from "@effect/vitest"
import { bootPty, isMachinenError, type PtyBootOptions, Sandboxes } from "../../../src/promise.ts"
import { executable, temporaryDirectory } from "../../fixtures.ts"

const dir = temporaryDirectory()
const script = (body: string, options: Partial<PtyBootOptions> = {}) =>
  bootPty({ binary: executable(dir, `script-${Math.random()}`, body), ...options })

const seen = async (handle: ReturnType<typeof bootPty>, text: string) => {
  for (const began = Date.now(); !(await handle.output()).includes(text); await new Promise(setImmediate)) {
    if (Date.now() - began > 10_000) throw new Error(`waited in vain for ${text} in ${await handle.output()}`)
  }
}

describe("a program in a terminal", () => {
  it("has the size, TERM, environment, directory and arguments it is given, and a code", async () => {
    const handle = script('stty size; echo $TERM $A "$@"; pwd; exit 5', {
      cols: 91,
      rows: 17,
      name: "vt100",
      env: { A: "env" },
      args: ["one", "two words"],
      cwd: "/etc"
    })
    assert.strictEqual(handle.stdout, handle.stderr)
    assert.deepStrictEqual(await handle.wait(), { code: 5, signal: null })
    assert.strictEqual(await handle.output(), "17 91\r\nvt100 env one two words\r\n/etc\r\n")
    assert.strictEqual(await handle.errorOutput(), await handle.output())
    handle.resize(10, 10)
    await handle.kill()
  })

  it("is 80 by 24 and an xterm unless told otherwise, is typed into and resized", async () => {
    const handle = script(
      "stty size; echo $TERM; trap 'stty size' WINCH; while :; do read -r line && echo got $line; done"
    )
    await seen(handle, "24 80\r\nxterm-256color")
    handle.stdin.write("keys\r")
    await seen(handle, "got keys")
    handle.resize(50, 10)
    await seen(handle, "10 50")
    handle.stdin.write(Buffer.from([3]))
    assert.deepStrictEqual(await handle.wait(), { code: null, signal: "SIGINT" })
  })

  it("is killed", async () => {
    const handle = script("trap '' HUP INT TERM; echo ready; while :; do sleep 0.05; done")
    await seen(handle, "ready")
    await handle.kill()
    assert.deepStrictEqual(await handle.wait(), { code: null, signal: "SIGKILL" })
    await handle.kill()
  })

  it("is one of the sandboxes", async () => {
    const sandboxes = new Sandboxes()
    // It ends only after its output was seen: node-pty waits 200 ms at most for what is unread when a program has ended.
    const handle = script("read -r line; echo got $line; read -r end")
    sandboxes.add("pty", handle)
    sandboxes.send("pty", "it\r")
    await seen(handle, "got it\r\n")
    assert.include(sandboxes.get("pty")?.scrollback.toString(), "got it\r\n")
    sandboxes.send("pty", "\r")
    await handle.wait()
    await sandboxes.end("pty")?.ended
    assert.isTrue(sandboxes.end("pty")?.isEnded)
  })

  const refused: ReadonlyArray<readonly [what: string, options: PtyBootOptions, code: string]> = [
    ["a program that is not there", { binary: "/no/such" }, "BOOT_VMM_MISSING"],
    ["a directory", { binary: "/etc" }, "BOOT_VMM_MISSING"],
    ["a name in PATH", { binary: "sh", cwd: "/" }, "BOOT_VMM_MISSING"],
    ["no columns", { binary: "/bin/sh", cols: 0 }, "EXEC_TERMINAL_SIZE_INVALID"],
    ["65536 rows", { binary: "/bin/sh", rows: 65_536 }, "EXEC_TERMINAL_SIZE_INVALID"]
  ]
  for (const [what, options, code] of refused) {
    it(`is refused: ${what}`, () => {
      let error: unknown
      try {
        bootPty(options)
      } catch (thrown) {
        error = thrown
      }
      assert.isTrue(isMachinenError(error, code as "BOOT_VMM_MISSING"), String(error))
    })
  }
})
