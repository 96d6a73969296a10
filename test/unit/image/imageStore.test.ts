import { execFileSync } from "node:child_process"
import { createHash, randomBytes } from "node:crypto"
import { existsSync, mkdirSync, readdirSync, readFileSync, utimesSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { gunzipSync } from "node:zlib"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber, Layer, Option } from "effect"
import { Assets } from "../../../src/host/Assets.ts"
import { SourceTree } from "../../../src/host/SourceTree.ts"
import { ImageStore } from "../../../src/image/ImageStore.ts"
import { RootfsImage } from "../../../src/image/RootfsImage.ts"
import { Registry } from "../../../src/machine/Registry.ts"
import { Settings } from "../../../src/Settings.ts"
import { eventually, executable, temporaryDirectory, temporaryHome } from "../../fixtures.ts"

const store = (dir: string, imageLimitBytes = 2 ** 30) =>
  ImageStore.layer.pipe(
    Layer.provideMerge(RootfsImage.layer),
    Layer.provide(Registry.layer),
    Layer.provide(Assets.layerWithoutSource),
    Layer.provide(SourceTree.layerTest(dir)),
    Layer.provide(Settings.layerTest(dir, { imageLimitBytes })),
    Layer.provideMerge(NodeContext.layer)
  )

const umoci = (...args: ReadonlyArray<string>) => execFileSync("umoci", args, { stdio: ["ignore", "ignore", "pipe"] })

/** An image of two layers: a file `first` and a file `second`. */
const layoutWith = (content: string): string => {
  const dir = temporaryDirectory()
  const layout = path.join(dir, "layout")
  umoci("init", "--layout", layout)
  umoci("new", "--image", `${layout}:v1`)
  for (const name of ["first", "second"]) {
    mkdirSync(path.join(dir, name))
    writeFileSync(path.join(dir, name, name), `${name} ${content}\n`)
    umoci("insert", "--image", `${layout}:v1`, path.join(dir, name), "/")
  }
  return layout
}

const fileOf = (layout: string, digest: string) => path.join(layout, "blobs", "sha256", digest.slice(7))
const sha256 = (bytes: Uint8Array | string) => `sha256:${createHash("sha256").update(bytes).digest("hex")}`

interface Descriptor {
  mediaType: string
  digest: string
  size: number
  platform?: { os: string; architecture: string }
  annotations?: Record<string, string>
}
const indexOf = (layout: string): { manifests: Array<Descriptor> } =>
  JSON.parse(readFileSync(path.join(layout, "index.json"), "utf8"))
const put = (layout: string, bytes: Uint8Array | string) => {
  const digest = sha256(bytes)
  writeFileSync(fileOf(layout, digest), bytes)
  return { digest, size: Buffer.byteLength(bytes) }
}
const manifestOf = (layout: string): { config: Descriptor; layers: Array<Descriptor> } =>
  JSON.parse(readFileSync(fileOf(layout, indexOf(layout).manifests.at(-1)?.digest ?? ""), "utf8"))

/** Puts another manifest in the place of the layout's; its digest is right. */
const withManifest = (layout: string, edit: (manifest: { config: Descriptor; layers: Array<Descriptor> }) => void) => {
  const manifest = manifestOf(layout)
  edit(manifest)
  const index = indexOf(layout)
  const [entry] = index.manifests
  assert.strictEqual(index.manifests.length, 1)
  Object.assign(entry ?? {}, put(layout, JSON.stringify(manifest)))
  writeFileSync(path.join(layout, "index.json"), JSON.stringify(index))
}

/** Packs a layer of the image by zstd instead of gzip. */
const zstdLayer = (layout: string, at: number, change: (tar: Buffer) => Buffer = (tar) => tar) =>
  withManifest(layout, ({ layers }) => {
    const layer = layers[at]
    assert.isDefined(layer)
    const tar = gunzipSync(readFileSync(fileOf(layout, layer?.digest ?? "")))
    const packed = execFileSync("zstd", ["-qc"], { input: change(tar) })
    Object.assign(layer ?? {}, put(layout, packed), { mediaType: "application/vnd.oci.image.layer.v1.tar+zstd" })
  })

const contentOf = (image: string, file: string) =>
  execFileSync("debugfs", ["-R", `cat ${file}`, image], { stdio: ["ignore", "pipe", "ignore"] }).toString()

const inStore = (dir: string) => {
  const rootfs = path.join(dir, "cache", "rootfs")
  return existsSync(rootfs) ? readdirSync(rootfs).filter((name) => name.includes(".img")) : []
}
const pullsIn = (dir: string) => {
  const pulls = path.join(dir, "cache", "oci", "pulls")
  return existsSync(pulls) ? readdirSync(pulls) : []
}

