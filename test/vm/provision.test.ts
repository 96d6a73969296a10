import { execFileSync } from "node:child_process"
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  statSync,
  writeFileSync
} from "node:fs"
import * as path from "node:path"
import { gunzipSync } from "node:zlib"
import { afterEach, assert, describe, layer, it as plain } from "@effect/vitest"
import { Deferred, Effect, Fiber, Stream } from "effect"
import type { BuildProgress } from "../../src/boot/provision.ts"
import { Assets } from "../../src/host/Assets.ts"
import { RootfsImage } from "../../src/image/RootfsImage.ts"
import { Machinen } from "../../src/Machinen.ts"
import * as facade from "../../src/promise.ts"
import {
  assertNothingLeft,
  busyboxTarball,
  cli,
  executable,
  leftovers,
  live,
  nothing,
  settled,
  sh,
  sha256OfFile,
  smallDisk,
  temporaryDirectory,
  temporaryHome,
  text
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

/** A cache of its own: what is looked at is what this test has put there. */
const cache = { MACHINEN_CACHE_DIR: temporaryDirectory() }
const mebibytes = (n: number) => n * 1024 ** 2

const entriesOf = (tarball: string) =>
  execFileSync("tar", ["--list", "--verbose", "--numeric-owner", "--file", tarball], { encoding: "utf8" })

layer(live(home, cache), { excludeTestServices: true })("an image that is built", (it) => {
  it.scoped("is a whole root filesystem, boots without being unpacked again, and has its own command", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const out = path.join(temporaryDirectory(), "new", "built.tar.gz")
      const heard: Array<string> = []
      const built = yield* machinen.provision({
        base: "micro",
        out,
        diskSizeBytes: mebibytes(256),
        config: {
          cmd: ["sh", "-c", 'echo "$GREETING from $PWD as $(id -u):$(id -g) $HOME"'],
          env: { GREETING: "hello", OTHER: "kept" },
          cwd: "/srv",
          user: "web"
        },
        onProgress: (progress: BuildProgress) =>
          Effect.sync(() => void heard.push(progress._tag === "Phase" ? progress.phase : progress._tag)),
        install: (vm) =>
          sh(
            vm,
            `echo 'web:x:33:34::/srv:/bin/sh' >>/etc/passwd
             echo content >/srv/file; ln /srv/file /srv/second; ln -s file /srv/link; ln -s /etc/passwd /srv/absolute
             chown 33:34 /srv/file; chmod 4750 /srv/file; mknod /srv/device c 1 3; mkfifo /srv/pipe
             dd if=/dev/zero of=/srv/sparse bs=1 count=1 seek=50000000 2>/dev/null
             mkdir -p /srv/$(printf 'd%.0s' $(seq 100))/$(printf 'e%.0s' $(seq 100)); echo secret >/dev/shm/memory`
          )
      })
      assert.deepStrictEqual(
        heard.filter((event) => event !== "Archived"),
        ["boot", "install", "archive", "prebake"]
      )
      assert.strictEqual(built.imagePath, out)
      assert.strictEqual(built.sizeBytes, statSync(out).size)
      assert.strictEqual(built.sha256, sha256OfFile(out))
      assert.isAbove(built.elapsedMs, 0)
      assert.deepStrictEqual([...built.phases.keys()], ["boot", "install", "archive", "prebake"])
      assert.deepStrictEqual(readdirSync(path.dirname(out)), ["built.tar.gz"])
      assertNothingLeft(home)

      const entries = entriesOf(out)
      assert.match(entries, /^-rw-r--r-- 0\/0 .* \.\/machinen-config\.json$/m)
      assert.match(entries, /^-rwsr-x--- 33\/34 .* srv\/file$/m)
      assert.match(entries, /^h.* srv\/second link to srv\/file$/m)
      assert.match(entries, /^l.* srv\/absolute -> \/etc\/passwd$/m)
      assert.match(entries, /^crw.* 1,3 .* srv\/device$/m)
      assert.match(entries, /^p.* srv\/pipe$/m)
      assert.notMatch(entries, / (proc|sys|dev)\/[^\n]/)
      assert.notInclude(entries, "memory")

      // the image is there: nothing is unpacked, nothing written but the notes
      const rootfs = path.join(cache.MACHINEN_CACHE_DIR, "rootfs")
      const image = path.join(rootfs, `${built.sha256}.img`)
      const before = statSync(image)
      assert.isBelow(before.blocks * 512, mebibytes(16)) // the hole is one
      const { command, vm } = yield* machinen.boot({ image: out, env: { OTHER: "mine" } })
      assert.deepStrictEqual(vm.entry.command, command)
      assert.strictEqual(statSync(image).mtimeMs, before.mtimeMs)
      assert.strictEqual(yield* sh(vm, 'echo "$GREETING $OTHER $PWD $(id -u)"'), "hello mine /srv 33")
      assert.strictEqual(
        yield* sh(vm, "stat -c '%u:%g %a %h' /srv/file; readlink /srv/absolute; stat -c %s /srv/sparse"),
        "33:34 4750 2\n/etc/passwd\n50000001"
      )
      const main = yield* vm.startMain()
      const said = yield* main.output.pipe(
        Stream.map(({ bytes }) => text(bytes)),
        Stream.mkString
      )
      assert.strictEqual(said, "hello from /srv as 33:34 /srv\n")
      yield* vm.wait

      // what the caller gives replaces the command, and is for a user the caller names
      const other = yield* machinen.boot({ image: out, command: ["id", "-u"], user: "0" })
      assert.deepStrictEqual(other.command, ["id", "-u"])
      assert.strictEqual(yield* sh(other.vm, "id -u; pwd"), "0\n/srv")

      // built upon, it keeps what it says
      const next = path.join(path.dirname(out), "next.tar")
      yield* machinen.provision({
        base: out,
        out: next,
        config: { env: { GREETING: "servus" } },
        install: (vm) => Effect.asVoid(sh(vm, 'test "$(id -u)" = 0'))
      })
      const config = execFileSync("tar", ["--extract", "--to-stdout", "--file", next, "./machinen-config.json"])
      assert.deepStrictEqual(JSON.parse(config.toString()), {
        cmd: ["sh", "-c", 'echo "$GREETING from $PWD as $(id -u):$(id -g) $HOME"'],
        env: { GREETING: "servus", OTHER: "kept" },
        cwd: "/srv",
        user: "web"
      })
      assert.strictEqual(entriesOf(next).match(/machinen-config/g)?.length, 1)
    })
  )

  it.scoped("keeps capabilities and attributes", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const out = path.join(temporaryDirectory(), "attributes.tar.gz")
      const script = `import os
open("/srv/marked", "w").close()
os.setxattr("/srv/marked", "user.mark", b"\\0\\n=\\xff")
os.setxattr("/srv/marked", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))`
      const look = `import os; print(*[os.getxattr("/srv/marked", n).hex() for n in ("user.mark", "security.capability")])`
      yield* machinen.provision({
        out,
        install: (vm) => Effect.asVoid(vm.exec({ argv: ["python3", "-c", script] }))
      })
      const { vm } = yield* machinen.boot({ image: out })
      const { stdout } = yield* vm.exec({ argv: ["python3", "-c", look] })
      assert.strictEqual(text(stdout).trim(), "000a3dff 0100000200040000000000000000000000000000")
    })
  )

  it.scoped("is the same when it is built again, if its times are not to matter", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const dir = temporaryDirectory()
      const build = (name: string) =>
        machinen.provision({
          base: "micro",
          out: path.join(dir, name),
          newest: 1_700_000_000,
          install: (vm) => Effect.asVoid(sh(vm, "mkdir /srv/made; echo same >/srv/made/file"))
        })
      const [one, two] = yield* Effect.all([build("one.tar.gz"), build("two.tar.gz")], { concurrency: 2 })
      assert.strictEqual(one.sha256, two.sha256)
      // and so is what is made of it, on another host as well
      const images = yield* RootfsImage
      const image = yield* images.ensure(one.imagePath)
      const first = sha256OfFile(image)
      execFileSync("rm", [image])
      assert.strictEqual(yield* images.ensure(two.imagePath), image)
      assert.strictEqual(sha256OfFile(image), first)
    })
  )

  it.scoped("is whole when two are built into one file at the same time", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const dir = temporaryDirectory()
      const out = path.join(dir, "shared.tar.gz")
      // what a build that was killed has left, and what one has that goes on elsewhere
      writeFileSync(path.join(dir, ".shared.tar.gz.building-4194305-1-00000000-dead"), "")
      const build = (mark: string) =>
        machinen.provision({
          base: "micro",
          out,
          prebake: false,
          install: (vm) => Effect.asVoid(sh(vm, `echo ${mark} >/mark`))
        })
      const built = yield* Effect.all([build("one"), build("two")], { concurrency: 2 })
      assert.deepStrictEqual(readdirSync(dir), ["shared.tar.gz"])
      assert.include(
        built.map(({ sha256 }) => sha256),
        sha256OfFile(out)
      )
      const mark = execFileSync("tar", ["--extract", "--to-stdout", "--file", out, "mark"]).toString()
      assert.include(["one\n", "two\n"], mark)
    })
  )
})

