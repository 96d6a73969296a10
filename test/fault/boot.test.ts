import { execFileSync } from "node:child_process"
import { existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync, truncateSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import type { BootOptions } from "../../src/machine/BootOptions.ts"
import {
  assertNothingLeft,
  busyboxTarball,
  environment,
  executable,
  fakeVmm,
  hang,
  live,
  settled,
  smallDisk,
  temporaryHome
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

/** Without the probe for KVM, which would run the VMMs of these tests; and with a kernel, whose steps these are. */
const tcg = { MACHINEN_ACCEL: "tcg", MACHINEN_PREPARED: "off" }

/** Boots with the settings given, which must fail, and gives the error. */
const failing = (
  options: { readonly [K in keyof BootOptions]: BootOptions[K] | undefined },
  settings: Readonly<Record<string, string>> = {},
  where = home
) =>
  Effect.gen(function* () {
    const error = yield* Effect.flip(
      Effect.flatMap(Machinen, (machinen) => Effect.scoped(machinen.boot(given({ image: "micro", ...options })))).pipe(
        // the reporter would print a whole VM
        Effect.flatMap(() => Effect.dieMessage("it booted"))
      )
    )
    assert.isNotEmpty(error.message)
    assertNothingLeft(where)
    return error
  }).pipe(Effect.provide(live(where, { ...tcg, ...settings })))

const given = (options: object): BootOptions =>
  Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined))

const write = (name: string, contents: Uint8Array | string): string => {
  const file = path.join(home, name)
  writeFileSync(file, contents)
  return file
}

describe("an image", () => {
  const images: ReadonlyArray<readonly [what: string, image: () => string, codes: ReadonlyArray<string>]> = [
    ["that is not there fails the boot, with its path and a hint", () => "/no/such/image", ["BOOT_IMAGE_NOT_FOUND"]],
    ["that is a directory", () => home, ["BOOT_IMAGE_INVALID"]],
    ["that is a device", () => "/dev/null", ["BOOT_IMAGE_INVALID"]],
    ["that is empty", () => write("empty.tar", ""), ["IMAGE_INVALID"]],
    ["that is noise", () => write("noise.tar.gz", Buffer.alloc(100_000, "noise")), ["IMAGE_INVALID"]],
    [
      "that is cut short",
      () => {
        const tarball = busyboxTarball(home, "short")
        truncateSync(tarball, 200_000)
        return tarball
      },
      ["IMAGE_INVALID"]
    ],
    [
      "that says of itself it is ext4, and is not",
      () => {
        // a superblock's magic and nothing behind it
        const image = Buffer.alloc(8 * 2 ** 20)
        image.writeUInt16LE(0xef53, 1024 + 0x38)
        return write("broken.ext4", image)
      },
      ["IMAGE_INVALID"]
    ],
    [
      "whose link leads nowhere",
      () => {
        const link = path.join(home, "dangling")
        if (!existsSync(link)) symlinkSync("/no/such/image", link)
        return link
      },
      ["BOOT_IMAGE_NOT_FOUND"]
    ],
    // root may read every file but one on a medium that is broken: /proc/self/mem of offset 0 is such a file
    ["that cannot be read", () => "/proc/self/mem", ["BOOT_IMAGE_INVALID", "PROVISION_BASE_NOT_FOUND"]]
  ]
  for (const [what, image, codes] of images) {
    it.live(`${what} is refused`, () =>
      Effect.gen(function* () {
        const error = yield* failing({ image: image() })
        assert.include(codes, error.code)
        assert.isNotEmpty(error.hint ?? "")
        const rest = readdirSync(path.join(environment(home)["MACHINEN_CACHE_DIR"] ?? "", "rootfs"))
        assert.deepStrictEqual(
          rest.filter((name) => name.endsWith(".building")),
          []
        )
      })
    )
  }

  it.live(
    "without an init of ours boots all the same, for the init comes with us; without a shell it runs nothing",
    () =>
      Effect.gen(function* () {
        const tree = path.join(home, "bare")
        mkdirSync(path.join(tree, "etc"), { recursive: true })
        const tarball = path.join(home, "bare.tar")
        execFileSync("tar", ["--create", "--file", tarball, "--directory", tree, "."])
        yield* Effect.gen(function* () {
          const { vm } = yield* (yield* Machinen).boot({ image: tarball })
          const error = yield* Effect.flip(vm.execRaw({ argv: ["sh"] }))
          assert.strictEqual(error.code, "EXEC_COMMAND_NOT_FOUND")
        }).pipe(Effect.scoped, Effect.provide(live(home, tcg)))
      })
  )

  it.live("that is a root disk of another kind is refused", () =>
    Effect.gen(function* () {
      const error = yield* failing({ image: undefined, rootDisk: write("not-ext4", Buffer.alloc(1_000_000, 1)) })
      assert.strictEqual(error.code, "BOOT_IMAGE_INVALID")
    })
  )

  it.live("whose file system the guest's kernel cannot mount fails with the guest's own words", () =>
    Effect.gen(function* () {
      const image = write("blocks.ext4", "")
      truncateSync(image, 64 * 2 ** 20)
      // sound, but its blocks are larger than a page
      execFileSync("mke2fs", ["-q", "-F", "-t", "ext4", "-b", "65536", image], { stdio: "ignore" })
      const error = yield* failing({ image })
      assert.strictEqual(error.code, "BOOT_GUEST_FAILED")
      assert.isNotEmpty(error.console ?? "")
    })
  )
})

