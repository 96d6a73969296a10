import { existsSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs"
import * as http from "node:http"
import type { AddressInfo } from "node:net"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import { Assets, assetNames } from "../../../src/host/Assets.ts"
import { packages, packagesFor } from "../../../src/host/hostRequirements.ts"
import { type Progress, Setup, type SetupOptions } from "../../../src/host/Setup.ts"
import { SourceTree } from "../../../src/host/SourceTree.ts"
import { Settings } from "../../../src/Settings.ts"
import { type FakeAnswer, fakeCommands } from "../../fakeCommands.ts"
import { temporaryDirectory, write, writeSourceTree } from "../../sourceTree.ts"

const products: Record<string, string> = { kernel: "vmlinux", micro: "base.ext4", debian: "base.ext4" }

/** A host where everything works and apt installs what it is asked for; a test breaks what it is about. */
const host = Effect.gen(function* () {
  const source = yield* temporaryDirectory
  const state = yield* temporaryDirectory
  writeSourceTree(source)
  const installed = new Set(packages)
  const broken = new Set<string>()
  /** Programs that are not on PATH. */
  const missing = new Set<string>()
  /** Packages that apt knows only by name, and not at all. */
  const unknown = new Set<string>()
  const unheard = new Set<string>()
  const ran: Array<string> = []
  const it = {
    uid: 0,
    nodeVersion: "20.20.2",
    release: "bookworm",
    cargo: "cargo 1.95.0 (abc 2026-03-21)" as string | undefined,
    go: "go version go1.26.8 linux/amd64" as string | undefined
  }

  const answer = (argv: ReadonlyArray<string>): FakeAnswer | undefined => {
    const [bin = "", ...args] = argv
    if (missing.has(bin)) return undefined
    if (bin === "dpkg-query") {
      const known = args.filter((arg) => installed.has(arg))
      return { code: known.length === packages.length ? 0 : 1, stdout: known.map((name) => `${name} ii \n`).join("") }
    }
    if (bin === "apt-cache") {
      const candidate = (name: string) => (unknown.has(name) ? "(none)" : "1.0-1")
      const about = (name: string) =>
        `${name}:\n  Installed: (none)\n  Candidate: ${candidate(name)}\n  Version table:\n`
      // of what it has never heard apt-cache says nothing
      return {
        stdout: args
          .slice(1)
          .filter((name) => !unheard.has(name))
          .map(about)
          .join("")
      }
    }
    if (bin === "apt-get") {
      ran.push(argv.join(" "))
      if (args[0] === "install")
        for (const name of args.slice(1).filter((arg) => !arg.startsWith("-"))) installed.add(name)
      return { stdout: "Reading package lists...\n" }
    }
    if (bin === "cargo" && args[0] === "--version") return it.cargo === undefined ? undefined : { stdout: it.cargo }
    if (bin === "cargo") {
      const release = path.join(state, "cache/cargo-target/x86_64-unknown-linux-gnu/release")
      if (args[0] === "clean") {
        if (!args.includes("--target")) return {}
        for (const [at, arg] of args.entries()) {
          if (arg === "--package") rmSync(path.join(release, args[at + 1] ?? ""), { force: true })
        }
        return {}
      }
      ran.push("cargo build")
      // what another checkout has built is as good as new to cargo
      for (const [name, main] of [
        ["machinen-guest", "guest/src/main.rs"],
        ["machinen-shim", "native/shim/src/main.rs"],
        ["machinen-share", "native/share/src/main.rs"]
      ] as const) {
        if (!existsSync(path.join(release, name))) write(release, name, readFileSync(path.join(source, main), "utf8"))
      }
      return { stdout: "   Compiling machinen-guest\n" }
    }
    if (bin === "go" && args[0] === "version") return it.go === undefined ? undefined : { stdout: it.go }
    if (bin === "go") {
      ran.push("go build")
      writeFileSync(args[args.indexOf("-o") + 1] ?? "", "gvproxy")
      return {}
    }
    const [script = "", out = ""] = args
    const name = script.includes("kernel") ? "kernel" : path.basename(script, ".sh")
    ran.push(name)
    if (broken.has(name)) return { code: 2, stdout: "working\nE: mirror is down\n" }
    writeFileSync(path.join(out, products[name] ?? name), name)
    return { stdout: "done\n" }
  }

  const runWith = (options: SetupOptions) =>
    Effect.gen(function* () {
      const events: Array<string> = []
      const lines: Array<string> = []
      const record = (event: Progress) =>
        Effect.sync(() => {
          if (event._tag === "Line") lines.push(`${event.step}: ${event.line}`)
          else events.push(`${event._tag} ${event.step}`)
        })
      ran.length = 0
      const result = yield* Effect.flatMap(Setup, (setup) => setup.run(record, options)).pipe(
        Effect.either,
        Effect.provide(
          Setup.layerFor(it).pipe(
            Layer.provideMerge(Assets.layerWithoutSource),
            Layer.provide(SourceTree.layerTest(source)),
            Layer.provide(Settings.layerTest(state)),
            Layer.provide(Layer.merge(NodeContext.layer, fakeCommands(answer)))
          )
        )
      )
      const error = result._tag === "Left" ? result.left : undefined
      return { error, events, lines, ran: [...ran].sort() }
    })
  return { it, installed, broken, missing, unheard, unknown, source, state, run: runWith({}), runWith }
})

/** Serves a directory's files on loopback. */
const serve = (dir: string) =>
  Effect.acquireRelease(
    Effect.async<http.Server>((resume) => {
      const server = http.createServer((request, response) => {
        const file = path.join(dir, path.normalize(decodeURIComponent(request.url ?? "/")))
        if (existsSync(file)) response.end(readFileSync(file))
        else response.writeHead(404).end()
      })
      server.listen(0, "127.0.0.1", () => resume(Effect.succeed(server)))
    }),
    (server) => Effect.sync(() => void server.close())
  ).pipe(Effect.map((server) => (server.address() as AddressInfo).port))

const everyStep = ["toolchain", "packages", "programs", "gvproxy", "kernel", "base-micro", "base-debian"]

describe("Setup", () => {
  for (const how of ["a directory", "a web server"] as const) {
    it.scoped(`takes assets from ${how} of another host: without a compiler, checked, and none that differ`, () =>
      Effect.gen(function* () {
        const one = yield* host
        yield* one.run
        const store = path.join(one.state, "assets")
        const from =
          how === "a directory" ? store : yield* Effect.map(serve(store), (port) => `http://127.0.0.1:${port}/`)

        const two = yield* host
        two.it.cargo = undefined
        two.it.go = undefined
        const brought = yield* two.runWith({ from })
        assert.isUndefined(brought.error)
        assert.deepStrictEqual(brought.ran, [])
        assert.includeMembers(brought.events, ["Done kernel", "Done programs", "Skipped toolchain"])
        assert.deepStrictEqual((yield* two.run).error, undefined)
        const [kernel = ""] = readdirSync(path.join(two.state, "assets")).filter((name) => name.startsWith("kernel-"))
        assert.strictEqual(readFileSync(path.join(two.state, "assets", kernel, "vmlinux"), "utf8"), "kernel")
        const [programs = ""] = readdirSync(path.join(two.state, "assets")).filter((name) =>
          name.startsWith("programs-")
        )
        assert.notStrictEqual(statSync(path.join(two.state, "assets", programs, "init")).mode & 0o100, 0)

        // other sources: nothing there is for them
        const three = yield* host
        write(three.source, "kernel/config", "another")
        const other = yield* three.runWith({ from })
        assert.isUndefined(other.error)
        assert.deepStrictEqual(other.ran, ["kernel"])

        // a file that is not what its manifest says
        writeFileSync(path.join(store, kernel, "vmlinux"), "KERNEL")
        const four = yield* host
        const damaged = yield* four.runWith({ from })
        assert.strictEqual(damaged.error?.code, "ASSET_PREBUILT_INVALID")
        assert.include(damaged.error?.message, "vmlinux")
        assert.isFalse(existsSync(path.join(four.state, "assets", kernel)))
        writeFileSync(path.join(store, kernel, "asset.json"), "{}")
        assert.strictEqual((yield* four.runWith({ from })).error?.code, "ASSET_PREBUILT_INVALID")
        rmSync(path.join(store, kernel), { recursive: true })
        assert.deepStrictEqual((yield* four.runWith({ from })).ran, ["kernel"])
        const nobody = yield* (yield* host).runWith({ from: "http://127.0.0.1:1/" })
        assert.strictEqual(nobody.error?.code, "ASSET_PREBUILT_INVALID")
      })
    )
  }

  it.scoped("builds again what is damaged: by size at any time, by content if asked", () =>
    Effect.gen(function* () {
      const { run, runWith, state } = yield* host
      yield* run
      const [kernel = ""] = readdirSync(path.join(state, "assets")).filter((name) => name.startsWith("kernel-"))
      const file = path.join(state, "assets", kernel, "vmlinux")
      writeFileSync(file, "KERNEL")
      assert.deepStrictEqual((yield* run).ran, [])
      assert.deepStrictEqual((yield* runWith({ verify: true })).ran, ["kernel"])
      assert.strictEqual(readFileSync(file, "utf8"), "kernel")
      writeFileSync(file, "cut")
      assert.deepStrictEqual((yield* run).ran, ["kernel"])
      rmSync(file)
      assert.deepStrictEqual((yield* run).ran, ["kernel"])
    })
  )

  it.scoped("does what is missing, then finds it all there", () =>
    Effect.gen(function* () {
      const { installed, run } = yield* host
      installed.delete("bison")
      installed.delete("mmdebstrap")
      const first = yield* run
      assert.isUndefined(first.error)
      assert.includeMembers(first.ran, ["apt-get update", "cargo build", "go build", "debian", "kernel", "micro"])
      assert.include(first.ran, "apt-get install --yes --no-install-recommends bison mmdebstrap")
      assert.includeMembers(first.events, ["Skipped toolchain", "Done packages", "Done kernel"])
      assert.include(first.lines, "kernel: done")

      const second = yield* run
      assert.deepStrictEqual(second.ran, [])
      assert.sameMembers(
        second.events,
        everyStep.map((step) => `Skipped ${step}`)
      )
    })
  )

  it.scoped("a user who is not root gets the exact command, and nothing has been tried", () =>
    Effect.gen(function* () {
      const { installed, it, run } = yield* host
      it.uid = 1000
      installed.delete("bison")
      const { error, ran } = yield* run
      assert.strictEqual(error?.code, "SETUP_NOT_ROOT")
      assert.strictEqual(error?.hint, "sudo apt-get update && sudo apt-get install --yes --no-install-recommends bison")
      assert.deepStrictEqual(ran, [])
    })
  )

  it.scoped("users do not get what only tests need; tests get all there is", () =>
    Effect.gen(function* () {
      const { installed, run, runWith } = yield* host
      installed.clear()
      const user = yield* run
      assert.isUndefined(user.error)
      assert.sameMembers([...installed], [...packagesFor(assetNames)])
      assert.notInclude([...installed], "tmux")

      // now that every asset is there
      const tests = yield* runWith({ withTests: true })
      assert.isUndefined(tests.error)
      assert.sameMembers([...installed], [...packages])
      assert.deepStrictEqual((yield* runWith({ withTests: true })).ran, [])
    })
  )

  it.scoped("a host that brings its assets gets no compiler", () =>
    Effect.gen(function* () {
      const one = yield* host
      yield* one.run
      const two = yield* host
      two.installed.clear()
      assert.isUndefined((yield* two.runWith({ from: path.join(one.state, "assets") })).error)
      assert.sameMembers([...two.installed], [...packagesFor([])])
      assert.notInclude([...two.installed], "gcc")
    })
  )

  it.scoped("a tool that cannot be started is told with what it was to do", () =>
    Effect.gen(function* () {
      const { installed, missing, run } = yield* host
      installed.delete("bison")
      missing.add("apt-get")
      const { error } = yield* run
      assert.strictEqual(error?.code, "ASSET_BUILD_FAILED")
      assert.strictEqual(error?.message, "cannot update the package lists")
    })
  )

  it.scoped("a package that apt does not have is named, with the suites to add", () =>
    Effect.gen(function* () {
      const { installed, it, run, unheard, unknown } = yield* host
      installed.clear()
      unknown.add("linux-source-6.12")
      unheard.add("umoci")
      const { error, ran } = yield* run
      assert.strictEqual(error?.code, "SETUP_PACKAGE_UNAVAILABLE")
      assert.strictEqual(error?.message, "apt has no package linux-source-6.12, umoci")
      assert.include(error?.hint, "bookworm-security")
      assert.deepStrictEqual(ran, ["apt-get update"])

      it.release = "noble"
      assert.include((yield* run).error?.hint, "Debian 12 (bookworm) and Debian 13 (trixie)")
    })
  )

  it.scoped("root is not asked for when nothing is missing", () =>
    Effect.gen(function* () {
      const { it, run } = yield* host
      it.uid = 1000
      assert.isUndefined((yield* run).error)
    })
  )

  it.scoped("one step that fails does not cost the others, and is all that the next run does", () =>
    Effect.gen(function* () {
      const { broken, run, state } = yield* host
      broken.add("debian")
      const first = yield* run
      assert.strictEqual(first.error?.code, "ASSET_BUILD_FAILED")
      assert.include(String(first.error?.cause), "E: mirror is down")
      const log = path.join(state, "cache", "setup", "base-debian.log")
      assert.include(first.error?.hint, log)
      assert.strictEqual(readFileSync(log, "utf8"), "working\nE: mirror is down\n")
      assert.includeMembers(first.events, ["Failed base-debian", "Done kernel", "Done programs", "Done base-micro"])
      assert.isTrue(existsSync(path.join(state, "assets")))

      broken.clear()
      const second = yield* run
      assert.isUndefined(second.error)
      assert.deepStrictEqual(second.ran, ["debian"])
      assert.strictEqual(readFileSync(log, "utf8"), "done\n")
    })
  )

  it.scoped("only the changed asset is built again", () =>
    Effect.gen(function* () {
      const { run, source, state } = yield* host
      yield* run
      write(source, "guest/src/main.rs", "fn main() { loop {} }\n")
      assert.deepStrictEqual((yield* run).ran, ["cargo build"])
      const built = readdirSync(path.join(state, "assets")).filter((name) => name.startsWith("programs-"))
      const inits = built.map((name) => readFileSync(path.join(state, "assets", name, "init"), "utf8"))
      assert.lengthOf(new Set(inits), 2)
    })
  )

  it.scoped("a missing or old cargo ends it at once, unless there is nothing to compile", () =>
    Effect.gen(function* () {
      const { it, run } = yield* host
      it.cargo = undefined
      const missing = yield* run
      assert.strictEqual(missing.error?.code, "SETUP_TOOL_MISSING")
      assert.include(missing.error?.hint, "rustup.rs")
      assert.deepStrictEqual(missing.ran, [])

      it.cargo = "cargo 1.65.0"
      const old = yield* run
      assert.include(old.error?.message, "1.65.0 is too old")

      it.cargo = "cargo 1.95.0"
      yield* run
      it.cargo = undefined
      assert.isUndefined((yield* run).error)
    })
  )

  it.scoped("the same of go", () =>
    Effect.gen(function* () {
      const { it, run } = yield* host
      it.go = undefined
      const missing = yield* run
      assert.strictEqual(missing.error?.code, "SETUP_TOOL_MISSING")
      assert.include(missing.error?.hint, "go.dev")
      assert.deepStrictEqual(missing.ran, [])

      it.go = "go version go1.19.8 linux/amd64"
      assert.include((yield* run).error?.message, "1.19.8 is too old")

      it.go = "go version go1.25.0 linux/amd64"
      assert.isUndefined((yield* run).error)
    })
  )

  it.scoped("an old Node is named", () =>
    Effect.gen(function* () {
      const { it, run } = yield* host
      it.nodeVersion = "18.20.4"
      const { error } = yield* run
      assert.strictEqual(error?.code, "SETUP_TOOL_MISSING")
      assert.include(error?.message, "18.20.4")
    })
  )
})