/** A skopeo whose pull of `docker://…NAME` gives the layout of that name, once the file `go-NAME` is there. */
const withSkopeo = <A, E, R>(
  dir: string,
  layouts: Readonly<Record<string, string>>,
  effect: Effect.Effect<A, E, R>
) => {
  const cases = Object.entries(layouts).map(
    ([name, layout]) =>
      `docker://*${name}) until [ -e "${dir}/go-${name}" ]; do sleep 0.02; done; from=oci:${layout}:v1;;`
  )
  executable(
    dir,
    "skopeo",
    `for word; do case "$word" in ${cases.join(" ")} oci:*) to=$word;; esac; done; exec /usr/bin/skopeo --insecure-policy copy --quiet "$from" "$to"`
  )
  const given = process.env["PATH"] ?? ""
  return Effect.suspend(() => {
    process.env["PATH"] = `${dir}:${given}`
    return effect
  }).pipe(
    Effect.ensuring(
      Effect.sync(() => {
        process.env["PATH"] = given
      })
    )
  )
}
const go = (dir: string, name: string) => writeFileSync(path.join(dir, `go-${name}`), "")

describe("names of images", () => {
  it.effect("may be any, and other files beside them are ignored", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const images = yield* RootfsImage
      const layout = layoutWith("named")
      const id = yield* images.add(`oci:${layout}`)
      const names = ["build.tmp:1", "x.tmp2/y:latest", "docker://127.0.0.1:5000/a:b"]
      for (const name of names) yield* images.setName(name, Option.some(id))
      const at = path.join(dir, "cache", "rootfs", "names")
      assert.strictEqual(readdirSync(at).length, names.length)
      // not ours; what a killed writer left; an encoding that we do not write
      for (const stray of ["bad%zz", ".draft", "%61bc"]) writeFileSync(path.join(at, stray), id)
      const all = yield* ImageStore
      assert.deepStrictEqual((yield* all.list)[0]?.names, [...names].sort())
      assert.deepStrictEqual(yield* all.gc({ dryRun: false, unusedForMs: 0 }), [])
      assert.strictEqual((yield* all.inspect("build.tmp:1")).id, id)
      yield* images.setName("after:1", Option.some(id))
      assert.deepStrictEqual(
        readdirSync(at).sort(),
        [...names, "after:1"].map(encodeURIComponent).concat("bad%zz", "%61bc").sort()
      )
    }).pipe(Effect.provide(store(dir)))
  })
})

