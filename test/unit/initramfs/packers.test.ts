import { execFileSync } from "node:child_process"
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import { Assets } from "../../../src/host/Assets.ts"
import { SourceTree } from "../../../src/host/SourceTree.ts"
import * as Packers from "../../../src/initramfs/index.ts"
import { Settings } from "../../../src/Settings.ts"
import { temporaryDirectory } from "../../fixtures.ts"

const dir = temporaryDirectory()
const services = Assets.layerWithoutSource.pipe(
  Layer.provide(SourceTree.layerTest(dir)),
  Layer.provide(Settings.layerTest(dir)),
  Layer.provideMerge(NodeContext.layer)
)

const initPath = path.join(dir, "init")
writeFileSync(initPath, "fresh init")
const agentPath = path.join(dir, "agent")
writeFileSync(agentPath, "fresh agent")

/** Makes files below a new directory; a trailing slash is a directory, `->` a link. */
const treeOf = (files: Readonly<Record<string, string>>): string => {
  const root = temporaryDirectory()
  for (const [name, content] of Object.entries(files)) {
    const file = path.join(root, name)
    mkdirSync(name.endsWith("/") ? file : path.dirname(file), { recursive: true })
    if (content.startsWith("->")) symlinkSync(content.slice(2), file)
    else if (!name.endsWith("/")) writeFileSync(file, content)
  }
  return root
}
const config = JSON.stringify({ cmd: ["sh"], env: { A: "bundle", B: "bundle" } })
const bundleDir = (files: Readonly<Record<string, string>> = {}) => treeOf({ "machinen-config.json": config, ...files })

/** What cpio makes of an archive: `mode name`, in order. */
const listed = (archive: string) =>
  execFileSync("cpio", ["--list", "--verbose", "--numeric-uid-gid", "--quiet", "--file", archive], { encoding: "utf8" })
    .trimEnd()
    .split("\n")
    .map((line) => line.split(/\s+/))
    .map(
      (parts) => `${parts[0]} ${parts.slice(parts.findIndex((part) => /^\d{4}$|^\d\d:\d\d$/.test(part)) + 1).join(" ")}`
    )
const content = (archive: string, name: string) =>
  execFileSync("cpio", ["--extract", "--to-stdout", "--quiet", "--file", archive, name], { encoding: "utf8" })

let count = 0
/** Runs a packer, and gives where it wrote to. */
const packed = <E>(pack: (out: string) => Effect.Effect<void, E, Packers.Services>) => {
  const out = path.join(dir, "archives", `${++count}.cpio`)
  return Effect.as(Effect.provide(pack(out), services), out)
}
/** Fails, and leaves nothing behind: neither an archive nor a tree. */
const failed = <E>(pack: (out: string) => Effect.Effect<void, E, Packers.Services>) =>
  Effect.gen(function* () {
    const out = path.join(temporaryDirectory(), "out")
    const unpackedTrees = () => readdirSync(os.tmpdir()).filter((name) => name.startsWith("machinen-initramfs-"))
    const before = unpackedTrees()
    const error = yield* Effect.flip(Effect.provide(pack(out), services))
    assert.deepStrictEqual(readdirSync(path.dirname(out)), [])
    assert.deepStrictEqual(unpackedTrees(), before)
    return error
  })

const stubs = ["drwxr-xr-x dev", "drwxr-xr-x etc"]
const finals = ["-rwxr-xr-x init", "-rw-r--r-- machinen-config.json", "-rw-r--r-- etc/machinen-boot-epoch"]
const last = ["crw------- dev/console", "drwxrwxrwt tmp"]

