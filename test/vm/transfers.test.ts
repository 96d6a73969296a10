import { execFileSync, spawn } from "node:child_process"
import { randomBytes } from "node:crypto"
import * as fs from "node:fs"
import * as path from "node:path"
import { afterAll, assert, layer } from "@effect/vitest"
import { Chunk, Effect, Fiber, Stream, TestContext } from "effect"
import { Agent } from "../../src/guest/Agent.ts"
import { encodeFrame, FrameType } from "../../src/guest/AgentProtocol.ts"
import {
  cli,
  eventually,
  Guest,
  guest,
  settled,
  sh,
  sha256,
  smallDisk,
  startCli,
  temporaryHome,
  text
} from "../fixtures.ts"
import { archive, hostileAgent, type Pulled } from "../hostileAgent.ts"

const home = temporaryHome()
afterAll(() => settled(home))

const mib = 2 ** 20
let made = 0
const fresh = (): string => {
  const dir = path.join(home, `tree-${made++}`)
  fs.mkdirSync(dir)
  return dir
}

/** Sockets have short paths. */
const socketPath = () => path.join(home, `s${made++}`)

const started = encodeFrame(FrameType.started, Buffer.from("{}"))

/** Processes that have a copy's connection. */
const couriers = () =>
  execFileSync("ps", ["-eo", "stat,args"], { encoding: "utf8" })
    .split("\n")
    .filter((line) => /machinen-shim (push|pull) /.test(line) && line.includes(home) && !line.startsWith("Z"))

/** Everything below a directory: kind, mode, time, target or contents; who shares an inode. */
const described = (dir: string): ReadonlyArray<string> => {
  const first = new Map<number, string>()
  return fs
    .readdirSync(dir, { recursive: true, encoding: "utf8" })
    .sort()
    .map((name) => {
      const file = path.join(dir, name)
      const info = fs.lstatSync(file)
      const what = info.isSymbolicLink()
        ? `-> ${fs.readlinkSync(file)}`
        : info.isDirectory()
          ? "directory"
          : (first.get(info.ino) ?? sha256(fs.readFileSync(file)).slice(0, 8))
      if (info.nlink > 1 && !first.has(info.ino)) first.set(info.ino, `= ${name}`)
      return `${name} ${(info.mode & 0o7777).toString(8)} ${Math.floor(info.mtimeMs / 1000)} ${what}`
    })
}

/** One of everything that is kept. */
const sampleTree = (): string => {
  const dir = fresh()
  const at = (name: string) => path.join(dir, name)
  const deep = `${"d".repeat(200)}/${"e".repeat(200)}`
  for (const sub of ["empty", "ünï/x", deep, "locked"]) fs.mkdirSync(at(sub), { recursive: true })
  fs.writeFileSync(at("run.sh"), "#!/bin/sh\n", { mode: 0o750 })
  fs.writeFileSync(at("none"), "")
  fs.writeFileSync(at(`${deep}/leaf`), "deep")
  fs.writeFileSync(at("ünï/x/a b\n"), Buffer.from([0, 255, 10]))
  fs.linkSync(at("run.sh"), at("same"))
  fs.symlinkSync("run.sh", at("link"))
  fs.symlinkSync("/no/such/place", at("dangling"))
  fs.writeFileSync(at("locked/inside"), "x")
  fs.chmodSync(at("locked"), 0o555)
  fs.chmodSync(at("empty"), 0o1777)
  let time = 1_000_000_000
  for (const name of fs.readdirSync(dir, { recursive: true, encoding: "utf8" }).sort().reverse()) {
    fs.lutimesSync(at(name), time, time++)
  }
  return dir
}

/** Among others what is to stay behind. */
const smallTree = (): string => {
  const tree = fs.mkdtempSync(path.join(home, "tree-"))
  fs.mkdirSync(path.join(tree, "dir"))
  fs.mkdirSync(path.join(tree, "empty"))
  fs.mkdirSync(path.join(tree, "node_modules"))
  fs.writeFileSync(path.join(tree, "node_modules", "huge"), "x")
  fs.writeFileSync(path.join(tree, "a.skip"), "x")
  fs.writeFileSync(path.join(tree, "dir", "b.skip"), "x")
  fs.writeFileSync(path.join(tree, "dir", "file"), "file\n")
  fs.writeFileSync(path.join(tree, "ünï"), randomBytes(100_000))
  fs.writeFileSync(path.join(tree, "run.sh"), "#!/bin/sh\n")
  execFileSync("chmod", ["750", path.join(tree, "run.sh")])
  fs.utimesSync(path.join(tree, "run.sh"), 1_000_000_000, 1_000_000_000)
  fs.symlinkSync("dir/file", path.join(tree, "link"))
  return tree
}