describe("a container image", () => {
  it.live("does not wait for another pull, and keeps its layers during a collection", () => {
    const dir = temporaryHome()
    const [slow, quick] = [layoutWith("slow"), layoutWith("quick")]
    const pool = path.join(dir, "cache", "oci", "blobs", "sha256")
    return withSkopeo(
      dir,
      { slow, quick },
      Effect.gen(function* () {
        const images = yield* RootfsImage
        // layers that are in the pool, and of no image that is kept
        mkdirSync(pool, { recursive: true })
        for (const { digest } of manifestOf(slow).layers)
          writeFileSync(path.join(pool, digest.slice(7)), readFileSync(fileOf(slow, digest)))
        const waiting = yield* Effect.fork(images.resolve("docker://127.0.0.1/slow"))
        yield* eventually("the beginning of the slow pull", () => pullsIn(dir).length === 1)
        go(dir, "quick")
        const first = yield* images.resolve("docker://127.0.0.1/quick")
        assert.strictEqual(contentOf(first, "/first"), "first quick\n")
        assert.isTrue(Option.isNone(yield* Fiber.poll(waiting)))
        yield* images.collectLayers
        const kept = manifestOf(quick)
        assert.deepStrictEqual(
          readdirSync(pool).sort(),
          [indexOf(quick).manifests[0]?.digest ?? "", kept.config.digest, ...kept.layers.map(({ digest }) => digest)]
            .map((digest) => digest.slice(7))
            .sort()
        )
        const [pull = ""] = pullsIn(dir)
        assert.strictEqual(readdirSync(path.join(dir, "cache", "oci", "pulls", pull, "blobs", "sha256")).length, 2)
        go(dir, "slow")
        assert.strictEqual(contentOf(yield* Fiber.join(waiting), "/second"), "second slow\n")
        assert.deepStrictEqual(pullsIn(dir), [])
      })
    ).pipe(Effect.provide(store(dir)))
  })

  it.live("leaves nothing when its pull is interrupted, fails or was killed", () => {
    const dir = temporaryHome()
    return withSkopeo(
      dir,
      { slow: layoutWith("slow") },
      Effect.gen(function* () {
        const images = yield* RootfsImage
        const waiting = yield* Effect.fork(images.resolve("docker://127.0.0.1/slow"))
        yield* eventually("the beginning of the pull", () => pullsIn(dir).length === 1)
        yield* Fiber.interrupt(waiting)
        assert.deepStrictEqual(pullsIn(dir), [])
        const error = yield* Effect.flip(images.resolve("docker://127.0.0.1/unknown"))
        assert.strictEqual(error.code, "IMAGE_PULL_FAILED")
        assert.deepStrictEqual([pullsIn(dir), inStore(dir)], [[], []])
        const dead = path.join(dir, "cache", "oci", "pulls", "0123-4194305-1-00000000")
        mkdirSync(dead, { recursive: true })
        yield* images.collectLayers
        assert.isFalse(existsSync(dead))
      })
    ).pipe(Effect.provide(store(dir)))
  })

  it.effect("may have layers packed by zstd; every digest is checked", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const images = yield* RootfsImage
      const layout = layoutWith("zstd")
      const plain = yield* images.resolve(`oci:${layout}`)
      zstdLayer(layout, 1)
      const packed = yield* images.resolve(`oci:${layout}`)
      assert.notStrictEqual(packed, plain)
      assert.strictEqual(path.basename(packed), `${indexOf(layout).manifests[0]?.digest.slice(7)}.img`)
      assert.deepStrictEqual(
        ["/first", "/second"].map((file) => contentOf(packed, file)),
        ["first zstd\n", "second zstd\n"]
      )

      const refused = (what: string, spoil: (layout: string) => void) =>
        Effect.gen(function* () {
          const broken = layoutWith(what)
          spoil(broken)
          const before = inStore(dir)
          const error = yield* Effect.flip(images.resolve(`oci:${broken}`))
          assert.strictEqual(error.code, "IMAGE_INVALID", `${what}: ${error.message}`)
          assert.deepStrictEqual(inStore(dir), before, what)
        })
      yield* refused("whose layer is another's by its configuration", (broken) =>
        zstdLayer(broken, 1, (tar) =>
          Buffer.from(tar.toString("latin1").replace("second whose", "second other"), "latin1")
        )
      )
      yield* refused("whose layer's file is another", (broken) => {
        zstdLayer(broken, 1)
        const { layers } = manifestOf(broken)
        const file = fileOf(broken, layers[1]?.digest ?? "")
        writeFileSync(file, Buffer.concat([readFileSync(file), execFileSync("zstd", ["-qc"], { input: "more" })]))
      })
      yield* refused("whose layer is cut", (broken) => {
        zstdLayer(broken, 1)
        withManifest(broken, ({ layers }) => {
          const bytes = readFileSync(fileOf(broken, layers[1]?.digest ?? ""))
          Object.assign(layers[1] ?? {}, put(broken, bytes.subarray(0, bytes.length - 8)))
        })
      })
      yield* refused("whose layer is noise", (broken) =>
        withManifest(broken, ({ layers }) => {
          const mediaType = "application/vnd.oci.image.layer.v1.tar+zstd"
          Object.assign(layers[1] ?? {}, put(broken, randomBytes(5000)), { mediaType })
        })
      )
    }).pipe(Effect.provide(store(dir)))
  })

  it.effect("whose zstd layer holds more than the limit is refused before it is written", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const layout = layoutWith("bomb")
      zstdLayer(layout, 1, () => Buffer.alloc(64 * 2 ** 20))
      const error = yield* Effect.flip(Effect.flatMap(RootfsImage, (images) => images.resolve(`oci:${layout}`)))
      assert.strictEqual(error.code, "ROOTFS_IMG_TOO_LARGE", error.message)
      assert.deepStrictEqual(inStore(dir), [])
    }).pipe(Effect.provide(store(dir, 2 ** 20)))
  })

  it.effect("that is there for other machines only says for which", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const layout = layoutWith("foreign")
      const index = indexOf(layout)
      const [entry] = index.manifests
      const { annotations: _, ...manifest } = entry ?? { mediaType: "", digest: "", size: 0 }
      const platforms = [
        { os: "linux", architecture: "arm64" },
        { os: "linux", architecture: "s390x" },
        { os: "unknown", architecture: "unknown" }
      ]
      const mediaType = "application/vnd.oci.image.index.v1+json"
      const several = {
        schemaVersion: 2,
        mediaType,
        manifests: platforms.map((platform) => ({ ...manifest, platform }))
      }
      const annotations = { "org.opencontainers.image.ref.name": "v1" }
      const manifests = [{ mediaType, ...put(layout, JSON.stringify(several)), annotations }]
      writeFileSync(path.join(layout, "index.json"), JSON.stringify({ schemaVersion: 2, manifests }))
      const error = yield* Effect.flip(Effect.flatMap(RootfsImage, (images) => images.resolve(`oci:${layout}:v1`)))
      assert.strictEqual(error.code, "IMAGE_INVALID", error.message)
      assert.include(error.message, "linux/arm64, linux/s390x, and not for linux/amd64")
      assert.deepStrictEqual([pullsIn(dir), inStore(dir)], [[], []])
    }).pipe(Effect.provide(store(dir)))
  })
})

describe("collecting images", () => {
  it.effect("removes what builds left that were killed long ago, and no other", () => {
    const dir = temporaryHome()
    return Effect.gen(function* () {
      const rootfs = path.join(dir, "cache", "rootfs")
      const [old, recent] = ["a", "b"].map((digit) => path.join(rootfs, `${digit.repeat(64)}.img.building`))
      for (const staging of [old ?? "", recent ?? ""]) mkdirSync(path.join(staging, "tree"), { recursive: true })
      utimesSync(old ?? "", 1, 1)
      yield* Effect.flatMap(ImageStore, (images) => images.gc({ dryRun: false, unusedForMs: 0 }))
      assert.deepStrictEqual([existsSync(old ?? ""), existsSync(recent ?? "")], [false, true])
    }).pipe(Effect.provide(store(dir)))
  })
})
