import { execFileSync } from "node:child_process"
import { writeFileSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, FastCheck as fc, Option } from "effect"
import { liveMounts as parsed } from "../../../src/cli/options.ts"
import { BootError } from "../../../src/errors.ts"
import {
  guestPath,
  livePath,
  type MountOptions,
  overridden,
  validateMounts
} from "../../../src/machine/mountOptions.ts"
import { checkLiveHosts } from "../../../src/mount/mounts.ts"
import { temporaryDirectory } from "../../fixtures.ts"

describe("mounts", () => {
  const refused: ReadonlyArray<readonly [what: string, options: MountOptions]> = [
    ["a guest path outside /mnt", { mount: { host: "/srv", guest: "/srv" } }],
    ["/mnt itself", { mount: { host: "/srv", guest: "/mnt/" } }],
    ["a neighbour of /mnt", { mount: { host: "/srv", guest: "/mnt2/x" } }],
    ["a guest path that leads out", { mount: { host: "/srv", guest: "/mnt/x/../../etc" } }],
    ["a relative guest path", { liveMounts: [{ host: "/srv", guest: "mnt/x" }] }],
    ["a NUL in the guest path", { liveMounts: [{ host: "/srv", guest: "/mnt/a\0b" }] }],
    ["a NUL in the host path", { liveMounts: [{ host: "/srv\0", guest: "/mnt/a" }] }],
    ["an empty host path", { mount: { host: "", guest: "/mnt/a" } }],
    ["an unknown mode", { liveMounts: [{ host: "/srv", guest: "/mnt/a", mode: "x" as never }] }],
    ["an odd size", { mountDiskUpperSizeBytes: 2 ** 30 + 1 }],
    ["no size", { mountDiskUpperSizeBytes: 0 }],
    [
      "two mounts for one place",
      {
        liveMounts: [
          { host: "/a", guest: "/mnt/x" },
          { host: "/b", guest: "/mnt//x/" }
        ]
      }
    ],
    [
      "a copy that a live mount would hide",
      { mount: { host: "/a", guest: "/mnt/x/y" }, liveMounts: [{ host: "/b", guest: "/mnt/x" }] }
    ],
    [
      "a copy and a live mount at one place",
      { mount: { host: "/a", guest: "/mnt/x" }, liveMounts: [{ host: "/b", guest: "/mnt/x" }] }
    ],
    ...["/", "//.", "/proc", "/proc/sys", "/sys/x", "/dev", "/dev//shm/", "/run/machinen", "/var/lib/machinen/x"].map(
      (guest): readonly [string, MountOptions] => [
        `a live mount at ${guest}`,
        { liveMounts: [{ host: "/srv", guest }] }
      ]
    ),
    ["a live mount that leads out", { liveMounts: [{ host: "/srv", guest: "/work/../proc" }] }],
    ["a name that is too long", { liveMounts: [{ host: "/srv", guest: `/${"x".repeat(256)}` }] }],
    ["a user that is no number", { liveMounts: [{ host: "/srv", guest: "/a", uid: 1.5 }] }],
    ["a group beyond all", { liveMounts: [{ host: "/srv", guest: "/a", gid: 2 ** 32 - 1 }] }],
    ["65 live mounts", { liveMounts: Array.from({ length: 65 }, (_, i) => ({ host: "/srv", guest: `/mnt/${i}` })) }]
  ]
  for (const [what, options] of refused) {
    it.effect(`refuses ${what}`, () =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(validateMounts(options))
        assert.strictEqual(error.code, "BOOT_MOUNT_INVALID")
        assert.isString(error.hint)
        if (what === "65 live mounts") assert.match(error.message, /^65 .* limit is 64$/)
      })
    )
  }

  it.effect("fills in what was left out, and normalises", () =>
    Effect.gen(function* () {
      const plan = yield* validateMounts({
        mount: { host: "/srv/", guest: "/mnt//a/./b/" },
        liveMounts: [{ host: "x", guest: "/mnt/c" }]
      })
      assert.deepStrictEqual(plan, {
        mount: { guest: "/mnt/a/b", host: "/srv" },
        mountUpperBytes: 4 * 1024 ** 3,
        liveMounts: [{ guest: "/mnt/c", host: path.resolve("x"), mode: "rw" }]
      })
    })
  )

  it.effect("a live mount may be anywhere else, in another one, and in the copy", () =>
    Effect.gen(function* () {
      const { liveMounts } = yield* validateMounts({
        mount: { host: "/c", guest: "/mnt/c" },
        liveMounts: [
          { host: "/a", guest: "/srv//app/node_modules/", uid: 0, gid: 2 ** 32 - 2 },
          { host: "/b", guest: "/srv/app", mode: "ro" },
          { host: "/etc/hosts", guest: "/etc/hosts" },
          { host: "/d", guest: "/mnt/c/d" },
          { host: "/e", guest: "/development" },
          { host: "/f", guest: "/run" }
        ]
      })
      assert.deepStrictEqual(liveMounts, [
        { guest: "/srv/app/node_modules", host: "/a", mode: "rw", uid: 0, gid: 2 ** 32 - 2 },
        { guest: "/srv/app", host: "/b", mode: "ro" },
        { guest: "/etc/hosts", host: "/etc/hosts", mode: "rw" },
        { guest: "/mnt/c/d", host: "/d", mode: "rw" },
        { guest: "/development", host: "/e", mode: "rw" },
        { guest: "/run", host: "/f", mode: "rw" }
      ])
    })
  )

  it.scoped("a live mount is of a directory or a file of the host, and of nothing else", () =>
    Effect.gen(function* () {
      const dir = temporaryDirectory()
      writeFileSync(path.join(dir, "file"), "")
      const check = (name: string) =>
        Effect.either(checkLiveHosts([{ host: path.join(dir, name), guest: "/work", mode: "rw" }])).pipe(
          Effect.map((checked) => (checked._tag === "Left" ? checked.left : "fits"))
        )
      assert.deepStrictEqual([yield* check("."), yield* check("file")], ["fits", "fits"])
      execFileSync("mkfifo", [path.join(dir, "fifo")])
      for (const [name, code] of [
        ["fifo", "BOOT_MOUNT_INVALID"],
        ["nowhere", "BOOT_MOUNT_HOST_NOT_FOUND"]
      ] as const) {
        const refused = yield* check(name)
        assert.include(refused, { code })
        assert.include(refused instanceof BootError ? refused.message : "", "/work")
      }
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.effect("a copy has its original's shares, with another directory or mode where that is given", () =>
    Effect.gen(function* () {
      const recorded = [
        { guest: "/mnt/a", host: "/srv/a", mode: "ro" },
        { guest: "/mnt/b", host: "/srv/b", mode: "rw", uid: 7 }
      ] as const
      assert.deepStrictEqual(yield* overridden(recorded, []), [...recorded])
      assert.deepStrictEqual(yield* overridden(recorded, [{ guest: "/mnt//b/", host: "/x" }]), [
        recorded[0],
        { guest: "/mnt/b", host: "/x", mode: "rw", uid: 7 }
      ])
      const both = [
        { guest: "/mnt/b", host: "/x", mode: "ro", uid: 8, gid: 9 },
        { guest: "/mnt/a", host: "/y" }
      ] as const
      assert.deepStrictEqual(yield* overridden(recorded, both), [
        { guest: "/mnt/a", host: "/y", mode: "ro" },
        { guest: "/mnt/b", host: "/x", mode: "ro", uid: 8, gid: 9 }
      ])
      for (const [known, hint] of [
        [recorded, "/mnt/a, /mnt/b"],
        [[], "no live mounts"]
      ] as const) {
        const error = yield* Effect.flip(overridden(known, [{ guest: "/mnt/c", host: "/x" }]))
        assert.strictEqual(error.code, "BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN")
        assert.include(error.hint, hint)
      }
    })
  )

  it("no accepted place of a live mount is the guest's own", () => {
    const part = fc.oneof(fc.constantFrom("..", ".", "", "proc", "sys", "dev", "a", "..."), fc.string())
    fc.assert(
      fc.property(fc.array(part), (parts) => {
        const accepted = Effect.runSync(Effect.option(livePath(`/${parts.join("/")}`)))
        if (Option.isNone(accepted)) return
        assert.strictEqual(path.posix.normalize(accepted.value), accepted.value)
        assert.match(accepted.value, /^\/(?!(proc|sys|dev)(\/|$))[^/]/)
      })
    )
  })

  it("no accepted guest path leaves /mnt", () => {
    const part = fc.oneof(fc.constantFrom("..", ".", "", "mnt", "a", "..."), fc.string())
    let all = 0
    fc.assert(
      fc.property(fc.constantFrom("/mnt/", "/"), fc.array(part), (root, parts) => {
        const accepted = Effect.runSync(Effect.option(guestPath(`${root}${parts.join("/")}`)))
        if (Option.isNone(accepted)) return
        all++
        assert.strictEqual(path.posix.normalize(accepted.value), accepted.value)
        assert.match(accepted.value, /^\/mnt\/./)
      })
    )
    assert.isAbove(all, 0)
  })
})

describe("--mount-live", () => {
  it.effect("says where, and how: mode, user and group in any order", () =>
    Effect.gen(function* () {
      for (const [value, mount] of [
        ["/srv:/work", { host: "/srv", guest: "/work" }],
        [".:/work:ro", { host: ".", guest: "/work", mode: "ro" }],
        ["/srv:/etc/hosts:rw:uid=1000", { host: "/srv", guest: "/etc/hosts", mode: "rw", uid: 1000 }],
        ["/srv:/work:gid=7:ro:uid=0", { host: "/srv", guest: "/work", mode: "ro", uid: 0, gid: 7 }],
        ["/a:/b:c:/work", { host: "/a:/b:c", guest: "/work" }],
        ["/a:ro:/work", { host: "/a:ro", guest: "/work" }]
      ] as const) {
        assert.deepStrictEqual(yield* parsed([value]), [mount], value)
      }
    })
  )

  it.effect("makes no sense with anything else", () =>
    Effect.gen(function* () {
      for (const value of [
        "",
        "/work",
        ":/work",
        "/srv:work",
        "/srv:/work:rx",
        "/srv:/work:ro:rw",
        "/srv:/work:uid=1:uid=1",
        "/srv:/work:uid=",
        "/srv:/work:uid=-1",
        "/srv:/work:user=1",
        "/srv:/work:ro:"
      ]) {
        const error = yield* Effect.flip(parsed([value]))
        assert.strictEqual(error.code, "PARSE_FLAG_MALFORMED", value)
        assert.include(error.message, "HOST:GUEST")
      }
    })
  )
})