describe("set-up's assets", () => {
  it.live("when all are missing, the error names the command that makes them", () =>
    Effect.gen(function* () {
      const error = yield* failing({}, { MACHINEN_ASSETS_STORE: path.join(home, "no-assets") })
      assert.include(["ASSET_MISSING", "BOOT_VMM_FAILED", "GVPROXY_NOT_FOUND"], error.code)
      assert.include(error.hint ?? "", "install")
    })
  )

  for (const missing of ["kernel", "programs", "gvproxy", "base-micro"]) {
    it.live(`when ${missing} is missing, the error names it and the command that makes it`, () =>
      Effect.gen(function* () {
        const store = path.join(home, `assets-without-${missing}`)
        const assets = environment(home)["MACHINEN_ASSETS_STORE"] ?? ""
        mkdirSync(store)
        for (const name of readdirSync(assets)) {
          if (!name.startsWith(missing)) symlinkSync(path.join(assets, name), path.join(store, name))
        }
        const error = yield* failing({}, { MACHINEN_ASSETS_STORE: store })
        assert.strictEqual(error.code, missing === "gvproxy" ? "GVPROXY_NOT_FOUND" : "ASSET_MISSING")
        assert.include(error.message, missing)
        assert.include(error.hint ?? "", "install")
      })
    )
  }
})

