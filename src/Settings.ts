import * as os from "node:os"
import * as path from "node:path"
import { Config, Context, Duration, Effect, Layer, Option } from "effect"

const home = path.join(os.homedir(), ".machinen")

/**
 * Reads a directory from the environment. Empty means not given, as in shells. A relative path is refused, because a VM's shim runs in `/` and the
 * user's next command may run anywhere.
 */
const directory = (name: string) =>
  Config.string(name).pipe(
    Config.validate({
      message: "must be an absolute path",
      validation: (value) => value === "" || path.isAbsolute(value)
    }),
    Config.map((value) => (value === "" ? Option.none<string>() : Option.some(path.normalize(value)))),
    Config.withDefault(Option.none<string>())
  )

const directoryOr = (name: string, otherwise: string) =>
  Config.map(directory(name), (given) => Option.getOrElse(given, () => otherwise))

/**
 * Reads a program from the environment: a name on PATH, or a path. Empty means not given. A relative path is resolved in this process's working
 * directory, because the shim runs in `/`.
 */
const given = (name: string) =>
  Config.option(Config.string(name)).pipe(
    Config.map(Option.filter((value) => value !== "")),
    Config.map(Option.map((value) => (value.includes("/") ? path.resolve(value) : value)))
  )

const raw = Config.nested(
  Config.all({
    home: directoryOr("HOME", home),
    cacheDir: directoryOr("CACHE_DIR", path.join(os.homedir(), ".cache", "machinen")),
    assetsDir: directory("ASSETS_STORE"),
    registryDir: directory("REGISTRY_DIR"),
    backend: Config.literal("auto", "qemu")("BACKEND").pipe(Config.withDefault("auto")),
    accel: Config.literal("auto", "kvm", "tcg")("ACCEL").pipe(Config.withDefault("auto")),
    vmm: given("VMM"),
    mke2fs: given("MKE2FS"),
    gvproxy: given("GVPROXY"),
    mksquashfs: given("MKSQUASHFS"),
    baseAssetsDir: given("ASSETS_DIR"),
    imageLimitMib: Config.integer("IMAGE_LIMIT_MIB").pipe(Config.withDefault(16 * 1024)),
    bootTimeout: Config.duration("BOOT_TIMEOUT").pipe(Config.withDefault(Duration.seconds(60))),
    stopGrace: Config.duration("STOP_GRACE").pipe(Config.withDefault(Duration.seconds(5))),
    snapshotEngine: Config.string("SNAPSHOT_ENGINE").pipe(Config.withDefault("")),
    prepared: Config.literal("auto", "off")("PREPARED").pipe(Config.withDefault("auto"))
  }),
  "MACHINEN"
)

export interface SettingsValues {
  /** Holds all state of this user: VMs, assets, keys. Default `~/.machinen`. */
  readonly home: string
  /** Holds files that can be built again: root images, mount disks, probe results, templates. */
  readonly cacheDir: string
  /** Holds kernel, guest binary, shim and base images, by content (src/host/Assets.ts). */
  readonly assetsDir: string
  /** Holds a directory for each VM. */
  readonly vmsDir: string
  /** Holds a pin file for each name in use. */
  readonly namesDir: string
  readonly backend: "auto" | "qemu"
  readonly accel: "auto" | "kvm" | "tcg"
  /** The VMM binary to use instead of the one on PATH. */
  readonly vmm: Option.Option<string>
  readonly mke2fs: Option.Option<string>
  /** The gvproxy binary to use instead of the one that set-up builds. */
  readonly gvproxy: Option.Option<string>
  readonly mksquashfs: Option.Option<string>
  /** The user's own directory with a kernel and a root filesystem to build images upon, instead of those of set-up. */
  readonly baseAssetsDir: Option.Option<string>
  /** Most bytes that the content of a tarball, or a built image, may have. Default 16 GiB. */
  readonly imageLimitBytes: number
  /**
   * Time limit from the VMM's start until the guest is ready and has its secrets. Default 60 s. A boot from a template gets half of it; a boot by
   * kernel that follows gets all of it again.
   */
  readonly bootTimeout: Duration.Duration
  /** Time between the request to power off and SIGKILL. Default 5 s. */
  readonly stopGrace: Duration.Duration
  /** MACHINEN_SNAPSHOT_ENGINE as given, else empty. Checked when a snapshot is taken (`chooseEngine`). */
  readonly snapshotEngine: string
  /** `auto`: a boot starts from a template when there is one of its shape. `off`: it always boots a kernel. */
  readonly prepared: "auto" | "off"
}

const derive = (c: Config.Config.Success<typeof raw>): SettingsValues => {
  const registryDir = Option.getOrElse(c.registryDir, () => c.home)
  return {
    ...c,
    imageLimitBytes: c.imageLimitMib * 1024 ** 2,
    assetsDir: Option.getOrElse(c.assetsDir, () => path.join(c.home, "assets")),
    vmsDir: path.join(registryDir, "vms"),
    namesDir: path.join(registryDir, "names")
  }
}

/**
 * Settings from this process's environment, read once: MACHINEN_HOME, MACHINEN_CACHE_DIR, MACHINEN_ASSETS_STORE, MACHINEN_REGISTRY_DIR, MACHINEN_BACKEND,
 * MACHINEN_ACCEL, MACHINEN_VMM, MACHINEN_MKE2FS, MACHINEN_MKSQUASHFS, MACHINEN_GVPROXY, MACHINEN_ASSETS_DIR, MACHINEN_IMAGE_LIMIT_MIB,
 * MACHINEN_BOOT_TIMEOUT and MACHINEN_STOP_GRACE (as "5 seconds"), MACHINEN_SNAPSHOT_ENGINE, MACHINEN_PREPARED.
 */
export class Settings extends Context.Tag("machinen/Settings")<Settings, SettingsValues>() {
  static readonly layer = Layer.effect(Settings, Effect.map(raw, derive))

  /** For tests: all directories are below `dir`. */
  static readonly layerTest = (dir: string, overrides?: Partial<SettingsValues>) =>
    Layer.succeed(Settings, {
      home: dir,
      cacheDir: path.join(dir, "cache"),
      assetsDir: path.join(dir, "assets"),
      vmsDir: path.join(dir, "vms"),
      namesDir: path.join(dir, "names"),
      backend: "auto",
      accel: "auto",
      vmm: Option.none(),
      mke2fs: Option.none(),
      gvproxy: Option.none(),
      mksquashfs: Option.none(),
      baseAssetsDir: Option.none(),
      imageLimitBytes: 16 * 1024 ** 3,
      bootTimeout: Duration.seconds(60),
      stopGrace: Duration.seconds(5),
      snapshotEngine: "",
      prepared: "auto",
      ...overrides
    })
}