layer(live(home, cache), { excludeTestServices: true })("a build that fails", (it) => {
  /** Fails and leaves nothing: no VM, no part of an image; what was there is as it was. */
  const failing = (options: {
    readonly install: string
    readonly disk?: number
    readonly max?: number
    readonly timeoutMs?: number
    readonly out?: string
  }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const out = options.out ?? path.join(temporaryDirectory(), "out.tar.gz")
      if (options.out === undefined) writeFileSync(out, "what was there")
      const error = yield* Effect.flip(
        Effect.asVoid(
          machinen.provision({
            base: "micro",
            out,
            ...(options.disk === undefined ? {} : { diskSizeBytes: options.disk }),
            ...(options.max === undefined ? {} : { maxImageBytes: options.max }),
            ...(options.timeoutMs === undefined ? {} : { timeoutMs: options.timeoutMs }),
            install: (vm) => Effect.asVoid(vm.exec(options.install))
          })
        )
      )
      assert.deepStrictEqual(leftovers(home), nothing)
      if (options.out === undefined) {
        assert.deepStrictEqual(readdirSync(path.dirname(out)), [path.basename(out)])
        assert.strictEqual(readFileSync(out, "utf8"), "what was there")
      }
      return error
    })

  it.effect("because of its hook says why, with the console's end and the cause", () =>
    Effect.gen(function* () {
      const error = yield* failing({ install: "echo on the console >/dev/console; echo no such thing >&2; exit 3" })
      assert.strictEqual(error.code, "PROVISION_INSTALL_HOOK_FAILED")
      assert.include(error.message, "ended with code 3: no such thing")
      assert.include(error._tag === "ProvisionError" ? error.console : "", "on the console")
      assert.strictEqual((error.cause as { code?: string } | undefined)?.code, "EXEC_NONZERO_EXIT")
    })
  )

  it.effect("because of a defect in its hook says so, too", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const out = path.join(temporaryDirectory(), "out.tar.gz")
      const error = yield* Effect.flip(
        Effect.asVoid(machinen.provision({ base: "micro", out, install: () => Effect.die(new Error("a mistake")) }))
      )
      assert.strictEqual(error.code, "PROVISION_INSTALL_HOOK_FAILED")
      assert.include(error.message, "a mistake")
      assert.isFalse(existsSync(out))
    })
  )

  it.effect("at its time limit is ended, and says in which step", () =>
    Effect.gen(function* () {
      const error = yield* failing({ install: "sleep 1000", timeoutMs: 4000 })
      assert.strictEqual(error.code, "PROVISION_TIMEOUT")
      assert.include(error.message, '"install"')
    })
  )

  it.effect("because it fills its disk says that", () =>
    Effect.gen(function* () {
      const error = yield* failing({ install: "dd if=/dev/zero of=/big bs=1M", disk: mebibytes(32) })
      assert.strictEqual(error.code, "PROVISION_DISK_TOO_SMALL")
      assert.include(error.message.toLowerCase(), "no space left on device")
    })
  )

  it.effect("because the image would be too large says how large it may be", () =>
    Effect.gen(function* () {
      const error = yield* failing({ install: "dd if=/dev/zero of=/big bs=1M count=20", max: mebibytes(16) })
      assert.strictEqual(error.code, "PROVISION_DISK_TOO_SMALL")
      assert.include(error.message, "larger than 16 MiB")
    })
  )

  it.effect("because its VM ends says that", () =>
    Effect.gen(function* () {
      const error = yield* failing({ install: "echo b >/proc/sysrq-trigger; sleep 1000" })
      assert.strictEqual(error.code, "PROVISION_INSTALL_HOOK_FAILED")
      assert.include(error.message, "VM ended")
    })
  )

  it.effect("because there is no base has tried nothing", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const dir = temporaryDirectory()
      const error = yield* Effect.flip(
        Effect.asVoid(
          machinen.provision({
            base: "./nowhere.tar",
            out: path.join(dir, "x"),
            install: () => Effect.die("not reached")
          })
        )
      )
      assert.strictEqual(error.code, "PROVISION_BASE_NOT_FOUND")
      assert.deepStrictEqual(readdirSync(dir), [])
    })
  )

  it.scoped("because there is no space for its image leaves no image", () =>
    Effect.gen(function* () {
      const disk = yield* smallDisk("1m")
      const error = yield* failing({
        install: "dd if=/dev/urandom of=/big bs=1M count=4",
        out: path.join(disk, "x.tar.gz")
      })
      assert.strictEqual(error.code, "PROVISION_OUT_UNWRITABLE")
      assert.include(error.hint ?? "", "free some space")
      assert.deepStrictEqual(readdirSync(disk), [])
    })
  )

  for (const [what, out] of [
    ["below a file", "/etc/passwd/x.tar.gz"],
    ["where a directory is", "/tmp"],
    ["where nothing can be made", "/proc/x.tar.gz"]
  ] as const) {
    it.effect(`because it is to be written ${what} has not booted anything`, () =>
      Effect.gen(function* () {
        const error = yield* failing({ install: "true", out })
        assert.strictEqual(error.code, "PROVISION_OUT_UNWRITABLE")
        assert.include(error.message, out)
      })
    )
  }

  it.effect("because it is interrupted leaves nothing", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const dir = temporaryDirectory()
      const running = yield* Deferred.make<void>()
      const fiber = yield* Effect.fork(
        machinen.provision({
          base: "micro",
          out: path.join(dir, "x.tar.gz"),
          install: (vm) => Effect.zipRight(Deferred.succeed(running, undefined), Effect.asVoid(vm.exec("sleep 1000")))
        })
      )
      yield* Deferred.await(running)
      yield* Fiber.interrupt(fiber)
      assert.strictEqual((yield* Fiber.await(fiber))._tag, "Failure")
      assert.deepStrictEqual(readdirSync(dir), [])
      assertNothingLeft(home)
    })
  )

  it.effect("never changes its base", () =>
    Effect.gen(function* () {
      const base = yield* (yield* Assets).base("micro")
      const before = sha256OfFile(base)
      yield* failing({ install: "rm -rf /bin/ls /etc; echo x >/x; false" })
      assert.strictEqual(sha256OfFile(base), before)
    })
  )
})

