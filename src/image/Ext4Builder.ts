import * as path from "node:path"
import type { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"
import { ProvisionError } from "../errors.ts"
import { buildFailed, cacheUnwritable, explained, type Tool } from "../host/hostTools.ts"
import type * as hostTool from "../platform/tool.ts"
import type { Settings } from "../Settings.ts"

/** Builds ext4 images with the host's mke2fs, tar and debugfs. The same input gives the same bytes. */
export interface Ext4Builder {
  /** Makes the file `image`: an empty writable layer (upper) of `sizeBytes`, a sparse file. */
  readonly upper: (image: string, sizeBytes: number) => Effect.Effect<void, ProvisionError>
  /** Unpacks a rootfs tarball into the directory `tree`. `staging` gets the owners of the files, when this process is not root. */
  readonly extract: (tarball: string, tree: string, staging: string) => Effect.Effect<void, ProvisionError>
  /**
   * Makes the file `image` in `staging` from a tree. The same tree gives the same bytes, because a bundle is restored only with the image that it
   * was taken on. `sha` is the sha256 of the tree's source, from which the filesystem gets its UUID.
   */
  readonly fromTree: (tree: string, staging: string, sha: string) => Effect.Effect<void, ProvisionError>
}

/** `cacheDir` is named in the errors about a cache that cannot be written. */
export const make = (
  fs: FileSystem.FileSystem,
  tool: Tool,
  { imageLimitBytes, mke2fs: given }: Pick<Settings["Type"], "imageLimitBytes" | "mke2fs">,
  cacheDir: string
): Ext4Builder => {
  const cacheFailed = cacheUnwritable(cacheDir)
  const building = explained(cacheDir, buildFailed)
  const mke2fs = Option.getOrElse(given, () => "mke2fs")

  const makeExt4 = (
    image: string,
    sizeBytes: number,
    options: ReadonlyArray<string>,
    through: (argv: ReadonlyArray<string>) => readonly [string, ...ReadonlyArray<string>] = ([first = "", ...rest]) => [
      first,
      ...rest
    ]
  ) =>
    Effect.gen(function* () {
      yield* fs
        .writeFile(image, new Uint8Array(0))
        .pipe(Effect.zipRight(fs.truncate(image, sizeBytes)), Effect.mapError(cacheFailed))
      const argv = through([mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", ...options, image])
      yield* building(tool(argv, "mke2fs"))
    })

  /** Owners and device nodes need root. Other users run the command under fakeroot, which keeps both in `staging` between commands. */
  const asRoot = (staging: string, argv: ReadonlyArray<string>): readonly [string, ...ReadonlyArray<string>] => {
    const state = path.join(staging, "owners")
    const [first = "true", ...rest] = argv
    if (process.getuid?.() === 0) return [first, ...rest]
    return [
      "sh",
      "-c",
      'state=$1; shift; : >>"$state"; exec fakeroot -i "$state" -s "$state" -- "$@"',
      "sh",
      state,
      ...argv
    ]
  }

  /**
   * The tarball is not trusted. GNU tar refuses names with `..`, makes absolute names relative, and never writes through a symbolic link of the
   * archive. Beyond the size limit tar's own checkpoint makes the file `too-large` and ends tar; the shell turns the signal into an exit code.
   */
  const extract = Effect.fnUntraced(function* (tarball: string, tree: string, staging: string) {
    const beyondLimit = path.join(staging, "too-large")
    const argv = asRoot(staging, [
      "sh",
      "-c",
      'BEYOND_LIMIT=$1; export BEYOND_LIMIT; shift; tar "$@"; exit $?',
      "sh",
      beyondLimit,
      "--extract",
      "--numeric-owner",
      "--same-owner",
      // with root all extended attributes (capabilities, ACLs); without root none, because fakeroot loses the type of a file that has any
      ...(process.getuid?.() === 0 ? ["--xattrs", "--xattrs-include=*"] : ["--no-xattrs"]),
      "--preserve-permissions",
      `--checkpoint=${Math.ceil(imageLimitBytes / tarRecord)}`,
      '--checkpoint-action=exec=: >"$BEYOND_LIMIT"; kill -KILL $PPID',
      "--file",
      tarball,
      "--directory",
      tree
    ])
    yield* tool(argv, "tar").pipe(
      Effect.catchTag("ToolFailed", (failed) =>
        Effect.flatMap(
          Effect.orElseSucceed(fs.exists(beyondLimit), () => false),
          (beyond) => Effect.fail(beyond ? tooLarge(tarball, imageLimitBytes) : failed)
        )
      ),
      explained(cacheDir, (failed) => tarballInvalid(tarball, failed))
    )
  })

  const fromTree = Effect.fnUntraced(function* (tree: string, staging: string, sha: string) {
    const image = path.join(staging, "image")
    const listing = yield* building(tool(["find", tree, "-printf", "%i %s %b\\n"]))
    const inodes = new Map<string, number>()
    for (const line of listing.trimEnd().split("\n")) {
      const [inode = "", size, blocks] = line.split(" ")
      // counts the blocks of large files only: holes take no space, but the kernel reports blocks of small files late
      const bytes = Number(size) > sparseFrom ? Math.min(Number(size), Number(blocks) * 512) : Number(size)
      inodes.set(inode, Math.ceil(bytes / 4096) * 4096)
    }
    const bytes = [...inodes.values()].reduce((sum, size) => sum + size, 0)
    // Leaves room for metadata. The file is sparse, so unused room takes no space. A base never grows.
    const size = Math.ceil((bytes * 1.25 + 64 * 1024 * 1024) / 4096) * 4096
    const id = sha.replace(/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*$/, "$1-$2-4$3-8$4-$5")
    yield* makeExt4(
      image,
      size,
      [
        ...["-I", "256", "-N", String(inodes.size + 4096), "-U", id],
        ...["-O", baseFeatures, "-E", `hash_seed=${id},lazy_itable_init=1,nodiscard`, "-d", tree]
      ],
      (argv) => asRoot(staging, argv)
    )
    // mke2fs copies access and change times of the extracted files, which differ from run to run: they are set to 0
    const times = path.join(staging, "times")
    const numbers = [2, ...Array.from({ length: inodes.size + 16 }, (_, i) => 11 + i)]
    yield* Effect.mapError(
      fs.writeFileString(
        times,
        numbers.map((n) => `set_inode_field <${n}> atime @1\nset_inode_field <${n}> ctime @1\n`).join("")
      ),
      cacheFailed
    )
    yield* building(tool(["debugfs", "-w", "-f", times, image]))
  })

  return {
    upper: (image, sizeBytes) =>
      makeExt4(image, sizeBytes, ["-O", upperFeatures, "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"]),
    extract,
    fromTree
  }
}

/** Without reserved descriptor blocks an upper takes 92 KiB instead of 1.2 MiB. */
const upperFeatures = "^resize_inode"

/** Features of a base, named one by one, so that the host's mke2fs.conf does not decide them. */
const baseFeatures =
  "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,metadata_csum,sparse_super,64bit"

/** Bytes of a tar record, the unit of tar's checkpoints. */
const tarRecord = 10240
const sparseFrom = 64 * 1024 * 1024
const tooLarge = (tarball: string, limit: number) =>
  new ProvisionError({
    code: "ROOTFS_IMG_TOO_LARGE",
    message: `${tarball} holds more than ${Math.ceil(limit / 1024 ** 2)} MiB`,
    hint: "if it is to be that large, raise MACHINEN_IMAGE_LIMIT_MIB"
  })

const tarballInvalid = (tarball: string, failed: hostTool.ToolFailed) =>
  new ProvisionError({
    code: "IMAGE_INVALID",
    message: `${tarball} cannot be unpacked: ${failed.message}`,
    hint: "is the tarball complete, and a root filesystem?",
    cause: failed
  })
