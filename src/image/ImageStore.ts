import * as path from "node:path"
import { CommandExecutor, FileSystem } from "@effect/platform"
import { Context, Effect, Layer, Option, Order, Schema } from "effect"
import { type AssetError, type BootError, ProvisionError, type RegistryError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import { Registry } from "../machine/Registry.ts"
import type { VmEntry } from "../machine/VmEntry.ts"
import * as atomicArtifact from "../platform/atomicArtifact.ts"
import * as ext4 from "../platform/ext4.ts"
import { given } from "../platform/given.ts"
import { Settings } from "../Settings.ts"
import { ImageId, ImageName, ImageRecord, withTag } from "./Image.ts"
import type { ImageConfig } from "./ImageConfig.ts"
import { baseNames, RootfsImage } from "./RootfsImage.ts"

/** An image that VMs can be booted from. */
export interface StoredImage {
  readonly id: ImageId
  /** Path of the ext4 image. */
  readonly path: string
  readonly names: ReadonlyArray<string>
  /** The reference or path by which the image was added. */
  readonly source: string
  readonly sizeBytes: number
  /** Bytes that the image takes on the host's disk. */
  readonly diskBytes: number
  /** Unix milliseconds. */
  readonly builtAt: number
  readonly lastUsedAt: number
  /** VMs that run from the image, by name or id. */
  readonly vms: ReadonlyArray<string>
  /** Directories of bundles that can be restored only with this image. */
  readonly bundles: ReadonlyArray<string>
}

/** An image, with what is in it. */
export interface ImageDetails extends StoredImage {
  readonly config: ImageConfig
  /** Debian packages and their versions, of an image that has a dpkg database. */
  readonly packages: Readonly<Record<string, string>>
}

/** A base image that set-up provides. */
export interface BaseImage {
  readonly name: string
  readonly path: string
  readonly sizeBytes: number
  readonly packages: Readonly<Record<string, string>>
}

export type ImageFailure = ProvisionError | RegistryError
const Info = Schema.parseJson(Schema.Struct({ packages: Schema.Record({ key: Schema.String, value: Schema.String }) }))

/**
 * The user's view of the images in RootfsImage's cache. An image's id is the sha256 of its source; names are files that hold an id. An image
 * that a VM runs from or is about to run from, or that a bundle needs, is not removed. Failures are ProvisionErrors (IMAGE_*, ROOTFS_IMG_*).
 */
export class ImageStore extends Context.Tag("machinen/ImageStore")<
  ImageStore,
  {
    readonly bases: Effect.Effect<ReadonlyArray<BaseImage>, AssetError>
    /** All images, the most recently used first. */
    readonly list: Effect.Effect<ReadonlyArray<StoredImage>, ImageFailure>
    /** Describes an image, by name, id, or the first digits of an id (six or more). */
    readonly inspect: (reference: string) => Effect.Effect<ImageDetails, ImageFailure>
    /** Adds an image (a path or reference, as of a boot) to the store under these names. */
    readonly add: (image: string, names: ReadonlyArray<string>) => Effect.Effect<ImageDetails, ImageFailure | BootError>
    readonly tag: (reference: string, name: string) => Effect.Effect<void, ImageFailure>
    /** Removes a name. The last name, or an id instead of a name, removes the image too. Returns what was removed. */
    readonly remove: (
      reference: string
    ) => Effect.Effect<{ readonly id: ImageId; readonly name?: string; readonly removed: boolean }, ImageFailure>
    /** Removes unused images without a name that were not used for `unusedForMs`. With `dryRun` only lists them. */
    readonly gc: (options: {
      readonly unusedForMs: number
      readonly dryRun: boolean
    }) => Effect.Effect<ReadonlyArray<StoredImage>, ImageFailure>
  }
>() {
  static readonly layer = Layer.effect(
    ImageStore,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const executor = yield* CommandExecutor.CommandExecutor
      const settings = yield* Settings
      const assets = yield* Assets
      const registry = yield* Registry
      const images = yield* RootfsImage
      const dir = path.join(settings.cacheDir, "rootfs")
      const imageOf = (id: ImageId) => path.join(dir, `${id}.img`)

      const entries = (of: string) => Effect.orElseSucceed(fs.readDirectory(of), () => [] as ReadonlyArray<string>)

      /** Bundles of an image that are still where they were made. Notes about other bundles are removed. */
      const bundlesOf = Effect.fnUntraced(function* (image: string) {
        const notes = yield* entries(`${image}.bundles`)
        const found = yield* Effect.forEach(notes, (note) =>
          Effect.gen(function* () {
            const file = path.join(`${image}.bundles`, note)
            const bundle = yield* Effect.orElseSucceed(fs.readFileString(file), () => "")
            if (bundle !== "" && (yield* entries(bundle)).length > 0) return [bundle]
            yield* Effect.ignore(fs.remove(file, { force: true }))
            return []
          })
        )
        return found.flat().sort(Order.string)
      })

      const uses = (image: string) => (entry: VmEntry) => entry.disks?.some((disk) => disk.path === image) ?? false

      const look = Effect.fnUntraced(function* (
        id: ImageId,
        names: ReadonlyArray<{ readonly name: string; readonly id: ImageId }>,
        vms: ReadonlyArray<VmEntry>
      ) {
        const image = imageOf(id)
        const info = yield* Effect.option(fs.stat(image))
        const marker = yield* Effect.option(
          Effect.orElse(fs.stat(`${image}.ok`), () => fs.stat(atomicArtifact.asideMarker(image)))
        )
        if (Option.isNone(info) || Option.isNone(marker)) return Option.none<StoredImage>()
        const record = yield* Effect.option(
          Effect.flatMap(fs.readFileString(path.join(dir, `${id}.json`)), Schema.decode(Schema.parseJson(ImageRecord)))
        )
        const time = (at: Option.Option<Date>) => Option.match(at, { onNone: () => 0, onSome: Number })
        const stored: StoredImage = {
          id,
          path: image,
          names: names.flatMap((each) => (each.id === id ? [each.name] : [])).sort(Order.string),
          source: Option.match(record, { onNone: () => "", onSome: ({ source }) => source }),
          sizeBytes: Number(info.value.size),
          diskBytes: Option.getOrElse(info.value.blocks, () => 0) * 512,
          builtAt: Option.match(record, { onNone: () => time(info.value.mtime), onSome: ({ builtAt }) => builtAt }),
          lastUsedAt: time(marker.value.mtime),
          vms: vms.filter(uses(image)).map(({ label }) => label),
          bundles: yield* bundlesOf(image)
        }
        return Option.some(stored)
      })

      const list = Effect.gen(function* () {
        const ids = (yield* entries(dir)).flatMap((file) =>
          /^[0-9a-f]{64}\.img$/.test(file) ? [ImageId.make(file.slice(0, 64))] : []
        )
        const [names, vms] = yield* Effect.all([images.names, registry.list])
        const found = yield* Effect.forEach(ids, (id) => look(id, names, vms), { concurrency: 16 })
        return found.flatMap(Option.toArray).sort((a, b) => b.lastUsedAt - a.lastUsedAt || Order.string(a.id, b.id))
      })

      /** Finds the image of a reference, and the name by which it was found. */
      const find = Effect.fnUntraced(function* (reference: string) {
        const all = yield* list
        const named = [reference, withTag(reference)]
        const byName = all.find(({ names }) => names.some((name) => named.includes(name)))
        if (byName !== undefined) {
          return { image: byName, name: byName.names.find((name) => named.includes(name)) }
        }
        const byId = /^[0-9a-f]{6,64}$/.test(reference) ? all.filter(({ id }) => id.startsWith(reference)) : []
        const [only] = byId
        if (only !== undefined && byId.length === 1) return { image: only, name: undefined }
        return yield* notFound(reference, byId.length)
      })

      /** Installed packages by dpkg's status file. */
      const packagesOf = (image: string) =>
        ext4.readFile(image, "/var/lib/dpkg/status", maxDpkgStatus).pipe(
          Effect.provideService(CommandExecutor.CommandExecutor, executor),
          Effect.map(Option.match({ onNone: () => ({}), onSome: (status) => parsePackages(status.toString()) })),
          Effect.catchAll((cause) =>
            Effect.as(Effect.logWarning(`the packages of ${image} cannot be told: ${cause.message}`), {})
          )
        )

      const details = (image: StoredImage) =>
        Effect.map(
          Effect.all([images.config(image.path), packagesOf(image.path)], { concurrency: 2 }),
          ([config, packages]): ImageDetails => ({ ...image, config, packages })
        )

      const checkName = (name: string) =>
        Effect.mapError(Schema.decode(ImageName)(name), () => nameInvalid(name)).pipe(
          Effect.filterOrFail(
            (name) => !(baseNames as ReadonlyArray<string>).includes(name.replace(/:latest$/, "")),
            () => nameInvalid(name)
          ),
          Effect.map(withTag)
        )

      /**
       * Removes an image that nothing uses. The image is set aside first; then users are searched; then it is removed or put back. A boot claims its
       * VM before it looks for the image. So either this search sees the VM, or the boot sees no image and makes it again.
       */
      const removeImage = (id: ImageId) =>
        atomicArtifact
          .setAside(imageOf(id))(
            Effect.gen(function* () {
              const vms = yield* registry.list
              const image = imageOf(id)
              const user = vms.find(uses(image))
              if (user !== undefined) return yield* inUse(id, `the VM ${user.label} runs from it`)
              const booting = vms.find(({ disks }) => disks === undefined)
              if (booting !== undefined)
                return yield* inUse(id, `the VM ${booting.label} is being started, maybe from it`)
              const [bundle] = yield* bundlesOf(image)
              if (bundle !== undefined) return yield* inUse(id, `the snapshot ${bundle} needs it`)
              // the image first: without it the other files have no meaning
              for (const file of [
                image,
                atomicArtifact.asideMarker(image),
                `${image}.bundles`,
                path.join(dir, `${id}.json`)
              ]) {
                yield* fs
                  .remove(file, { recursive: true, force: true })
                  .pipe(Effect.mapError((cause) => notRemoved(file, cause)))
              }
            })
          )
          .pipe(
            Effect.provideService(FileSystem.FileSystem, fs),
            Effect.catchTag("SystemError", (cause) => notRemoved(imageOf(id), cause))
          )

      return ImageStore.of({
        list,
        bases: Effect.map(
          Effect.forEach(baseNames, (name) =>
            Effect.gen(function* () {
              const found = yield* assets.find(`base-${name}`)
              if (Option.isNone(found)) return []
              const { dir, manifest } = found.value
              const info = yield* Effect.option(
                Effect.flatMap(fs.readFileString(path.join(dir, "info.json")), Schema.decode(Info))
              )
              const base: BaseImage = {
                name,
                path: path.join(dir, "base.ext4"),
                sizeBytes: manifest.files["base.ext4"]?.size ?? 0,
                packages: Option.match(info, { onNone: () => ({}), onSome: ({ packages }) => packages })
              }
              return [base]
            })
          ),
          (found) => found.flat()
        ),
        inspect: Effect.fn("ImageStore.inspect")(function* (reference) {
          return yield* details((yield* find(reference)).image)
        }),
        add: Effect.fn("ImageStore.add")(function* (image, names) {
          const checked = yield* Effect.forEach(names, checkName)
          const id = yield* images.add(image)
          yield* Effect.forEach(checked, (name) => images.setName(name, Option.some(id)))
          return yield* details((yield* find(id)).image)
        }),
        tag: Effect.fn("ImageStore.tag")(function* (reference, name) {
          const checked = yield* checkName(name)
          const { image } = yield* find(reference)
          yield* images.setName(checked, Option.some(image.id))
        }),
        remove: Effect.fn("ImageStore.remove")(function* (reference) {
          const { image, name } = yield* find(reference)
          const others = image.names.filter((each) => each !== name)
          if (name !== undefined && others.length > 0) {
            yield* images.setName(name, Option.none())
            return { id: image.id, name, removed: false }
          }
          yield* removeImage(image.id)
          yield* Effect.forEach(image.names, (each) => images.setName(each, Option.none()))
          return { id: image.id, ...given({ name }), removed: true }
        }),
        gc: Effect.fn("ImageStore.gc")(function* ({ dryRun, unusedForMs }) {
          const before = Date.now() - unusedForMs
          const all = yield* list
          const due = all.filter(
            ({ bundles, lastUsedAt, names, vms }) =>
              names.length === 0 && vms.length === 0 && bundles.length === 0 && lastUsedAt <= before
          )
          if (dryRun) return due
          const removed = yield* Effect.filter(due, ({ id }) =>
            removeImage(id).pipe(
              Effect.as(true),
              // a VM has begun to use the image
              Effect.catchIf(
                (e) => e.code === "IMAGE_IN_USE",
                () => Effect.succeed(false)
              )
            )
          )
          yield* images.collectLayers
          yield* Effect.provideService(
            atomicArtifact.removeAbandoned(dir, Date.now() - abandonedAfterMs),
            FileSystem.FileSystem,
            fs
          )
          return removed
        })
      })
    })
  )
}