layer(live(home, cache), { excludeTestServices: true })("machinen provision", (it) => {
  it.effect("may have a /tmp that leads nowhere", () =>
    Effect.gen(function* () {
      const out = path.join(temporaryDirectory(), "no-tmp.tar.gz")
      const line = "rm -r /tmp && ln -s /nowhere /tmp"
      const built = yield* cli(home, ["provision", "--base", "micro", "--run", line, "--out", out], { env: cache })
      assert.strictEqual(built.code, 0, built.stderr)
      const ran = yield* cli(home, ["run", "--image", out, "--", "readlink", "/tmp"], { env: cache })
      assert.deepStrictEqual(ran, { ...ran, code: 0, stdout: "/nowhere\n" })
    })
  )

  it.effect("runs a recipe and lines, copies files, shows what it does, and bakes", () =>
    Effect.gen(function* () {
      const dir = temporaryDirectory()
      const recipe = executable(dir, "recipe.sh", "set -e\necho from the recipe\nmv /srv/in/given /srv/taken")
      chmodSync(recipe, 0o600)
      mkdirSync(path.join(dir, "in"))
      writeFileSync(path.join(dir, "in", "given"), "given\n")
      const out = path.join(dir, "cli.tar.gz")
      const args = [
        "provision",
        recipe,
        "--base",
        "micro",
        "--copy",
        `${dir}/in:/srv/in`,
        "--run",
        "echo second >>/srv/taken; dd if=/dev/zero of=/srv/large bs=1M count=20 2>/dev/null"
      ]
      const baked = ["--cmd", '["cat", "/srv/taken"]', "-e", "A=b", "-w", "/srv", "--out", out]
      const built = yield* cli(home, [...args, ...baked], { env: cache })
      assert.strictEqual(built.code, 0, built.stderr)
      assert.strictEqual(built.stdout, `${out}\n`)
      for (const line of ["▸ 1/3 copy", "▸ 2/3 recipe.sh", "from the recipe", "▸ 3/3 echo second", "built in"]) {
        assert.include(built.stderr, line)
      }
      // how much of it has been saved is for a terminal, and would fill a log
      assert.notMatch(built.stderr, /^\s*[0-9.]+ MiB$/m)
      const ran = yield* cli(home, ["boot", "--image", out], { env: cache })
      assert.deepStrictEqual([ran.code, ran.stdout], [0, "given\nsecond\n"])
      const other = yield* cli(home, ["run", "--image", out, "--", "sh", "-c", "echo $A $PWD; ls /tmp"], { env: cache })
      assert.deepStrictEqual([other.code, other.stdout], [0, "b /srv\n"])
      assert.isTrue(gunzipSync(readFileSync(out)).includes("machinen-config.json"))

      // a base of one's own, where none is named
      const own = temporaryDirectory()
      renameSync(busyboxTarball(own, "own"), path.join(own, "rootfs-debian-amd64.tar.gz"))
      const upon = yield* cli(
        home,
        ["provision", "--run", "cat /etc/mark", "--out", path.join(own, "out.tar"), "--no-prebake"],
        {
          env: { ...cache, MACHINEN_ASSETS_DIR: own }
        }
      )
      assert.strictEqual(upon.code, 0, upon.stderr)
      assert.match(upon.stderr, /^own$/m)

      const bake = yield* cli(home, ["bake", "--base", "micro", "--run", "false", "--out", out, "--json"], {
        env: cache
      })
      assert.strictEqual(bake.code, 1)
      assert.include(bake.stderr, "(PROVISION_INSTALL_HOOK_FAILED)")
      for (const wrong of [["--cmd", "[1]"], ["--copy", "nowhere"], ["--disk", "many"], ["/nowhere/recipe"]]) {
        const refused = yield* cli(home, ["provision", "--base", "micro", "--out", out, ...wrong], { env: cache })
        assert.strictEqual(refused.code, 2)
        assert.include(refused.stderr, wrong.length === 1 ? "(PARSE_ARGUMENT_MISSING)" : "(PARSE_FLAG_MALFORMED)")
        assert.include(refused.stderr, wrong.at(-1) ?? "")
      }
      for (const wrong of [
        ["--timeout", "0"],
        ["--epoch", "-5"]
      ]) {
        const refused = yield* cli(home, ["provision", "--base", "micro", "--out", out, ...wrong], { env: cache })
        assert.strictEqual(refused.code, 1)
        assert.include(refused.stderr, "(PROVISION_OPTION_INVALID)")
        assert.include(refused.stderr, "hint: ")
      }
      assertNothingLeft(home)
    })
  )
})