describe("an initramfs archive", () => {
  it.effect("tiny: holds exactly configuration, init and what the kernel needs", () =>
    Effect.gen(function* () {
      const bundle = bundleDir({ "rootfs/ignored": "x" })
      const out = yield* packed((out) => Packers.tinyBundle({ bundle, out, initPath, env: { A: "extra", C: "extra" } }))
      assert.deepStrictEqual(listed(out), ["drwxr-xr-x .", ...stubs, ...finals, ...last])
      assert.deepStrictEqual(JSON.parse(content(out, "machinen-config.json")), {
        cmd: ["sh"],
        env: { A: "bundle", B: "bundle", C: "extra" }
      })
      assert.strictEqual(content(out, "init"), "fresh init")
      const epoch = Number(content(out, "etc/machinen-boot-epoch"))
      assert.isAtMost(Math.abs(Date.now() / 1000 - epoch), 60)
      const head = readFileSync(out)
      assert.strictEqual(head.subarray(0, 6).toString(), "070701")
      assert.strictEqual(head.length % 4, 0)
      assert.match(
        execFileSync("cpio", ["-tv", "--quiet", "--file", out], { encoding: "utf8" }),
        /5, +1 .* dev\/console/
      )

      const mounted = yield* packed((out) => Packers.tinyBundle({ bundle, out, initPath, mountGuest: "/mnt/work" }))
      assert.deepStrictEqual(listed(mounted), [
        "drwxr-xr-x .",
        ...stubs,
        ...finals,
        "-rw-r--r-- etc/machinen-mountdisk-guest",
        ...last
      ])
      assert.strictEqual(content(mounted, "etc/machinen-mountdisk-guest"), "/mnt/work")
    })
  )

  it.effect("bundle: base, mount and bundle in that order, fresh init and agent over all", () =>
    Effect.gen(function* () {
      const base = path.join(dir, "base.tar.gz")
      const below = treeOf({
        "etc/who": "base",
        "etc/only-base": "base",
        "srv/was-a-directory/file": "base",
        "bin/tool": "base",
        init: "old init",
        "exec-agent": "old agent",
        "sticky/": ""
      })
      chmodSync(path.join(below, "bin/tool"), 0o4755)
      chmodSync(path.join(below, "sticky"), 0o1777)
      execFileSync("tar", ["-czf", base, "-C", below, "."])
      const host = treeOf({ who: "mount", "only-mount": "mount", link: "->who" })
      const bundle = bundleDir({
        "rootfs/etc/who": "bundle",
        "rootfs/srv/was-a-directory": "a file",
        "rootfs/etc/only-bundle": "x"
      })
      const mount = { host, guest: "/etc" }
      const out = yield* packed((out) =>
        Packers.bundle({ bundle, base, mount, out, initPath, execAgentPath: agentPath })
      )
      const names = listed(out)
      assert.strictEqual(content(out, "etc/who"), "bundle")
      assert.strictEqual(content(out, "etc/only-base"), "base")
      assert.strictEqual(content(out, "etc/only-mount"), "mount")
      assert.strictEqual(content(out, "srv/was-a-directory"), "a file")
      assert.include(names, "lrwxrwxrwx etc/link -> who")
      assert.include(names, "-rwsr-xr-x bin/tool")
      assert.include(names, "drwxrwxrwt sticky")
      assert.isFalse(names.some((name) => name.includes("was-a-directory/file")))
      assert.deepStrictEqual([content(out, "init"), content(out, "exec-agent")], ["fresh init", "fresh agent"])
      assert.strictEqual(names.filter((name) => / (init|exec-agent)$/.test(name)).length, 2)
      assert.isAbove(
        names.findIndex((name) => name.endsWith(" init")),
        names.findIndex((name) => name.endsWith(" srv"))
      )
      // where the agent is not there, it is left out
      const none = yield* packed((out) => Packers.bundle({ bundle, out, initPath, execAgentPath: "/nowhere" }))
      assert.isFalse(listed(none).some((name) => name.endsWith("exec-agent")))
    })
  )

  it.effect("rootfs: leaves out what is excluded, and is in order of names", () =>
    Effect.gen(function* () {
      const rootfs = treeOf({
        "usr/share/doc/a": "1",
        "usr/share/doc/deep/er": "1",
        "usr/share/keep": "1",
        "var/cache/x.bin": "1",
        "a-b": "1",
        "a/c": "1",
        "debug.log": "1"
      })
      execFileSync("mkfifo", [path.join(rootfs, "fifo")])
      const excludes = Packers.parseExcludes("# comment\nusr/share/doc/*  # all of it\n\n  *.log\nvar/cach[e]\n")
      assert.deepStrictEqual(excludes, ["usr/share/doc/*", "*.log", "var/cach[e]"])
      const out = yield* packed((out) => Packers.rootfs({ rootfs, out, initPath, excludes }))
      const names = listed(out).map((line) => line.split(" ")[1])
      assert.deepStrictEqual(names.slice(0, -4), [
        ...[".", "a", "a-b", "a/c", "dev", "etc", "usr", "usr/share", "usr/share/doc", "usr/share/keep", "var"]
      ])
      const own = path.join(dir, "own.json")
      writeFileSync(own, "{}")
      const configured = yield* packed((out) => Packers.rootfs({ rootfs, out, initPath, config: own }))
      assert.strictEqual(content(configured, "machinen-config.json"), "{}")
    })
  )

  it.effect("bundle: what a directory held goes with it when a file takes its place", () =>
    Effect.gen(function* () {
      const base = treeOf({ "a/old": "1", "a/deep/er": "1", "a-b": "1", "b/kept": "1" })
      const tar = path.join(dir, "replaced.tar")
      execFileSync("tar", ["--create", "--file", tar, "--directory", base, "."])
      const bundle = bundleDir({ "rootfs/a": "a file", "rootfs/b/": "" })
      const out = yield* packed((out) => Packers.bundle({ bundle, out, initPath, base: tar }))
      const names = listed(out).map((line) => line.split(" ")[1])
      assert.deepStrictEqual(names.slice(0, 5), [".", "a", "a-b", "b", "b/kept"])
      assert.strictEqual(content(out, "a"), "a file")
    })
  )

  it.effect(
    "of 20,000 files does not take the square of their number",
    () =>
      Effect.gen(function* () {
        const workspace = temporaryDirectory()
        for (let n = 0; n < 20_000; n++) writeFileSync(path.join(workspace, String(n)), "")
        const before = process.cpuUsage()
        const out = yield* packed((out) => Packers.workspace({ workspace, out }))
        const { system, user } = process.cpuUsage(before)
        assert.isBelow((system + user) / 1e6, 15, "seconds of CPU; 35 when it did")
        const names = execFileSync("cpio", ["--list", "--quiet", "--file", out], { encoding: "utf8" })
        assert.lengthOf(names.trimEnd().split("\n"), 20_002)
      }),
    60_000
  )

  it.effect("workspace: is a tree below its mount point, without excluded files, up to a size", () =>
    Effect.gen(function* () {
      const workspace = treeOf({
        "src/a.ts": "x",
        "node_modules/m/index.js": "x",
        "src/.git/HEAD": "x",
        ".DS_Store": "x"
      })
      const out = yield* packed((out) => Packers.workspace({ workspace, out }))
      assert.deepStrictEqual(
        listed(out).map((line) => line.split(" ")[1]),
        [".", "workspace", "workspace/src", "workspace/src/a.ts"]
      )
      const other = yield* packed((out) =>
        Packers.workspace({ workspace, out, mountpoint: "/srv/code", excludes: ["src"] })
      )
      assert.deepStrictEqual(
        listed(other).map((line) => line.split(" ")[1]),
        [
          ".",
          "srv",
          "srv/code",
          "srv/code/.DS_Store",
          "srv/code/node_modules",
          "srv/code/node_modules/m",
          "srv/code/node_modules/m/index.js"
        ]
      )
      writeFileSync(path.join(workspace, "large"), Buffer.alloc(2 * 1024 ** 2))
      const large = yield* failed((out) => Packers.workspace({ workspace, out, maxMb: 2 }))
      assert.strictEqual(large.code, "MKINITRAMFS_WORKSPACE_TOO_LARGE")
      for (const not of [path.join(workspace, "large"), "/nowhere"]) {
        const error = yield* failed((out) => Packers.workspace({ workspace: not, out }))
        assert.strictEqual(error.code, "MKINITRAMFS_WORKSPACE_INVALID")
      }
    })
  )

  it.effect("needs an init, unless it may do without", () =>
    Effect.gen(function* () {
      const error = yield* failed((out) => Packers.minimal({ out, initPath: "/nowhere" }))
      assert.strictEqual(error.code, "MKINITRAMFS_INIT_MISSING")
      const missing = yield* failed((out) => Packers.minimal({ out }))
      assert.strictEqual(missing.code, "ASSET_SOURCE_MISSING") // there is no checkout in this test
      const before = process.env["MACHINEN_REQUIRE_FIXTURES"]
      process.env["MACHINEN_REQUIRE_FIXTURES"] = "0"
      const out = yield* packed((out) => Packers.minimal({ out, initPath: "/nowhere" })).pipe(
        Effect.ensuring(
          Effect.sync(() => {
            if (before === undefined) delete process.env["MACHINEN_REQUIRE_FIXTURES"]
            else process.env["MACHINEN_REQUIRE_FIXTURES"] = before
          })
        )
      )
      assert.isFalse(listed(out).some((name) => name.endsWith(" init")))
    })
  )

  it.effect("fails with its code, and leaves nothing and what was there as it was", () =>
    Effect.gen(function* () {
      for (const bundle of ["/nowhere", treeOf({ x: "" }), treeOf({ "machinen-config.json": "{" })]) {
        for (const pack of [Packers.tinyBundle, Packers.bundle]) {
          assert.strictEqual(
            (yield* failed((out) => pack({ bundle, out, initPath }))).code,
            "MKINITRAMFS_BUNDLE_INVALID"
          )
        }
      }
      const broken = path.join(dir, "broken.tar.gz")
      writeFileSync(broken, "no archive")
      for (const base of [broken, "/nowhere"]) {
        const error = yield* failed((out) => Packers.bundle({ bundle: bundleDir(), base, out, initPath }))
        assert.strictEqual(error.code, "MKINITRAMFS_BASE_EXTRACT_FAILED")
      }
      const there = path.join(dir, "there")
      writeFileSync(there, "as it was")
      yield* Effect.flip(Effect.provide(Packers.minimal({ out: there, initPath: "/nowhere" }), services))
      assert.strictEqual(readFileSync(there, "utf8"), "as it was")
    })
  )

  it.effect("is made by every packer from a command line", () =>
    Effect.gen(function* () {
      const bundle = bundleDir({ "rootfs/x": "1", "rootfs/skip.log": "1" })
      const base = path.join(dir, "cli-base.tar")
      execFileSync("tar", ["-cf", base, "-C", treeOf({ "from-base": "1" }), "."])
      const patterns = path.join(dir, "excludes")
      writeFileSync(patterns, "*.log # noise\n")
      const run = (...argv: ReadonlyArray<string>) =>
        Effect.map(
          packed((out) => Packers.cli([...argv, "--out", out])),
          (out) => listed(out).map((line) => line.split(" ")[1])
        )
      const init = ["--init", initPath]
      const small = ["init", "etc/machinen-boot-epoch", "dev/console", "tmp"]
      assert.deepStrictEqual(yield* run(...init), [".", "dev", "etc", ...small])
      assert.include(yield* run("--bundle", bundle, "--tiny", ...init), "machinen-config.json")
      const whole = yield* run("--bundle", bundle, "--base", base, "--excludes", patterns, ...init)
      assert.includeMembers(whole, ["from-base", "x", "machinen-config.json"])
      assert.notInclude(whole, "skip.log")
      assert.include(yield* run("--rootfs", path.join(bundle, "rootfs"), ...init), "skip.log")
      assert.include(yield* run("--workspace", bundle, "--mountpoint", "w"), "w/rootfs/x")
      for (const [argv, code] of [
        [["--surprise"], "PARSE_FLAG_UNKNOWN"],
        [["--rootfs", dir, "--bundle", dir, "--out", "x"], "PARSE_FLAG_MALFORMED"],
        [["--rootfs", dir], "PARSE_FLAG_MISSING_VALUE"],
        [["--workspace", dir, "--max-mb", "many", "--out", "x"], "PARSE_FLAG_MALFORMED"],
        [["--excludes", "/nowhere", "--out", "x"], "PARSE_FLAG_MALFORMED"]
      ] as const) {
        assert.strictEqual((yield* failed(() => Packers.cli(argv))).code, code)
      }
      assert.isFalse(existsSync("x"))
    })
  )
})
