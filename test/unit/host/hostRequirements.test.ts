import { spawnSync } from "node:child_process"
import { existsSync, readdirSync, readFileSync, realpathSync } from "node:fs"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import {
  basePackages,
  buildPackages,
  isAtLeast,
  type Packages,
  packages,
  packagesFor,
  runPackages,
  testPackages,
  toolchainPrograms,
  versionIn
} from "../../../src/host/hostRequirements.ts"
import { searchPath } from "../../../src/platform/searchPath.ts"
import { inGo, inRust, inShell, inTypeScript } from "../../startedPrograms.ts"

const root = path.resolve(import.meta.dirname, "..", "..", "..")
const sources = ["src", "backends", "test", "bench", "scripts", "native", "guest", "gvproxy", "kernel", "bases", ".ci"]
  .flatMap((dir) =>
    readdirSync(path.join(root, dir), { recursive: true, encoding: "utf8" }).map((file) => path.join(dir, file))
  )
  .filter((file) => /\.(ts|mjs|rs|go|sh)$/.test(file) || file === ".ci/run")
  .filter((file) => !file.includes("/target/") && file !== "test/unit/host/hostRequirements.test.ts")
  .map((file) => ({ path: file, text: readFileSync(path.join(root, file), "utf8") }))
const ending = (...ends: ReadonlyArray<string>) => sources.filter((file) => ends.some((end) => file.path.endsWith(end)))

/** Each program that some source starts, with the files that do. */
const started = new Map<string, Set<string>>()
const note = (name: string, file: string) => started.set(name, (started.get(name) ?? new Set()).add(file))
for (const [name, files] of inTypeScript(ending(".ts", ".mjs"))) for (const file of files) note(name, file)
for (const { path: file, text } of ending(".sh", ".ci/run")) for (const name of inShell(text)) note(name, file)
// the guest's programs are those of its image
for (const { path: file, text } of ending(".rs").filter(({ path: file }) => !file.startsWith("guest/"))) {
  for (const name of inRust(text)) note(name, file)
}
for (const { path: file, text } of ending(".go")) for (const name of inGo(text)) note(name, file)
const readme = readFileSync(path.join(root, "README.md"), "utf8")
for (const [, session = ""] of readme.matchAll(/^```sh\n([\s\S]*?)^```/gm)) {
  for (const name of inShell(session)) note(name, "README.md")
}
const scripts: Readonly<Record<string, string>> = JSON.parse(
  readFileSync(path.join(root, "package.json"), "utf8")
).scripts
for (const script of Object.values(scripts)) for (const name of inShell(script)) note(name, "package.json")

/** What `npm ci` brings, and what we are. */
const ours = new Set(["biome", "knip", "machinen", "tsc", "tsdown", "tsx", "vitest"])

/** Started by a tool of ours, or under a name that only comes about when it runs. */
const indirect: Readonly<Record<string, string>> = {
  bc: "the kernel's make",
  bison: "the kernel's make",
  busybox: "bases/micro.sh, by its path; tests copy it into trees",
  cc: "cargo, to link",
  e2fsck: "bases/ext4.sh, from a list",
  flex: "the kernel's make",
  gzip: "src/image/ociLayout.ts, by what a layer is packed with",
  resize2fs: "bases/ext4.sh, from a list",
  xz: "tar, for kernel/build.sh"
}

const programsOf = (...all: ReadonlyArray<Packages>) => all.flatMap((one) => Object.values(one).flat())
const toRun = new Set(programsOf(basePackages, runPackages))
const toBuild = new Set([...toRun, ...programsOf(...Object.values(buildPackages)), ...toolchainPrograms])
const toTest = new Set([...toBuild, ...programsOf(testPackages)])

/** The programs that a file may start: the product those of every user's host, set-up those of building, tests all. */
const allowed = (file: string): ReadonlySet<string> => {
  if (/^(kernel|bases)\/|^src\/host\/(assetBuilds|debianPackages|toolchain|Doctor)\.ts$/.test(file)) return toBuild
  return /^(src|backends|native\/\w+\/src|gvproxy)\//.test(file) && !/tests?\.(rs|go)$/.test(file) ? toRun : toTest
}