describe("a VMM", () => {
  it.live("that is not there fails the boot, with its path and a hint", () =>
    Effect.gen(function* () {
      const error = yield* failing({}, { MACHINEN_VMM: "/nonexistent" })
      assert.strictEqual(error.code, "BOOT_VMM_MISSING")
      assert.include(error.message, "/nonexistent")
      assert.isNotEmpty(error.hint ?? "")
    })
  )

  it.live("that is not executable fails the boot as one that is not there", () =>
    Effect.gen(function* () {
      const error = yield* failing({}, { MACHINEN_VMM: write("not-executable", "x") })
      assert.strictEqual(error.code, "BOOT_VMM_MISSING")
    })
  )

  it.live("that ends at once tells its last words", () =>
    Effect.gen(function* () {
      const vmm = fakeVmm(home, "complains", "echo first; echo 'qemu: no way' >&2; exit 3")
      const error = yield* failing({}, { MACHINEN_VMM: vmm })
      assert.strictEqual(error.code, "BOOT_VMM_FAILED")
      assert.include(error.message, "code 3")
      assert.include(error.message, "qemu: no way")
      assert.isNotEmpty(error.hint ?? "")
    })
  )

  it.live("that is killed fails the boot with the signal", () =>
    Effect.gen(function* () {
      const error = yield* failing({}, { MACHINEN_VMM: fakeVmm(home, "killed", "kill -SEGV $$") })
      assert.strictEqual(error.code, "BOOT_VMM_FAILED")
      assert.include(error.message, "signal 11")
    })
  )

  it.live("does not erase what is known of another VMM", () =>
    Effect.gen(function* () {
      const { MACHINEN_CACHE_DIR: cache = "" } = environment(home)
      const bootId = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim()
      const known = () => JSON.parse(readFileSync(path.join(cache, `host-${bootId}.json`), "utf8"))
      const before = known()
      const vmm = fakeVmm(home, "other", '[ "$1" = --version ] && exec echo "QEMU emulator version 9.9"; exit 3')
      // its version tells whether there is a prepared machine
      yield* failing({}, { MACHINEN_VMM: vmm, MACHINEN_PREPARED: "auto" })
      const { kvm, tscKhz, versions } = known()
      assert.deepStrictEqual({ kvm, tscKhz }, { kvm: before.kvm, tscKhz: before.tscKhz })
      assert.include(versions, before.versions)
      assert.isTrue(Object.keys(versions).some((subject) => subject.includes(JSON.stringify(vmm))))
    })
  )

  for (const detached of [false, true]) {
    it.live(`that hangs silently is given up at the deadline${detached ? ", detached too" : ""}`, () =>
      Effect.gen(function* () {
        const vmm = fakeVmm(home, "hangs", hang(home))
        const error = yield* failing({ detached }, { MACHINEN_VMM: vmm, MACHINEN_BOOT_TIMEOUT: "1 seconds" })
        assert.strictEqual(error.code, detached ? "BOOT_DETACHED_READINESS_FAILED" : "BOOT_READY_TIMEOUT")
        assert.isTrue(error.retryable)
      })
    )
  }

  it.live("that hangs silently is given up by a caller that acquires a VM, too", () => {
    const settings = {
      ...tcg,
      MACHINEN_VMM: fakeVmm(home, "hangs-acquired", hang(home)),
      MACHINEN_BOOT_TIMEOUT: "1 seconds"
    }
    return Effect.gen(function* () {
      const machinen = yield* Machinen
      const acquired = Effect.acquireRelease(machinen.boot({ image: "micro" }), () => Effect.void)
      const error = yield* Effect.flip(Effect.scoped(Effect.asVoid(acquired)))
      assert.strictEqual(error.code, "BOOT_READY_TIMEOUT")
      assertNothingLeft(home)
    }).pipe(Effect.provide(live(home, settings)))
  })

  it.live("that leaves children is given up in time all the same", () =>
    Effect.gen(function* () {
      const note = path.join(home, "child")
      const vmm = fakeVmm(home, "forks", `sleep 1003 & echo $! >"${note}"; ${hang(home)}`)
      const error = yield* failing({}, { MACHINEN_VMM: vmm, MACHINEN_BOOT_TIMEOUT: "1 seconds" })
      assert.strictEqual(error.code, "BOOT_READY_TIMEOUT")
      const child = Number(readFileSync(note, "utf8"))
      // QEMU itself may not fork (its sandbox denies it): a helper's child is nobody's duty, but it must not hold us up
      if (existsSync(`/proc/${child}`)) process.kill(child, "SIGKILL")
    })
  )
})

describe("a guest", () => {
  it.live("that never answers is given up with its last console lines", () =>
    Effect.gen(function* () {
      // QEMU without our channel: the kernel and init run, the agent has nobody to talk to
      const vmm = fakeVmm(
        home,
        "deaf",
        `n=$#; while [ $n -gt 0 ]; do case "$1" in virtserialport,*) set -- "$@" "virtserialport,chardev=channel,name=other" ;; *) set -- "$@" "$1" ;; esac; shift; n=$((n - 1)); done; exec qemu-system-x86_64 "$@"`
      )
      const error = yield* failing({}, { MACHINEN_VMM: vmm, MACHINEN_BOOT_TIMEOUT: "20 seconds" })
      assert.include(["BOOT_READY_TIMEOUT", "BOOT_GUEST_FAILED"], error.code)
      assert.isNotEmpty(error.console ?? "")
    })
  )

  it.live("whose kernel panics at boot says so", () =>
    Effect.gen(function* () {
      const vmm = fakeVmm(
        home,
        "panics",
        `n=$#; while [ $n -gt 0 ]; do case "$1" in console=*) set -- "$@" "$1 rdinit=/no/such/init" ;; *) set -- "$@" "$1" ;; esac; shift; n=$((n - 1)); done; exec qemu-system-x86_64 "$@"`
      )
      const error = yield* failing({}, { MACHINEN_VMM: vmm })
      assert.strictEqual(error.code, "BOOT_GUEST_FAILED")
      assert.include(error.message, "Kernel panic")
      assert.include(error.console ?? "", "Kernel panic")
    })
  )

  it.live("whose kernel panics later ends disorderly, and its commands are told", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const { vm } = yield* machinen.boot({ image: "micro" })
      const error = yield* Effect.flip(vm.execRaw({ argv: ["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"] }))
      assert.strictEqual(error.code, "EXEC_VM_FAILED")
      assert.include(error.message, "Kernel panic")
      const exit = yield* vm.wait
      assert.isFalse(exit.orderly)
      assert.strictEqual(exit.reason, "vmm")
      assert.include(exit.consoleTail, "Kernel panic")
      assertNothingLeft(home)
    }).pipe(Effect.scoped, Effect.provide(live(home)))
  )
})

