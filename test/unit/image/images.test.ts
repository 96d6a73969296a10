import { execFileSync } from "node:child_process"
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, utimesSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, FastCheck as fc, Layer, Option, Schema } from "effect"
import { Assets } from "../../../src/host/Assets.ts"
import { SourceTree } from "../../../src/host/SourceTree.ts"
import { ImageName, withTag } from "../../../src/image/Image.ts"
import { type ImageConfig, overlaid, withImageDefaults } from "../../../src/image/ImageConfig.ts"
import { parsePackages } from "../../../src/image/ImageStore.ts"
import { RootfsImage } from "../../../src/image/RootfsImage.ts"
import { defaultRootDiskBytes } from "../../../src/machine/BootOptions.ts"
import { Settings } from "../../../src/Settings.ts"
import { executable, sha256OfFile, smallDisk, temporaryHome } from "../../fixtures.ts"

const store = (dir: string, mke2fs?: string) =>
  RootfsImage.layer.pipe(
    Layer.provide(Assets.layerWithoutSource),
    Layer.provide(SourceTree.layerTest(dir)),
    Layer.provide(Settings.layerTest(dir, mke2fs === undefined ? {} : { mke2fs: Option.some(mke2fs) })),
    Layer.provideMerge(NodeContext.layer)
  )

/** A small image whose tree has that file, or has none. */
const ext4 = (dir: string, config: string | undefined): string => {
  const tree = path.join(dir, "tree")
  const image = path.join(dir, "image.ext4")
  mkdirSync(tree, { recursive: true })
  if (config !== undefined) writeFileSync(path.join(tree, "machinen-config.json"), config)
  execFileSync("mke2fs", ["-q", "-F", "-t", "ext4", "-d", tree, image, "8M"])
  return image
}

/** Longer than the clock's tick, within which two changes of a file look like one. */
const atRest = Effect.sleep("80 millis")

const setPath = (dirs: string) =>
  Effect.sync(() => {
    process.env["PATH"] = dirs
  })

const plan = {
  image: "x",
  rootDisk: undefined,
  command: undefined,
  env: {},
  cwd: undefined,
  user: undefined
}