/** Age in milliseconds from which the leftovers of killed builds are removed. No running build leaves its files untouched that long. */
const abandonedAfterMs = 3_600_000

const maxDpkgStatus = 64 * 1024 * 1024

/** Parses a dpkg database: versions of installed packages by name. `Package`, `Status` and `Version` come in this order. */
export const parsePackages = (status: string): Readonly<Record<string, string>> =>
  Object.fromEntries(
    status.split("\n\n").flatMap((paragraph) => {
      const field = (name: string) => new RegExp(`^${name}: (.*)$`, "m").exec(paragraph)?.[1]
      const [name, version] = [field("Package"), field("Version")]
      const installed = / installed$/.test(field("Status") ?? "")
      return installed && name !== undefined && version !== undefined ? [[name, version]] : []
    })
  )

const notFound = (reference: string, many: number) =>
  new ProvisionError({
    code: "IMAGE_NOT_FOUND",
    message:
      many > 1
        ? `${reference} begins the ids of ${many} images`
        : `there is no image ${JSON.stringify(reference)} in the store`,
    hint: "`machinen image ls` shows what there is"
  })

const nameInvalid = (name: string) =>
  new ProvisionError({
    code: "IMAGE_NAME_INVALID",
    message: `${JSON.stringify(name.slice(0, 220))} cannot be an image's name`,
    hint: `lower-case letters, digits, and . _ - / between them, with a tag after a colon if need be: team/web:1.2; not ${baseNames.join(", ")}, nor what could be an id`
  })

const inUse = (id: ImageId, why: string) =>
  new ProvisionError({
    code: "IMAGE_IN_USE",
    message: `the image ${id.slice(0, 12)} cannot be removed: ${why}`,
    hint: "stop the VM, or remove the snapshot, first"
  })

const notRemoved = (file: string, cause: Error) =>
  new ProvisionError({ code: "ROOTFS_IMG_IO", message: `${file} cannot be removed: ${cause.message}`, cause })
