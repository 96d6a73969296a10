import * as path from "node:path"
import { Args, Command, Options } from "@effect/cli"
import { Console, Effect, Option } from "effect"
import { ImageStore, type StoredImage } from "../../image/ImageStore.ts"
import { Machinen } from "../../Machinen.ts"
import { Mountdisk, type MountImage } from "../../mount/Mountdisk.ts"
import { printable } from "../../platform/printable.ts"
import { durationMs, json } from "../options.ts"
import * as render from "../render.ts"

const reference = Args.text({ name: "image" }).pipe(Args.withDescription("a name, an id, or six digits of one or more"))

const time = (at: number) => new Date(at).toISOString()
const imageJson = (image: StoredImage) => ({
  ...image,
  builtAt: time(image.builtAt),
  lastUsedAt: time(image.lastUsedAt)
})
const mountJson = ({ diskBytes, key, lastUsedAt, path }: MountImage) => ({
  id: key,
  path,
  source: "a mounted directory",
  diskBytes,
  lastUsedAt: time(lastUsedAt)
})
const use = ({ bundles, vms }: StoredImage) =>
  [
    ...(vms.length === 0 ? [] : [`${vms.length} VM${vms.length === 1 ? "" : "s"}`]),
    ...(bundles.length === 0 ? [] : [`${bundles.length} snapshot${bundles.length === 1 ? "" : "s"}`])
  ].join(", ") || "-"

const ls = Command.make("ls", { json }, (input) =>
  Effect.gen(function* () {
    const store = yield* ImageStore
    const [bases, images] = yield* Effect.all([store.bases, store.list])
    if (input.json) {
      return yield* render.json({
        bases: bases.map(({ packages: _, ...base }) => base),
        images: images.map(imageJson)
      })
    }
    const now = Date.now()
    yield* Console.log(
      render.table(
        ["NAME", "ID", "SIZE", "USED", "BY", "SOURCE"],
        [
          ...bases.map(({ name, sizeBytes }) => [name, "-", render.bytes(sizeBytes), "-", "-", "machinen install"]),
          ...images.map((image) => [
            image.names.join(" ") || "-",
            image.id.slice(0, 12),
            render.bytes(image.diskBytes),
            render.age(image.lastUsedAt, now),
            use(image),
            image.source || "-"
          ])
        ]
      )
    )
  })
).pipe(Command.withDescription("list the images there are"))

const inspect = Command.make("inspect", { json, image: reference }, (input) =>
  Effect.gen(function* () {
    const store = yield* ImageStore
    const base = (yield* store.bases).find(({ name }) => name === input.image)
    if (base !== undefined) {
      if (input.json) return yield* render.json(base)
      yield* Console.log(
        render.table(
          ["FIELD", "VALUE"],
          [
            ["name", base.name],
            ["path", base.path],
            ["size", render.bytes(base.sizeBytes)]
          ]
        )
      )
      return yield* Console.log(packages(base.packages))
    }
    const image = yield* store.inspect(input.image)
    if (input.json) return yield* render.json({ ...image, ...imageJson(image) })
    const { config } = image
    const rows: ReadonlyArray<readonly [string, string]> = [
      ["id", image.id],
      ["names", image.names.join(" ")],
      ["source", image.source],
      ["path", image.path],
      ["size", `${render.bytes(image.sizeBytes)}, ${render.bytes(image.diskBytes)} on disk`],
      ["built", time(image.builtAt)],
      ["last used", time(image.lastUsedAt)],
      ["VMs", image.vms.join(" ")],
      ["snapshots", image.bundles.join(" ")],
      ["entrypoint", JSON.stringify(config.entrypoint ?? [])],
      ["command", JSON.stringify(config.cmd ?? [])],
      ["directory", config.cwd ?? "/"],
      ["user", config.user ?? "root"],
      ["ports", (config.exposedPorts ?? []).join(" ")],
      ...Object.entries(config.env ?? {}).map(([key, value]) => ["env", `${key}=${value}`] as const)
    ]
    yield* Console.log(render.table(["FIELD", "VALUE"], rows))
    yield* Console.log(packages(image.packages))
  })
).pipe(Command.withDescription("what is known of an image, with the versions of its Debian packages"))