describe("what an image says", () => {
  it.live("is read once, until its file changes, also when it is empty", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const images = yield* RootfsImage
      const image = ext4(dir, '{"cmd":["one"],"unknown":1}')
      yield* atRest
      assert.deepStrictEqual(yield* images.config(image), { cmd: ["one"] })
      const notes = path.join(dir, "cache", "image-config")
      assert.strictEqual(readdirSync(notes).length, 1)

      // the note is what is believed while size and times are the same
      const [note = ""] = readdirSync(notes)
      writeFileSync(path.join(notes, note), '{"config":{"cmd":["noted"]}}')
      assert.deepStrictEqual(yield* images.config(image), { cmd: ["noted"] })
      writeFileSync(path.join(notes, note), "torn{")
      assert.deepStrictEqual(yield* images.config(image), { cmd: ["one"] })
      writeFileSync(path.join(notes, note), '{"config":{"cmd":["noted"]}}')
      assert.deepStrictEqual(yield* images.config(image), { cmd: ["noted"] })
      // written in place: same size, same inode, and the old time put back
      const { mtime } = statSync(image)
      const bytes = readFileSync(image)
      bytes.write('{"cmd":["two"]', bytes.indexOf('{"cmd":["one"]'))
      writeFileSync(image, bytes)
      utimesSync(image, mtime, mtime)
      assert.deepStrictEqual([statSync(image).mtime, statSync(image).size], [mtime, bytes.length])
      assert.deepStrictEqual(yield* images.config(image), { cmd: ["two"] })
      yield* atRest
      yield* images.config(image)
      assert.strictEqual(readdirSync(notes).length, 2)

      const silent = ext4(path.join(dir, "silent"), undefined)
      yield* atRest
      assert.deepStrictEqual(yield* images.config(silent), {})
      assert.include(
        readdirSync(notes).map((each) => readFileSync(path.join(notes, each), "utf8")),
        '{"config":null}'
      )
    }).pipe(Effect.provide(store(dir)))
  })

  for (const [what, script, code] of [
    ["fails", "exit 1", "IMAGE_INVALID"],
    ["is killed", "kill -KILL $$", "ROOTFS_IMG_TOOL_MISSING"],
    ["answers nothing", "exit 0", "IMAGE_INVALID"],
    ["cannot open the image", "echo 'cannot open' >&2; exit 0", "IMAGE_INVALID"],
    ["gives a part of it", 'case "$2" in ls*) exec /usr/sbin/debugfs "$@";; *) echo {;; esac', "IMAGE_INVALID"]
  ] as const) {
    it.live(`is not taken for empty when debugfs ${what}, and that is not remembered`, () => {
      const dir = temporaryHome()
      const given = process.env["PATH"] ?? ""
      return Effect.gen(function* () {
        const images = yield* RootfsImage
        const image = ext4(dir, '{"user":"app"}')
        yield* atRest
        executable(dir, "debugfs", script)
        process.env["PATH"] = `${dir}:${given}`
        const error = yield* Effect.flip(images.config(image))
        assert.strictEqual(error.code, code, error.message)
        assert.isString(error.hint)
        process.env["PATH"] = given
        assert.deepStrictEqual(yield* images.config(image), { user: "app" })
      }).pipe(Effect.ensuring(setPath(given)), Effect.provide(store(dir)))
    })
  }

  it.effect("is found by users whose PATH lacks /usr/sbin", () => {
    const dir = temporaryHome()
    const given = process.env["PATH"] ?? ""
    return Effect.gen(function* () {
      const image = ext4(dir, '{"user":"app"}')
      process.env["PATH"] = "/usr/local/bin:/usr/bin:/bin"
      assert.deepStrictEqual(yield* (yield* RootfsImage).config(image), { user: "app" })
    }).pipe(Effect.ensuring(setPath(given)), Effect.provide(store(dir)))
  })

  for (const [what, text] of [
    ["is no JSON", "{"],
    ["is of other types", '{"cmd":"string"}'],
    ["has a relative directory", '{"cwd":"srv"}'],
    ["has a NUL byte", '{"env":{"A":"\\u0000"}}'],
    ["is endless", `{"cmd":["${"x".repeat(2 * 1024 * 1024)}"]}`]
  ] as const) {
    it.effect(`is ignored when it ${what}`, () => {
      const dir = temporaryHome()
      return Effect.gen(function* () {
        const images = yield* RootfsImage
        assert.deepStrictEqual(yield* images.config(ext4(dir, text)), {})
      }).pipe(Effect.provide(store(dir)))
    })
  }

  it.effect("is overridden by the caller's options, but its entrypoint precedes any command", () =>
    Effect.gen(function* () {
      const image: ImageConfig = {
        entrypoint: ["entry"],
        cmd: ["default"],
        env: { A: "image", B: "image" },
        cwd: "/image",
        user: "image"
      }
      const rest = { name: undefined, memoryMib: 1, vcpus: 1, rootDiskSizeBytes: defaultRootDiskBytes, detached: false }
      const base = { ...plan, ...rest } as unknown as Parameters<typeof withImageDefaults>[0]
      const alone = yield* withImageDefaults(base, image)
      assert.deepStrictEqual(
        [alone.command, alone.env, alone.cwd, alone.user],
        [["entry", "default"], { A: "image", B: "image" }, "/image", "image"]
      )
      const asked = { ...base, command: ["mine"] as const, env: { B: "mine" }, cwd: "/mine", user: "mine" }
      const both = yield* withImageDefaults(asked, image)
      assert.deepStrictEqual(
        [both.command, both.env, both.cwd, both.user],
        [["entry", "mine"], { A: "image", B: "mine" }, "/mine", "mine"]
      )
      assert.strictEqual((yield* withImageDefaults(base, {})).command, undefined)
      const large = yield* Effect.flip(withImageDefaults(base, { env: { A: "x".repeat(200_000) } }))
      assert.strictEqual(large.code, "BOOT_ENV_INVALID")
    })
  )

  it("is the base's configuration overlaid with the build's", () => {
    const base = { cmd: ["base"], env: { A: "1", B: "1" }, cwd: "/base" } as const
    assert.deepStrictEqual(overlaid(base, { env: { B: "2" }, cwd: "/top" }), {
      cmd: ["base"],
      env: { A: "1", B: "2" },
      cwd: "/top"
    })
    assert.deepStrictEqual(overlaid({}, {}), {})
  })
})

