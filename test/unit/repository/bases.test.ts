import { spawnSync } from "node:child_process"
import { readFileSync } from "node:fs"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { executable, temporaryDirectory } from "../../fixtures.ts"

const root = path.resolve(import.meta.dirname, "..", "..", "..")

/** Runs bases/debian.sh up to mmdebstrap on a host with these apt sources, as apt-get lists them, and gives what mmdebstrap is asked for. */
const askedFor = (targets: ReadonlyArray<string>) => {
  const dir = temporaryDirectory()
  executable(dir, "apt-get", `printf '%s\\n' ${targets.map((target) => `'${target}'`).join(" ")}`)
  executable(dir, "mmdebstrap", `printf '%s\\n' "$@" >${dir}/arguments; cat >${dir}/sources; exit 1`)
  const { status, stderr } = spawnSync("bash", [path.join(root, "bases", "debian.sh"), `${dir}/out`, `${dir}/work`], {
    encoding: "utf8",
    env: { ...process.env, PATH: `${dir}:${process.env["PATH"]}` }
  })
  const read = (file: string) => {
    try {
      return readFileSync(path.join(dir, file), "utf8").trimEnd().split("\n")
    } catch {
      return []
    }
  }
  return { status, stderr, arguments: read("arguments"), sources: read("sources") }
}

const of = (release: string) => [
  `http://mirror.test/debian/ ${release} main`,
  `http://mirror.test/debian/ ${release} contrib`,
  `http://mirror.test/debian/ ${release}-updates main`,
  `http://mirror.test/debian/ ${release}-backports main`,
  `http://mirror.test/debian-security/ ${release}-security main`
]

describe("bases/debian.sh", () => {
  for (const [what, targets] of [
    ["bookworm", of("bookworm")],
    ["trixie", of("trixie")],
    ["both", [...of("bookworm"), ...of("trixie")]]
  ] as const) {
    it(`takes the mirrors of a host whose apt has ${what}, and asks them for bookworm with Debian's keys`, () => {
      const asked = askedFor(targets)
      assert.deepStrictEqual(asked.sources, [
        "deb http://mirror.test/debian-security/ bookworm-security main",
        "deb http://mirror.test/debian/ bookworm main",
        "deb http://mirror.test/debian/ bookworm-updates main"
      ])
      assert.include(asked.arguments, "--keyring=/usr/share/keyrings/debian-archive-keyring.gpg")
      assert.include(asked.arguments, "bookworm")
    })
  }

  it("names what is missing on a host without a mirror of Debian", () => {
    const asked = askedFor(["http://mirror.test/ubuntu/ noble universe"])
    assert.strictEqual(asked.status, 1)
    assert.include(asked.stderr, "no mirror of Debian")
    assert.deepStrictEqual(asked.arguments, [])
  })
})