describe("host requirements", () => {
  it("lists every program that the sources start, as needed to run, build or test", () => {
    const unlisted = [...started].flatMap(([name, files]) =>
      ours.has(name)
        ? []
        : [...files].filter((file) => !allowed(file).has(name)).map((file) => `${name}, which ${file} starts`)
    )
    assert.deepStrictEqual(unlisted, [])
  })

  it("lists no program that nothing starts", () => {
    const idle = [...toTest].filter((name) => !started.has(name) && !(name in indirect))
    assert.deepStrictEqual(idle, [])
    const known = Object.keys(indirect).filter((name) => started.has(name) || !toTest.has(name))
    assert.deepStrictEqual(known, [])
  })

  it("has each program in the package it is listed with", () => {
    const listed: ReadonlyArray<Packages> = [basePackages, runPackages, ...Object.values(buildPackages), testPackages]
    const pairs = listed.flatMap((group) =>
      Object.entries(group).flatMap(([from, programs]) => programs.map((program) => ({ from, program })))
    )
    const all = pairs.flatMap(({ program }) => placesOf(program))
    const { stdout } = spawnSync("dpkg-query", ["--search", ...new Set(all)], { encoding: "utf8" })
    const owners = stdout.split("\n").map((line) => line.split(": "))
    const wrong = pairs.filter(({ from, program }) => {
      const places = placesOf(program)
      return !owners.some(
        ([owner = "", file = ""]) => places.includes(file) && (owner === from || owner.startsWith(`${from}-`))
      )
    })
    assert.deepStrictEqual(wrong, [])
  })

  it("tells apart what users need from what tests need, and what is built from what is there", () => {
    const users = packagesFor(Object.keys(buildPackages) as ReadonlyArray<keyof typeof buildPackages>)
    for (const name of ["cpio", "curl", "docker-registry", "tmux"]) {
      assert.notInclude(users, name)
      assert.include(packages, name)
    }
    assert.includeMembers([...users], ["qemu-system-x86", "linux-source-6.12", "mmdebstrap", "gcc"])
    assert.notIncludeMembers([...packagesFor([])], ["gcc"])
    assert.sameMembers([...packagesFor([])], Object.keys(runPackages))
    assert.lengthOf(new Set(packages), packages.length)
  })

  it("names the source package of the kernel that is built", () => {
    const version = readFileSync(path.join(root, "kernel", "VERSION"), "utf8").trim()
    assert.include(packages, `linux-source-${version}`)
  })

  it("reads and compares versions as numbers", () => {
    assert.strictEqual(versionIn("mke2fs 1.47.0 (5-Feb-2023)\n Using 9.9")._tag, "Some")
    assert.strictEqual(versionIn("no version here\n1.2")._tag, "None")
    assert.isTrue(isAtLeast("20.19.0", "20.19"))
    assert.isTrue(isAtLeast("22.1.0", "20.19"))
    assert.isFalse(isAtLeast("20.9.0", "20.19"))
  })
})

/** Where a program may be for dpkg: itself, or what it is a link to (cc, awk), with and without /usr, which Debian has merged. */
const placesOf = (program: string): ReadonlyArray<string> => {
  const dir = searchPath()
    .split(":")
    .find((dir) => existsSync(path.join(dir, program)))
  if (dir === undefined) return []
  const file = path.join(dir, program)
  return [file, realpathSync(file)].flatMap((place) => [place, place.replace(/^\/usr/, ""), `/usr${place}`])
}

describe("programs that sources start", () => {
  const inText = (text: string) => [...inTypeScript([{ path: "x.ts", text }]).keys()].sort()

  it("are found in TypeScript, through our own functions", () => {
    assert.deepStrictEqual(inText('spawnSync("one", ["--two"])'), ["one"])
    assert.deepStrictEqual(inText('const run = (argv: A) => command.run(argv)\nrun(["one", "two"])'), ["one"])
    assert.deepStrictEqual(
      inText(
        'const run = (what: string, argv: A) => { const [bin, ...args] = argv\nspawn(bin, args) }\nrun("x", ["one"])'
      ),
      ["one"]
    )
    assert.deepStrictEqual(
      inText('const f = Effect.fn("f")(function* (argv: A) { yield* streamCommand.run(argv) })\nf(["one"])'),
      ["one"]
    )
    assert.deepStrictEqual(inText('const one = ["two", "-x"] as const\nspawn(cond ? "three" : one)'), ["three", "two"])
    assert.deepStrictEqual(inText('execFileSync("sh", ["-ec", "a | b && c"])'), ["a", "b", "c", "sh"])
    assert.deepStrictEqual(
      inText('vm.exec(["inTheGuest"]); execRaw({ argv: ["inTheGuest"] }); Command.make("verb")'),
      []
    )
  })

  it("are found in shell scripts", () => {
    const script = `#!/bin/sh
# comment's
here=$(cd "$(one "$0")" && pwd)
f() { two --three; }
if ! four -x "five $(six 'seven eight')" | nine; then f; fi
case $a in b) ten ;; c | d) eleven ;; esac
A=1 twelve <<EOF >/dev/null 2>&1
thirteen
EOF
for word in fourteen $(fifteen); do sixteen "\${word:-x}"; done
make=(seventeen -C "$x")
"\${make[@]}" -s eighteen
[[ $x == (nineteen) ]] || /usr/bin/twenty
`
    assert.sameMembers(
      [...inShell(script)],
      ["eleven", "fifteen", "four", "nine", "one", "seventeen", "six", "sixteen", "ten", "twelve", "twenty", "two"]
    )
  })

  it("are found in Rust and Go", () => {
    assert.deepStrictEqual(inRust('Command::new("one").arg("two"); Command::new(program)'), ["one"])
    assert.deepStrictEqual(inGo('exec.Command("one", "two"); exec.CommandContext(ctx, "three")'), ["one", "three"])
  })
})
