import { existsSync, readdirSync, readFileSync } from "node:fs"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { circles } from "./circles.ts"
import { rustUses, type Sources } from "./rustModules.ts"

const crates = ["guest", ...readdirSync("native").map((name) => path.join("native", name))].filter((crate) =>
  existsSync(path.join(crate, "Cargo.toml"))
)

const read = (crate: string): Sources => {
  const src = path.join(crate, "src")
  const files = readdirSync(src, { recursive: true, encoding: "utf8" }).filter((file) => file.endsWith(".rs"))
  return new Map(files.map((file) => [file, readFileSync(path.join(src, file), "utf8")]))
}

const circlesOf = (sources: Sources) => {
  const uses = rustUses(sources)
  return circles(uses.keys(), (file) => uses.get(file) ?? [])
}

/** Init and agent do not know each other (`main.rs` joins them), and what both need knows neither. */
const strangers = [
  ["init/", "agent/"],
  ["agent/", "init/"],
  ["system/", "init/"],
  ["system/", "agent/"]
] as const

const strangersThatMeet = (sources: Sources) =>
  [...rustUses(sources)].flatMap(([file, targets]) =>
    [...targets]
      .filter((target) => strangers.some(([from, to]) => file.startsWith(from) && target.startsWith(to)))
      .map((target) => `${file} -> ${target}`)
  )

const tree = (files: Record<string, string>): Sources => new Map(Object.entries(files))

describe("Rust modules", () => {
  for (const crate of crates) {
    it(`no files of ${crate} use each other in a circle`, () => {
      const sources = read(crate)
      assert.isAbove(rustUses(sources).size, 1)
      assert.deepStrictEqual(circlesOf(sources), [])
    })
  }

  it("set-up forgets every crate before it builds: cargo would take another checkout's for ours", () => {
    const [, list = ""] = /const own = (\[[^\]]*\])/.exec(readFileSync("src/host/assetBuilds.ts", "utf8")) ?? []
    assert.deepStrictEqual(
      crates.map((crate) => path.basename(crate)).sort(),
      [...list.matchAll(/"([^"]+)"/g)].map(([, name]) => name)
    )
  })

  it("init and agent of the guest do not use each other, and what they share uses neither", () => {
    assert.deepStrictEqual(strangersThatMeet(read("guest")), [])
  })
})

describe("how uses of Rust modules are found", () => {
  it("through super, crate, self, braces, paths in code and what mod.rs re-exports", () => {
    const uses = rustUses(
      tree({
        "lib.rs": "mod a;\nmod b;\npub use a::Name;",
        "a/mod.rs": "mod one;\nmod two;\npub use one::Name;",
        "a/one.rs": "use super::two::{self, Two as Other};\nuse std::{fs, io};\nuse tokio::io::AsyncRead;",
        "a/two.rs": "fn f() -> crate::b::B { super::super::b::three::make() }",
        "b/mod.rs": "pub mod three;\npub struct B;\nfn f() { three::make() }",
        "b/three.rs": "pub fn make() {}"
      })
    )
    assert.deepStrictEqual(Object.fromEntries([...uses].map(([file, targets]) => [file, [...targets].sort()])), {
      "lib.rs": ["a/mod.rs"],
      "a/mod.rs": ["a/one.rs"],
      "a/one.rs": ["a/two.rs"],
      "a/two.rs": ["b/mod.rs", "b/three.rs"],
      "b/mod.rs": ["b/three.rs"],
      "b/three.rs": []
    })
  })

  it("but not in comments, nor in tests", () => {
    const uses = rustUses(
      tree({
        "lib.rs": "mod a;\nmod b;",
        "a.rs": "//! See [`crate::b`].\nfn f() {} // crate::b\n#[cfg(test)]\nmod tests {\n    use crate::b::B;\n}\n",
        "b.rs": "use crate::a::A;",
        "tests.rs": "use crate::a::A;"
      })
    )
    assert.deepStrictEqual([...(uses.get("a.rs") ?? [])], [])
    assert.isFalse(uses.has("tests.rs"))
  })

  it("a program beside a library is not the library's root", () => {
    const sources = tree({
      "lib.rs": "mod a;\npub use other::thing;",
      "main.rs": "use crate_name::a;\nfn main() { a::run() }",
      "a.rs": "use crate::thing;"
    })
    assert.deepStrictEqual(circlesOf(sources), [])
  })

  it("a circle is told with the files it leads through", () => {
    const sources = tree({
      "lib.rs": "mod a;\nmod b;\nmod c;",
      "a.rs": "use crate::b::B;",
      "b.rs": "fn f() { crate::c::f() }",
      "c.rs": "use super::{a::A, b};"
    })
    assert.deepStrictEqual(circlesOf(sources), ["a.rs -> b.rs -> c.rs -> a.rs", "b.rs -> c.rs -> b.rs"])
  })

  it("a file that uses what its own mod.rs re-exports is in a circle with it", () => {
    const sources = tree({
      "lib.rs": "mod a;\npub use a::A;",
      "a.rs": "use crate::A;"
    })
    assert.deepStrictEqual(circlesOf(sources), ["lib.rs -> a.rs -> lib.rs"])
  })

  it("an init that starts the agent itself is told", () => {
    const sources = tree({ "init/boot.rs": "use crate::agent;", "agent/mod.rs": "", "system/mod.rs": "" })
    assert.deepStrictEqual(strangersThatMeet(sources), ["init/boot.rs -> agent/mod.rs"])
  })
})