describe("the Promise API", () => {
  const { boot, provision } = facade.make(live(home, cache))

  plain("builds an image, tells its phases, and boots it for its own command", async () => {
    const out = path.join(temporaryDirectory(), "promised.tar.gz")
    const events: Array<facade.LogEvent> = []
    const built = await provision({
      base: "micro",
      out,
      cmd: ["sh", "-c", "cat /srv/greeting; exit 5"],
      env: { LANGUAGE: "de" },
      onLog: (event) => void events.push(event),
      install: async (vm) => {
        await vm.writeFile("/srv/greeting", "servus\n")
        await vm.exec("echo installing")
      }
    })
    assert.deepStrictEqual([built.imagePath, built.sizeBytes], [out, statSync(out).size])
    assert.deepStrictEqual(
      events.flatMap((event) => (event.source === "phase" ? [event.kind, ...event.phases.keys()] : [])),
      ["provision", "boot", "install", "archive", "prebake"]
    )
    assert.isTrue(events.some((event) => event.source === "exec-stdout"))
    const vm = await boot({ image: out })
    assert.strictEqual((await vm.wait()).code, 5)
    assert.strictEqual(await vm.output(), "servus\n")

    const mistake = new Error("a mistake")
    const failed = await provision({ base: "micro", out, install: () => Promise.reject(mistake) }).catch((e) => e)
    assert.isTrue(facade.isMachinenError(failed, "PROVISION_INSTALL_HOOK_FAILED"))
    assert.strictEqual(failed.cause, mistake)
    const small = await provision({ base: "micro", out, scratchDiskSizeBytes: 100_000, install: async () => {} }).catch(
      (e) => e
    )
    assert.isTrue(facade.isMachinenError(small, "PROVISION_DISK_TOO_SMALL"))
    const archive = path.join(path.dirname(out), "init.cpio")
    await facade.mkinitramfsMinimal({ out: archive })
    assert.isTrue(existsSync(await facade.resolveBaseRootfs()) && existsSync(await facade.resolveBaseKernel()))
    assert.isAbove(statSync(archive).size, 500_000) // the guest program itself
    const nothing = await boot({ image: path.join(path.dirname(out), "..", "none") }).catch((e) => e)
    assert.isTrue(facade.isMachinenError(nothing, "BOOT_IMAGE_NOT_FOUND"))
    assert.strictEqual(built.sizeBytes, statSync(out).size)
  })
})