layer(guest(home, { image: "debian", rootDiskSizeBytes: 4 * 2 ** 30 }), { excludeTestServices: true, timeout: 60_000 })(
  "files copied between host and guest",
  (it) => {
    it.effect("of a tree come back as they were: modes, times, links, names", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const [source, back] = [sampleTree(), fresh()]
        yield* vm.push(source, "/srv/whole")
        const looks = ["empty", "locked", "link", "same"].map((name) => {
          const { mode, mtimeMs, nlink } = fs.lstatSync(path.join(source, name))
          return `${name} ${(mode & 0o7777).toString(8)} ${Math.floor(mtimeMs / 1000)} ${nlink}`
        })
        assert.strictEqual(
          yield* sh(vm, "cd /srv/whole; stat -c '%n %a %Y %h' empty locked link same"),
          looks.join("\n")
        )
        yield* vm.pull("/srv/whole", back)
        assert.deepStrictEqual(described(back), described(source))
      })
    )

    it.effect("with holes keep them and travel without, both ways", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const [source, back] = [fresh(), fresh()]
        const large = path.join(source, "large")
        fs.writeFileSync(large, "begin")
        const file = fs.openSync(large, "r+")
        fs.writeSync(file, "middle", 20 * 2 ** 30)
        fs.ftruncateSync(file, 40 * 2 ** 30)
        fs.closeSync(file)
        fs.truncateSync(path.join(source, "large"), 40 * 2 ** 30)
        fs.writeFileSync(path.join(source, "hole"), "")
        fs.truncateSync(path.join(source, "hole"), mib)
        yield* vm.push(source, "/srv/holes")
        assert.strictEqual(
          yield* sh(vm, "cd /srv/holes; stat -c %s large hole; tail -c +21474836481 large | head -c 6"),
          `${40 * 2 ** 30}\n${mib}\nmiddle`
        )
        assert.isBelow(Number(yield* sh(vm, "stat -c %b /srv/holes/large")), 1000)
        yield* vm.pull("/srv/holes", back)
        const pulled = path.join(back, "large")
        assert.strictEqual(fs.statSync(pulled).size, 40 * 2 ** 30)
        assert.isBelow(fs.statSync(pulled).blocks, 1000)
        const read = Buffer.alloc(6)
        const again = fs.openSync(pulled, "r")
        fs.readSync(again, read, 0, 6, 20 * 2 ** 30)
        fs.closeSync(again)
        assert.strictEqual(text(read), "middle")
        yield* vm.push(large, "/srv/one")
        assert.isBelow(Number(yield* sh(vm, "stat -c %b /srv/one")), 1000)
        yield* vm.remove("/srv/holes", { recursive: true })
      })
    )

    it.effect("that a pattern names stay behind, both ways, also in the CLI's cp", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const source = fresh()
        for (const file of ["a.log", "a.txt", "node_modules/x", "sub/b.log", "sub/deep/c.txt", "sub/node_modules/y"]) {
          fs.mkdirSync(path.dirname(path.join(source, file)), { recursive: true })
          fs.writeFileSync(path.join(source, file), file)
        }
        const files = (dir: string) =>
          fs
            .readdirSync(dir, { recursive: true, encoding: "utf8" })
            .filter((name) => fs.statSync(path.join(dir, name)).isFile())
            .sort()
        yield* vm.push(source, "/srv/some", { excludes: ["*.log", "node_modules"] })
        const back = fresh()
        yield* vm.pull("/srv/some", back)
        assert.deepStrictEqual(files(back), ["a.txt", "sub/deep/c.txt"])
        yield* vm.push(source, "/srv/all")
        const less = fresh()
        yield* vm.pull("/srv/all", less, { excludes: ["sub/deep", "*.log"] })
        assert.deepStrictEqual(files(less), ["a.txt", "node_modules/x", "sub/node_modules/y"])
        const target = path.join(home, "copied")
        const copied = yield* cli(home, [
          "cp",
          "--exclude",
          "*.log",
          "--exclude",
          "node_modules",
          `${vm.id}:/srv/all`,
          target
        ])
        assert.deepStrictEqual([copied.code, files(target)], [0, ["a.txt", "sub/deep/c.txt"]], copied.stderr)
        yield* cli(home, ["cp", "--exclude", "sub", source, `${vm.id}:/srv/cli`])
        assert.strictEqual(
          yield* sh(vm, "cd /srv/cli; find . -type f | sort | tr '\\n' ' '"),
          "./a.log ./a.txt ./node_modules/x"
        )
      })
    )

    const hostile: ReadonlyArray<readonly [what: string, entries: string]> = [
      ["a name with ..", `add("../outside/file")`],
      ["an absolute name", `add("/${path.join(home, "outside/file").slice(1)}")`],
      ["a name with .. further in", `add("a/../../outside/file")`],
      ["a link and a file through it", `link("way", "../outside"); add("way/file")`],
      ["an absolute link and a file through it", `link("way", "${path.join(home, "outside")}"); add("way/file")`],
      ["a chain of links", `link("a", ".."); link("b", "a/outside"); add("b/file")`],
      ["a directory made through a link", `link("way", "../outside"); add("way/sub", tarfile.DIRTYPE)`],
      ["a hard link to the outside", `hard("stolen", "../outside/kept"); add("stolen")`],
      ["an absolute hard link", `hard("stolen", "${path.join(home, "outside/kept")}")`],
      ["a hard link through a link", `link("way", "../outside"); hard("stolen", "way/kept")`],
      ["a sparse map that lies", `sparse("file", "1\\n0\\n99999\\n", 10)`],
      ["a sparse map without an end", `sparse("file", "9" * 400, 10)`]
    ]
    for (const [what, entries] of hostile) {
      it.scoped(`an archive made by a guest is refused: ${what}`, () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const [target, outside] = [fresh(), path.join(home, "outside")]
          fs.rmSync(outside, { recursive: true, force: true })
          fs.mkdirSync(outside)
          fs.writeFileSync(path.join(outside, "kept"), "kept")
          const script = `
import io, tarfile
archive = tarfile.open("/tmp/hostile.tar", "w", format=tarfile.PAX_FORMAT)
def add(name, type=tarfile.REGTYPE, data=b"owned", link="", headers={}):
    info = tarfile.TarInfo(name); info.type = type; info.linkname = link; info.pax_headers = headers
    info.size = len(data) if type == tarfile.REGTYPE else 0
    archive.addfile(info, io.BytesIO(data))
def link(name, to): add(name, tarfile.SYMTYPE, link=to)
def hard(name, to): add(name, tarfile.LNKTYPE, link=to)
def sparse(name, map, size):
    add(name, data=map.encode().ljust(512, b"\\0"), headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)})
${entries}
archive.close()
`
          yield* vm.exec({ argv: ["python3", "-c", script] })
          const tar = Buffer.concat(Chunk.toReadonlyArray(yield* Stream.runCollect(vm.readFile("/tmp/hostile.tar"))))
          const pretender = (yield* Agent).client(yield* hostileAgent(socketPath(), archive(tar)))
          // on the test clock: the refusal waits for nothing that only time would end
          const refused = yield* Effect.flip(pretender.pull("/srv", target)).pipe(
            Effect.provide(TestContext.TestContext)
          )
          assert.strictEqual(refused.code, "FILES_HOST_IO")
          assert.match(refused.message, /archive: |No such file|not permitted/)
          assert.deepStrictEqual(fs.readdirSync(outside), ["kept"])
          assert.deepStrictEqual(
            [fs.readFileSync(path.join(outside, "kept"), "utf8"), fs.statSync(path.join(outside, "kept")).nlink],
            ["kept", 1]
          )
          assert.isFalse(fs.existsSync(path.join(target, "stolen")))
        })
      )
    }

    it.effect("pulled from a guest hand out no rights, and are the caller's", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* sh(
          vm,
          "mkdir -p /srv/rights; cd /srv/rights; cp /bin/true tool; chown 1234:1234 tool; chmod 6755 tool; mknod disk b 8 0; mkfifo fifo"
        )
        const back = fresh()
        yield* vm.pull("/srv/rights", back)
        const { mode, uid } = fs.lstatSync(path.join(back, "tool"))
        assert.deepStrictEqual([mode & 0o7777, uid], [0o755, process.getuid?.()])
        assert.deepStrictEqual(fs.readdirSync(back).sort(), ["fifo", "tool"])
      })
    )

    it.scoped("pulled into a directory that is being swapped for a link land nowhere else", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* sh(vm, "mkdir -p /srv/many/sub; cd /srv/many/sub; for n in $(seq 2000); do echo $n > $n; done")
        const [target, outside] = [fresh(), fresh()]
        fs.mkdirSync(path.join(target, "sub"))
        const swap = 'while :; do mv -T sub kept; ln -sT "$1" sub; rm -f sub; mv -T kept sub; done 2>/dev/null'
        yield* Effect.acquireRelease(
          Effect.sync(() => spawn("sh", ["-c", swap, "sh", outside], { cwd: target, detached: true, stdio: "ignore" })),
          ({ pid }) => Effect.sync(() => pid !== undefined && process.kill(-pid, "SIGKILL"))
        )
        let arrived = 0
        for (let turn = 0; turn < 5; turn++) {
          yield* Effect.exit(vm.pull("/srv/many", target))
          arrived += ["sub", "kept"].flatMap((dir) => {
            const at = path.join(target, dir)
            const isThere = fs.lstatSync(at, { throwIfNoEntry: false })?.isDirectory() === true
            return isThere ? fs.readdirSync(at) : []
          }).length
        }
        assert.deepStrictEqual(fs.readdirSync(outside), [])
        assert.isAbove(arrived, 0)
      })
    )

    it.scoped("for which the host has no space fail and say so", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* sh(vm, "mkdir -p /srv/big; head -c 30000000 /dev/urandom > /srv/big/file")
        const disk = yield* smallDisk("8m")
        const target = path.join(disk, "target")
        const error = yield* Effect.flip(vm.pull("/srv/big", target))
        assert.strictEqual(error.code, "FILES_HOST_IO")
        assert.include(error.message, "No space left")
        const one = yield* Effect.flip(vm.pull("/srv/big/file", path.join(disk, "one")))
        assert.strictEqual(one.code, "FILES_HOST_IO")
        assert.deepStrictEqual(fs.readdirSync(disk), ["target"])
      })
    )

    const nonsense: ReadonlyArray<readonly [what: string, said: Pulled]> = [
      ["nothing", () => {}],
      ["no frame", (send) => send(Buffer.alloc(64, 0xff))],
      ["data before it has begun", (send) => send(encodeFrame(FrameType.data, Buffer.alloc(100)))],
      ["a frame without an end", (send) => send(Buffer.from([...started, FrameType.data, 0, 1, 0, 0, 1, 2, 3]))],
      ["a frame of 4 GiB", (send) => send(Buffer.from([...started, FrameType.data, 255, 255, 255, 255, 0]))],
      ["half an archive", (send) => send(Buffer.concat([started, encodeFrame(FrameType.data, Buffer.alloc(300, 65))]))],
      [
        "an end without its eof",
        (send) => send(Buffer.concat([started, encodeFrame(FrameType.end, Buffer.from("{}"))]))
      ]
    ]
    for (const [what, said] of nonsense) {
      it.scoped(`an agent that says ${what} is an error, and leaves nothing running`, () =>
        Effect.gen(function* () {
          const target = fresh()
          const pretender = (yield* Agent).client(yield* hostileAgent(socketPath(), said))
          const error = yield* Effect.flip(Effect.timeout(pretender.pull("/srv", target), "20 seconds"))
          assert.strictEqual(error._tag, "FilesError")
          assert.deepStrictEqual(fs.readdirSync(target), [])
          assert.deepStrictEqual(couriers(), [])
        })
      )
    }

    it.scoped("under way when the caller is killed leave no process", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const source = fresh()
        fs.writeFileSync(path.join(source, "file"), Buffer.alloc(256 * mib, 1))
        const copying = yield* startCli(home, ["cp", source, `${vm.id}:/srv/killed`])
        yield* vm.exec("until test -d /srv/killed; do sleep 0.01; done", { timeout: "20 seconds" })
        assert.lengthOf(couriers(), 1)
        yield* copying.kill("SIGKILL")
        yield* eventually("its end", () => couriers().length === 0)
        yield* vm.exec("while ls -A /srv/killed | grep -q .; do sleep 0.01; done", { timeout: "20 seconds" })
      })
    )

    it.effect("under way when the caller is interrupted leave no process", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const source = fresh()
        fs.writeFileSync(path.join(source, "file"), Buffer.alloc(64 * mib, 1))
        const fiber = yield* Effect.fork(vm.push(source, "/srv/interrupted"))
        yield* vm.exec("until test -d /srv/interrupted; do sleep 0.01; done", { timeout: "20 seconds" })
        assert.lengthOf(couriers(), 1)
        yield* Fiber.interrupt(fiber)
        assert.deepStrictEqual(couriers(), [])
        yield* vm.exec("while ls -A /srv/interrupted | grep -q .; do sleep 0.01; done", { timeout: "20 seconds" })
      })
    )

    it.effect(
      "go where cp and docker cp put them: links, directories and what is missing",
      () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          const host = fresh()
          const at = (name: string) => path.join(host, name)
          fs.writeFileSync(at("tool"), "tool")
          fs.mkdirSync(at("dir"))
          fs.writeFileSync(at("dir/inside"), "inside")
          fs.symlinkSync("dir", at("link"))
          fs.symlinkSync("tool", at("filelink"))
          yield* sh(
            vm,
            `mkdir -p /srv/cp/target /srv/cp/taken; cd /srv/cp; ln -s target way; ln -s nowhere dangling; echo old >file; ln file other
           ln -s file tofile; ln -s /srv taken/dir; echo made >target/made; ln -s target/made tomade`
          )
          const cp = (...args: ReadonlyArray<string>) =>
            cli(home, ["cp", ...args.map((a) => a.replace(/^VM:/, `${vm.id}:`))])
          const fits: ReadonlyArray<readonly [from: string, to: string, look: string, shown: string]> = [
            ["tool", "VM:/bin", "test -L /bin && cat /usr/bin/tool; rm /usr/bin/tool", "tool"],
            ["dir", "VM:/srv/cp/way", "ls target; rm -r target/dir", "dir\nmade"],
            ["dir/.", "VM:/srv/cp/way", "ls target; rm target/inside", "inside\nmade"],
            ["dir", "VM:/srv/cp/new", "ls new; rm -r new", "inside"],
            ["dir/", "VM:/srv/cp/new/", "ls new; rm -r new", "inside"],
            ["tool", "VM:/srv/cp/tofile", "test -L tofile && cat file other", "toolold"],
            ["link", "VM:/srv/cp/copied", "readlink copied; rm copied", "dir"],
            ["link/", "VM:/srv/cp/copied", "ls copied; rm -r copied", "inside"],
            ["filelink", "VM:/srv/cp/target/", "readlink target/filelink; rm target/filelink", "tool"]
          ]
          for (const [from, to, look, shown] of fits) {
            const { code, stderr } = yield* cp(`${host}/${from}`, to)
            assert.deepStrictEqual([code, stderr], [0, ""], `${from} ${to}`)
            assert.strictEqual(yield* sh(vm, `cd /srv/cp; ${look}`), shown, `${from} ${to}`)
          }
          const followed = yield* cp("-L", at("link"), "VM:/srv/cp/followed")
          assert.deepStrictEqual([followed.code, yield* sh(vm, "ls /srv/cp/followed")], [0, "inside"])

          const refused: ReadonlyArray<readonly [from: string, to: string, why: RegExp]> = [
            [at("tool"), "VM:/srv/cp/missing/", /no directory/],
            [at("tool"), "VM:/srv/cp/no/such", /no directory/],
            [at("dir"), "VM:/srv/cp/no/such", /no directory/],
            [at("dir"), "VM:/srv/cp/file", /no directory/],
            [at("dir"), "VM:/srv/cp/taken", /no directory/],
            [at("tool"), "VM:/srv/cp/dangling", /leads nowhere/],
            [at("tool"), "VM:/dev/null", /device/],
            [at("tool"), "VM:rel", /begins with a slash[\s\S]*:\/rel/],
            ["-", "VM:/srv/cp/x", /exec/],
            ["VM:/srv/cp/file", "-", /exec/],
            ["VM:/srv/cp/file", `${host}/missing/`, /no directory/],
            ["VM:/srv/cp/target", at("tool"), /no directory/],
            ["VM:/srv/cp/file", "/dev/null", /device/],
            ["VM:/dev/null", at("device"), /device/]
          ]
          const before = yield* sh(vm, "cd /srv/cp; find . | sort; ls -l /dev/null | cut -c1")
          for (const [from, to, why] of refused) {
            const { code, stderr } = yield* cp(from, to)
            assert.notStrictEqual(code, 0, `${from} ${to}`)
            assert.match(stderr, why, `${from} ${to}`)
          }
          assert.strictEqual(yield* sh(vm, "cd /srv/cp; find . | sort; ls -l /dev/null | cut -c1"), before)
          assert.deepStrictEqual(fs.readdirSync(host).sort(), ["dir", "filelink", "link", "tool"])
          assert.isTrue(fs.statSync("/dev/null").isCharacterDevice())

          for (const [from, to] of [
            ["VM:/bin", at("bin")],
            ["VM:/srv/cp/tomade", host]
          ] as const) {
            assert.deepInclude(yield* cp(from, to), { code: 0, stderr: "" }, `${from} ${to}`)
          }
          assert.strictEqual(fs.readlinkSync(at("bin")), "usr/bin")
          assert.strictEqual(fs.readlinkSync(at("tomade")), "target/made")
          fs.symlinkSync("tool", at("here"))
          assert.strictEqual((yield* cp("-L", "VM:/srv/cp/tomade", at("here"))).code, 0)
          assert.deepStrictEqual([fs.readlinkSync(at("here")), fs.readFileSync(at("tool"), "utf8")], ["tool", "made\n"])
          assert.strictEqual((yield* cp("-L", "VM:/srv/cp/way", at("followed"))).code, 0)
          assert.strictEqual(fs.readFileSync(at("followed/made"), "utf8"), "made\n")
          yield* sh(vm, "rm -r /srv/cp")
        }),
      180_000
    )

    it.effect("are what a read gives, whatever their size is said to be, both ways", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const back = path.join(fresh(), "kallsyms")
        yield* vm.pull("/proc/kallsyms", back)
        assert.strictEqual(sha256(fs.readFileSync(back)), (yield* sh(vm, "sha256sum /proc/kallsyms")).slice(0, 64))
        yield* vm.push("/proc/version", "/srv/version")
        assert.strictEqual(
          yield* sh(vm, "cat /srv/version; rm /srv/version"),
          fs.readFileSync("/proc/version", "utf8").trimEnd()
        )
        const setting = path.join(fresh(), "setting")
        yield* vm.pull("/sys/kernel/mm/transparent_hugepage/enabled", setting)
        assert.strictEqual(
          fs.readFileSync(setting, "utf8").trimEnd(),
          yield* sh(vm, "cat /sys/kernel/mm/transparent_hugepage/enabled")
        )
      })
    )

    it.effect("keep fractions of a second, both ways", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const [source, back] = [fresh(), fresh()]
        execFileSync("touch", ["-d", "2001-02-03 04:05:06.123456789Z", path.join(source, "file")])
        execFileSync("touch", ["-d", "1960-01-01 00:00:00.5Z", path.join(source, "old")])
        const stat = "stat -c %y file old"
        const told = execFileSync("sh", ["-c", stat], {
          cwd: source,
          encoding: "utf8",
          env: { TZ: "UTC0", PATH: process.env["PATH"] }
        })
        yield* vm.push(source, "/srv/times")
        assert.strictEqual(yield* sh(vm, `cd /srv/times; TZ=UTC0 ${stat}`), told.trimEnd())
        yield* vm.pull("/srv/times", back)
        assert.strictEqual(
          execFileSync("sh", ["-c", stat], {
            cwd: back,
            encoding: "utf8",
            env: { TZ: "UTC0", PATH: process.env["PATH"] }
          }),
          told
        )
      })
    )

    it.scoped("are pulled up to a size", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* sh(vm, "mkdir /srv/size; head -c 3000000 /dev/urandom >/srv/size/file")
        const dir = fresh()
        for (const from of ["/srv/size", "/srv/size/file"]) {
          const error = yield* Effect.flip(vm.pull(from, path.join(dir, "copy"), { maxBytes: mib }))
          assert.strictEqual(error.code, "FILES_TOO_LARGE")
          fs.rmSync(path.join(dir, "copy"), { recursive: true, force: true })
        }
        yield* vm.pull("/srv/size/file", path.join(dir, "copy"), { maxBytes: 4 * mib })
        assert.deepStrictEqual([fs.readdirSync(dir), fs.statSync(path.join(dir, "copy")).size], [["copy"], 3_000_000])
      })
    )
  }
)