describe("a full disk on the host", () => {
  it.scopedLive("under the state directory fails a boot, which says so", () =>
    Effect.gen(function* () {
      const small = yield* smallDisk("1M")
      const error = yield* failing({}, { MACHINEN_HOME: small }, small)
      assert.include(["BOOT_NO_SPACE", "BOOT_PACK_FAILED", "REGISTRY_IO"], error.code)
      assert.match(`${error.message} ${error.hint}`, /space/)
    })
  )

  it.scopedLive("under a running VM: its writes fail, and it can be stopped", () =>
    Effect.gen(function* () {
      const small = yield* smallDisk("16M")
      yield* Effect.gen(function* () {
        const { vm } = yield* (yield* Machinen).boot({ image: "micro" })
        const written = yield* vm.execRaw(
          { argv: ["sh", "-c", "dd if=/dev/zero of=/fill bs=1M count=64 && sync /fill"] },
          { timeout: "20 seconds" }
        )
        assert.notStrictEqual(written.exitCode, 0)
        yield* vm.stop()
      }).pipe(Effect.scoped, Effect.provide(live(small, tcg)))
      assertNothingLeft(small)
    })
  )

  it.scopedLive("under the cache fails a boot, which says so", () =>
    Effect.gen(function* () {
      const small = yield* smallDisk("64K")
      const error = yield* failing({}, { MACHINEN_CACHE_DIR: small })
      assert.include(["ROOTFS_IMG_NO_SPACE", "ROOTFS_IMG_IO"], error.code)
      assert.match(`${error.message} ${error.hint}`, /space/)
    })
  )

  it.scopedLive("under the cache fails the build of an image, of which no part stays", () =>
    Effect.gen(function* () {
      const small = yield* smallDisk("1M")
      const error = yield* failing({ image: busyboxTarball(home, "large") }, { MACHINEN_CACHE_DIR: small })
      assert.include(["ROOTFS_IMG_NO_SPACE", "ROOTFS_IMG_IO"], error.code)
      assert.match(`${error.message} ${error.hint}`, /space/)
      assert.deepStrictEqual(
        readdirSync(path.join(small, "rootfs")).filter((name) => name.endsWith(".building")),
        []
      )
    })
  )
})

describe("a state directory", () => {
  it.live("whose path is too long for sockets is refused", () =>
    Effect.gen(function* () {
      const error = yield* failing({}, { MACHINEN_HOME: path.join(home, "x".repeat(80)) })
      assert.strictEqual(error.code, "BOOT_STATE_DIR_UNUSABLE")
      assert.include(error.hint ?? "", "MACHINEN_HOME")
    })
  )

  it.live("that is a file is refused", () =>
    Effect.gen(function* () {
      const error = yield* failing({}, { MACHINEN_HOME: write("a-file", "x") })
      assert.strictEqual(error.code, "REGISTRY_IO")
    })
  )
})

it.live("a mke2fs that is missing or fails is told with a code of its own", () =>
  Effect.gen(function* () {
    const cache = path.join(home, "fresh-cache")
    const error = yield* failing({}, { MACHINEN_CACHE_DIR: cache, MACHINEN_MKE2FS: "/nonexistent" })
    assert.strictEqual(error.code, "ROOTFS_IMG_TOOL_MISSING")
    const broken = yield* failing(
      {},
      { MACHINEN_CACHE_DIR: cache, MACHINEN_MKE2FS: executable(home, "mke2fs", "echo broken >&2; exit 1") }
    )
    assert.strictEqual(broken.code, "ROOTFS_IMG_BUILD_FAILED")
    assert.include(broken.message, "broken")
  })
)