const imagesIn = (dir: string): ReadonlyArray<string> => {
  const rootfs = path.join(dir, "cache", "rootfs")
  return existsSync(rootfs) ? readdirSync(rootfs).filter((name) => /\.(img|ext4)/.test(name)) : []
}

describe("a tarball's image", () => {
  const tarball = (dir: string): string => {
    const tree = path.join(dir, "content")
    mkdirSync(path.join(tree, "etc"), { recursive: true })
    writeFileSync(path.join(tree, "etc", "hostname"), "x\n")
    const file = path.join(dir, "rootfs.tar")
    execFileSync("tar", ["-cf", file, "-C", tree, "."])
    return file
  }

  it.effect("is built once by any number of callers, without leftovers", () => {
    const dir = temporaryHome()
    const log = path.join(dir, "log")
    const counting = executable(dir, "mke2fs", `echo run >>${log}; exec mke2fs "$@"`)
    return Effect.gen(function* () {
      const images = yield* RootfsImage
      const file = tarball(dir)
      const made = yield* Effect.all(
        Array.from({ length: 8 }, () => images.ensure(file)),
        { concurrency: 8 }
      )
      assert.strictEqual(new Set(made).size, 1)
      assert.strictEqual(readFileSync(log, "utf8"), "run\n")
      const left = readdirSync(path.join(dir, "cache", "rootfs")).filter((name) => name !== "digests")
      assert.deepStrictEqual(left.map((name) => name.replace(/^[0-9a-f]{64}/, "")).sort(), [".img", ".img.ok", ".json"])
    }).pipe(Effect.provide(store(dir, counting)))
  })

  it.effect("has the tarball's owners and devices, whether or not root makes it", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const tree = path.join(dir, "content")
      mkdirSync(path.join(tree, "dev"), { recursive: true })
      writeFileSync(path.join(tree, "owned"), "x")
      execFileSync("chown", ["33:34", path.join(tree, "owned")])
      execFileSync("chmod", ["4750", path.join(tree, "owned")])
      execFileSync("mknod", [path.join(tree, "dev", "null"), "c", "1", "3"])
      const file = path.join(dir, "owned.tar")
      execFileSync("tar", ["-cf", file, "-C", tree, "."])
      execFileSync("rm", ["-rf", tree])
      // as for anybody but root
      const getuid = process.getuid
      process.getuid = () => 65534
      const image = yield* Effect.flatMap(RootfsImage, (images) => images.ensure(file)).pipe(
        Effect.ensuring(
          Effect.sync(() => {
            if (getuid !== undefined) process.getuid = getuid
          })
        )
      )
      const look = (command: string) =>
        execFileSync("debugfs", ["-R", command, image], { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] })
      assert.match(look("ls -l /"), /104750 \(\d+\) +33 +34 +1 .* owned/)
      assert.match(look("ls -l /dev"), /20[0-7]{3} .* null/)
    }).pipe(Effect.provide(store(dir)))
  })

  it.live("is another one when the tarball was written in place and its time put back", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const images = yield* RootfsImage
      const file = tarball(dir)
      yield* atRest
      const first = yield* images.ensure(file)
      const { ino, mtime, size } = statSync(file)
      const bytes = readFileSync(file)
      bytes.write("y\n", bytes.indexOf("x\n"))
      writeFileSync(file, bytes)
      utimesSync(file, mtime, mtime)
      assert.deepStrictEqual([statSync(file).ino, statSync(file).size], [ino, size])
      const second = yield* images.ensure(file)
      assert.strictEqual(path.basename(second), `${sha256OfFile(file)}.img`)
      assert.notStrictEqual(second, first)
    }).pipe(Effect.provide(store(dir)))
  })

  it.effect("comes from the tarball, whatever lies beside it", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      writeFileSync(path.join(dir, "rootfs.img.gz"), "not gzip")
      const image = yield* Effect.flatMap(RootfsImage, (images) => images.ensure(tarball(dir)))
      const hostname = execFileSync("debugfs", ["-R", "cat /etc/hostname", image], {
        stdio: ["ignore", "pipe", "ignore"]
      })
      assert.strictEqual(hostname.toString(), "x\n")
    }).pipe(Effect.provide(store(dir)))
  })

  for (const [what, script, code] of [
    ["is missing", undefined, "ROOTFS_IMG_TOOL_MISSING"],
    ["fails", "echo broken >&2; exit 1", "ROOTFS_IMG_BUILD_FAILED"],
    [
      "reports a full disk while there is space",
      "echo 'No space left on device' >&2; exit 1",
      "ROOTFS_IMG_BUILD_FAILED"
    ]
  ] as const) {
    it.effect(`a tool that ${what} has its code, and leaves nothing`, () => {
      const dir = temporaryHome()
      const tool = script === undefined ? path.join(dir, "none") : executable(dir, "mke2fs", script)
      return Effect.gen(function* () {
        const images = yield* RootfsImage
        const error = yield* Effect.flip(images.ensure(tarball(dir)))
        assert.strictEqual(error.code, code)
        assert.isString(error.hint)
        assert.deepStrictEqual(imagesIn(dir), [])
      }).pipe(Effect.provide(store(dir, tool)))
    })
  }

  it.scoped("that fills its disk says so, whatever its tools say", () =>
    Effect.gen(function* () {
      const small = yield* smallDisk("1M")
      const dir = temporaryHome()
      const mute = executable(dir, "mke2fs", `exec mke2fs "$@" 2>/dev/null`)
      const error = yield* Effect.flatMap(RootfsImage, (images) => images.upperTemplate(2 ** 40)).pipe(
        Effect.flip,
        Effect.provide(store(small, mute))
      )
      assert.strictEqual(error.code, "ROOTFS_IMG_NO_SPACE", error.message)
      assert.deepStrictEqual(imagesIn(small), [])
    })
  )

  for (const [what, script, code] of [
    ["is killed", "kill -KILL $$", "IMAGE_INVALID"],
    ["fails with the code of a kill", "exit 137", "IMAGE_INVALID"]
  ] as const) {
    it.effect(`tar that ${what} is not reported as an archive that is too large`, () => {
      const dir = temporaryHome()
      const given = process.env["PATH"] ?? ""
      return Effect.gen(function* () {
        const images = yield* RootfsImage
        const file = tarball(dir)
        executable(dir, "tar", script)
        process.env["PATH"] = `${dir}:${given}`
        const error = yield* Effect.flip(images.ensure(file))
        assert.strictEqual(error.code, code, error.message)
        assert.deepStrictEqual(imagesIn(dir), [])
      }).pipe(Effect.ensuring(setPath(given)), Effect.provide(store(dir)))
    })
  }
})

