import { spawnSync } from "node:child_process"
import { assert, describe, it } from "@effect/vitest"
import * as Initramfs from "../../../src/guest/Initramfs.ts"

const guest: Initramfs.GuestConfig = {
  config: { cmd: ["sh", "-c", "echo 'hi'"], env: { A: "ü" }, cwd: "/srv" },
  boot: { version: 1, id: "abcdefabcdef", hostname: "web", root: "overlay" }
}
const archive = Initramfs.forBoot(Buffer.from("#!init"), guest)

const cpio = (args: ReadonlyArray<string>, input: Buffer) => {
  const done = spawnSync("cpio", args, { input })
  assert.strictEqual(done.status, 0, done.stderr.toString())
  return done.stdout.toString()
}

describe("initramfs", () => {
  it("is an archive that cpio reads, with exactly these entries", () => {
    const lines = cpio(["--list", "--verbose", "--numeric-uid-gid", "--quiet"], archive).trim().split("\n")
    const entries = lines.map((line) => line.split(/\s+/)).map((parts) => `${parts[0]} ${parts.at(-1)}`)
    assert.deepStrictEqual(entries, [
      "drwxr-xr-x .",
      "drwxr-xr-x dev",
      "crw------- dev/console",
      "-rwxr-xr-x init",
      "-rw-r--r-- machinen-config.json",
      "-rw-r--r-- machinen-boot.json"
    ])
    assert.match(lines[2] ?? "", /5,\s*1/)
  })

  it("holds the configuration as it was given", () => {
    const text = cpio(["--extract", "--to-stdout", "--quiet", "machinen-config.json"], archive)
    assert.deepStrictEqual(JSON.parse(text), guest.config)
  })

  it("is the same for the same input, and padded to four bytes", () => {
    assert.isTrue(archive.equals(Initramfs.forBoot(Buffer.from("#!init"), guest)))
    for (let length = 0; length < 9; length++) {
      const one = Initramfs.cpio([{ name: "f".repeat(length + 1), mode: 0o100644, data: Buffer.alloc(length, 1) }])
      assert.strictEqual(one.length % 4, 0)
      assert.strictEqual(cpio(["--list", "--quiet"], one).trim(), "f".repeat(length + 1))
    }
  })
})