layer(guest(home, { memoryMib: 512, rootDiskSizeBytes: 4 * 2 ** 30 }), { excludeTestServices: true, timeout: 60_000 })(
  "copies of micro",
  (it) => {
    it.effect("trees go in and out unchanged", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const source = smallTree()
        yield* vm.push(source, "/srv/tree", { excludes: ["*.skip", "node_modules"] })
        assert.strictEqual(
          yield* sh(vm, "cd /srv/tree; find . | sort | tr '\\n' ' '"),
          "./ ./dir ./dir/file ./empty ./link ./run.sh ./ünï".replace("./ ", ". ")
        )
        assert.strictEqual(
          yield* sh(vm, "readlink /srv/tree/link; stat -c '%a %Y' /srv/tree/run.sh"),
          "dir/file\n750 1000000000"
        )
        yield* sh(vm, "ln -s /etc/passwd /srv/tree/absolute; echo >/srv/tree/left.out; chmod 4711 /srv/tree/dir/file")
        const back = path.join(home, "back")
        yield* vm.pull("/srv/tree", back, { excludes: ["*.out"] })
        assert.deepStrictEqual(fs.readdirSync(back).sort(), ["absolute", "dir", "empty", "link", "run.sh", "ünï"])
        assert.strictEqual(fs.readlinkSync(path.join(back, "absolute")), "/etc/passwd")
        assert.strictEqual(fs.readlinkSync(path.join(back, "link")), "dir/file")
        assert.strictEqual(fs.lstatSync(path.join(back, "run.sh")).mode & 0o777, 0o750)
        assert.strictEqual(fs.lstatSync(path.join(back, "run.sh")).mtimeMs, 1_000_000_000_000)
        assert.strictEqual(
          sha256(fs.readFileSync(path.join(back, "ünï"))),
          sha256(fs.readFileSync(path.join(source, "ünï")))
        )
      })
    )

    it.effect("one file goes in and out under another name", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const file = path.join(home, "one")
        fs.writeFileSync(file, "contents")
        yield* vm.push(file, "/srv/deep/two")
        assert.strictEqual(yield* sh(vm, "cat /srv/deep/two"), "contents")
        yield* vm.pull("/srv/deep/two", path.join(home, "three"))
        assert.strictEqual(fs.readFileSync(path.join(home, "three"), "utf8"), "contents")
      })
    )

    it.effect("a tree pulled from a guest cannot lead out of its target", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const [target, outside] = [fresh(), fresh()]
        // what a first copy left: a link out of the target, under the name of a directory of the second
        fs.symlinkSync(outside, path.join(target, "sub"))
        yield* sh(vm, "mkdir -p /srv/hostile/sub; echo owned >/srv/hostile/sub/file")
        const refused = yield* Effect.flip(vm.pull("/srv/hostile", target))
        assert.include(refused.message, "leads out of the target")
        assert.deepStrictEqual(fs.readdirSync(outside), [])
      })
    )

    it.effect("a tree pushed into a guest stays below its target", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* sh(vm, "mkdir -p /srv/in /srv/out; ln -s /srv/out /srv/in/sub")
        const source = fs.mkdtempSync(path.join(home, "push-"))
        fs.mkdirSync(path.join(source, "sub"))
        fs.writeFileSync(path.join(source, "sub", "file"), "x")
        const refused = yield* Effect.flip(vm.push(source, "/srv/in"))
        assert.deepStrictEqual(
          [refused.code, refused.message.includes("leads out of the target")],
          ["FILES_PATH_INVALID", true]
        )
        assert.strictEqual(yield* sh(vm, "ls /srv/out"), "")
      })
    )
  }
)