describe("an image's name", () => {
  it("is like that of a container image, and never a path, an id or an option", () => {
    const valid = Schema.is(ImageName)
    for (const name of ["web", "team/web", "a.b-c_d/e__f:1.2-x", "0", "registry.example/x:Latest"])
      assert.isTrue(valid(name), name)
    for (const name of [
      "",
      "Web",
      "-web",
      "web/",
      "/web",
      "a//b",
      "a/../b",
      "web:",
      "a:b/c",
      "abcdef",
      "0123456789ab",
      "a".repeat(201)
    ]) {
      assert.isFalse(valid(name), name)
    }
    let accepted = 0
    const near = fc.array(fc.constantFrom(..."abz09._-/:A"), { maxLength: 8 }).map((letters) => letters.join(""))
    fc.assert(
      fc.property(fc.oneof(near, fc.string()), (name) => {
        if (!valid(name)) return
        accepted++
        assert.notInclude(name.split(":")[0], "..")
        assert.isFalse(name.startsWith("/") || name.startsWith("-") || name.startsWith("."))
        assert.isTrue(valid(withTag(name)))
        assert.strictEqual(withTag(withTag(name)), withTag(name))
      }),
      { numRuns: 1000 }
    )
    assert.isAbove(accepted, 0)
  })
})

describe("a dpkg database", () => {
  it("tells what is installed", () => {
    const status = `Package: base-files
Status: install ok installed
Version: 12.4+deb12u5
Description: x
 Version: of something else

Package: gone
Status: deinstall ok config-files
Version: 1

Package: jq
Status: install ok installed
Architecture: amd64
Version: 1.6-2.1
`
    assert.deepStrictEqual(parsePackages(status), { "base-files": "12.4+deb12u5", jq: "1.6-2.1" })
    assert.deepStrictEqual(parsePackages(""), {})
  })
})
