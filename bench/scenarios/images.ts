import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import { RootfsImage } from "../../src/image/RootfsImage.ts"
import { Machinen } from "../../src/Machinen.ts"
import * as command from "../../src/platform/command.ts"
import { Settings } from "../../src/Settings.ts"
import { atMost, BenchError, p50, type Scenario, type Variant } from "../harness.ts"

const extra = 60 * 1024 ** 2

const run = (...argv: readonly [string, ...ReadonlyArray<string>]) =>
  Effect.flatMap(command.run(argv), ({ code, stderr }) =>
    code === 0
      ? Effect.void
      : new BenchError({ message: `${argv.join(" ")} ended with code ${code}: ${stderr.trim()}` })
  )

/** Removes an image from the cache, so that it is made again. */
const forget = (image: string) =>
  Effect.gen(function* () {
    const fs = yield* FileSystem.FileSystem
    for (const file of [image, `${image}.ok`]) yield* fs.remove(file, { force: true })
  })

/** Runs the tools alone, in a directory beside the cache. */
const raw = (
  name: string,
  work: string,
  unpack: (tree: string) => readonly [string, ...ReadonlyArray<string>]
): Variant => ({
  name,
  released: false,
  run: ({ mark }) =>
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const tree = path.join(work, "tree")
      const image = path.join(work, "image")
      yield* run("mkdir", "-p", work)
      yield* run(...unpack(tree))
      yield* mark("unpacked")
      yield* run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", tree, image, "512M")
      yield* mark("image")
      yield* fs.remove(work, { recursive: true, force: true })
    })
})

export const images: Scenario = {
  name: "images",
  description:
    "a tarball and a container image to a bootable image, beside tar, umoci and mke2fs alone; a boot from either",
  setup: Effect.fn("images.setup")(function* ({ runs = 5 }) {
    const fs = yield* FileSystem.FileSystem
    const machinen = yield* Machinen
    const store = yield* RootfsImage
    const { cacheDir } = yield* Settings
    // in the cache directory, so that both variants write to the same disk
    const dir = yield* fs.makeTempDirectoryScoped({ directory: cacheDir, prefix: "bench-" })
    const tarball = path.join(dir, "debian.tar.gz")
    yield* machinen.provision({
      base: "debian",
      out: tarball,
      network: "none",
      prebake: false,
      install: () => Effect.void
    })
    const tree = path.join(dir, "oci-tree")
    const layout = path.join(dir, "layout")
    yield* run(
      "sh",
      "-c",
      'mkdir "$1" && tar -xpf "$2" -C "$1" && head -c "$3" /dev/urandom >"$1/srv/random"',
      "sh",
      tree,
      tarball,
      String(extra)
    )
    yield* run("umoci", "init", "--layout", layout)
    yield* run("umoci", "new", "--image", `${layout}:v1`)
    yield* run("umoci", "insert", "--image", `${layout}:v1`, tree, "/")
    const fromTarball = yield* store.resolve(tarball)
    const reference = `oci:${layout}:v1`
    const fromOci = yield* store.resolve(reference)
    yield* Effect.addFinalizer(() =>
      Effect.ignore(
        Effect.forEach([fromTarball, fromOci], (image) =>
          Effect.zipRight(forget(image), fs.remove(image.replace(/\.img$/, ".json"), { force: true }))
        )
      )
    )

    const ours = (name: string, image: string, from: string): Variant => ({
      name,
      released: false,
      run: ({ mark }) =>
        Effect.gen(function* () {
          yield* forget(image)
          yield* store.resolve(from)
          yield* mark("image")
        })
    })
    const boot = (name: string, image: string): Variant => ({
      name,
      released: false,
      run: ({ elapsed, mark, record }) =>
        Effect.gen(function* () {
          const before = yield* elapsed
          const { phases, vm } = yield* machinen.boot({ image, network: "none" })
          yield* record("materialize", phases.get("rootdisk-materialize") ?? Number.NaN, "ms")
          yield* mark("booted", (yield* elapsed) - before)
          yield* vm.kill
        })
    })
    const work = path.join(dir, "work")
    return {
      warmup: 1,
      runs,
      settings: { runs, tarball: Number((yield* fs.stat(tarball)).size), extra },
      skipped: [],
      variants: [
        raw("tar+mke2fs", work, (tree) => ["sh", "-c", 'mkdir "$1" && tar -xpf "$2" -C "$1"', "sh", tree, tarball]),
        ours("tarball", fromTarball, tarball),
        raw("umoci+mke2fs", work, (tree) => ["umoci", "raw", "unpack", "--image", `${layout}:v1`, tree]),
        ours("container", fromOci, reference),
        boot("boot debian", "debian"),
        boot("boot tarball", tarball),
        boot("boot container", reference)
      ],
      verdicts: (results) => [
        atMost(
          "a tarball: 1.2 × tar + mke2fs",
          "ms",
          p50(results, "tarball", "image"),
          1.2 * p50(results, "tar+mke2fs", "image")
        ),
        atMost(
          "a container: 1.3 × umoci + mke2fs",
          "ms",
          p50(results, "container", "image"),
          1.3 * p50(results, "umoci+mke2fs", "image")
        ),
        atMost(
          "a second boot from a tarball: 30 ms over a prebuilt image",
          "ms",
          p50(results, "boot tarball", "materialize") - p50(results, "boot debian", "materialize"),
          30
        )
      ]
    }
  })
}