const packages = (found: Readonly<Record<string, string>>) =>
  Object.entries(found)
    .map(([name, version]) => printable(`${name} ${version}`))
    .join("\n")

const rm = Command.make("rm", { json, images: Args.atLeast(reference, 1) }, (input) =>
  Effect.gen(function* () {
    const store = yield* ImageStore
    const removed = yield* Effect.forEach(input.images, store.remove)
    if (input.json) return yield* render.json(removed)
    for (const { id, name, removed: gone } of removed) {
      yield* Console.log(gone ? id : `${name} (the image ${id.slice(0, 12)} has other names)`)
    }
  })
).pipe(Command.withDescription("take a name away, and with its last name an image"))

const names = Options.text("name").pipe(
  Options.withAlias("n"),
  Options.repeated,
  Options.withDescription("what to call it; may be repeated")
)

const add = Command.make(
  "import",
  {
    json,
    name: names,
    source: Args.text({ name: "source" }).pipe(
      Args.withDescription("a rootfs tarball, an ext4 image, docker://NAME:TAG, docker-archive:FILE or oci:DIR:TAG")
    )
  },
  (input) =>
    Effect.gen(function* () {
      const store = yield* ImageStore
      const image = yield* store.add(input.source, input.name)
      yield* input.json ? render.json({ ...image, ...imageJson(image) }) : Console.log(image.id)
    })
).pipe(Command.withDescription("put an image into the store"))

const tag = Command.make("tag", { image: reference, name: Args.text({ name: "name" }) }, (input) =>
  Effect.flatMap(ImageStore, (store) => store.tag(input.image, input.name))
).pipe(Command.withDescription("give an image one more name"))

const save = Command.make("export", { json, image: reference, out: Args.text({ name: "tarball" }) }, (input) =>
  Effect.gen(function* () {
    const machinen = yield* Machinen
    // a guest packs the image, because it sees owners, attributes and devices whichever user runs this
    const saved = yield* machinen.provision({
      base: input.image,
      out: input.out,
      network: "none",
      prebake: false,
      install: () => Effect.void
    })
    yield* input.json
      ? render.json({ path: saved.imagePath, sizeBytes: saved.sizeBytes, sha256: saved.sha256 })
      : Console.log(path.resolve(input.out))
  })
).pipe(Command.withDescription("write an image to a tarball"))

const gc = Command.make(
  "gc",
  {
    all: Options.boolean("all").pipe(Options.withDescription("however recently it was used")),
    unusedFor: Options.text("unused-for").pipe(
      Options.optional,
      Options.withDescription("only what was not used for so long (default 168h)")
    ),
    dryRun: Options.boolean("dry-run").pipe(Options.withDescription("only say what would be removed")),
    json
  },
  (input) =>
    Effect.gen(function* () {
      const store = yield* ImageStore
      const limit = yield* Effect.transposeMapOption(input.unusedFor, (value) => durationMs("unused-for", value))
      const unusedForMs = input.all ? 0 : Option.getOrElse(limit, () => 7 * 24 * 3_600_000)
      const removed = yield* store.gc({ unusedForMs, dryRun: input.dryRun })
      const mounts = yield* (yield* Mountdisk).collect({ unusedForMs, dryRun: input.dryRun })
      if (input.json) return yield* render.json([...removed.map(imageJson), ...mounts.map(mountJson)])
      for (const { diskBytes, id, source } of [...removed, ...mounts.map(mountJson)]) {
        yield* Console.log(
          `${input.dryRun ? "would remove" : "removed"} ${id.slice(0, 12)} (${render.bytes(diskBytes)}, ${source || "unknown source"})`
        )
      }
      if (removed.length + mounts.length === 0) yield* Console.log("there is nothing to remove")
    })
).pipe(Command.withDescription("remove images without a name, and copies of mounted directories, that nothing uses"))

/** `machinen image ls|inspect|import|export|tag|rm|gc`: the images in the store. */
export const image = Command.make("image").pipe(
  Command.withDescription("the images there are"),
  Command.withSubcommands([ls, inspect, add, save, tag, rm, gc])
)
