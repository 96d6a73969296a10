import { execFileSync, spawn } from "node:child_process"
import * as fs from "node:fs"
import * as path from "node:path"
import { afterAll, assert, layer } from "@effect/vitest"
import { Chunk, Effect, Fiber, Stream } from "effect"
import { Agent } from "../../src/Agent.ts"
import { encodeFrame, FrameType } from "../../src/AgentProtocol.ts"
import type { FilesError } from "../../src/domain/errors.ts"
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

layer(guest(home, { image: "debian", rootDiskSizeBytes: 4 * 2 ** 30 }), { excludeTestServices: true, timeout: 60_000 })(
  "files",
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
          const refused = yield* Effect.flip(pretender.pull("/srv", target))
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
          (child) => Effect.sync(() => process.kill(-(child.pid ?? 0), "SIGKILL"))
        )
        for (let turn = 0; turn < 5; turn++) yield* Effect.exit(vm.pull("/srv/many", target))
        assert.deepStrictEqual(fs.readdirSync(outside), [])
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
        yield* vm.exec("until test -e /srv/killed/file; do sleep 0.01; done", { timeout: "20 seconds" })
        assert.lengthOf(couriers(), 1)
        yield* copying.kill("SIGKILL")
        yield* eventually("its end", () => couriers().length === 0)
        assert.strictEqual(yield* sh(vm, "rm -r /srv/killed; echo fine"), "fine")
      })
    )

    it.effect("under way when the caller is interrupted leave no process", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const source = fresh()
        fs.writeFileSync(path.join(source, "file"), Buffer.alloc(64 * mib, 1))
        const fiber = yield* Effect.fork(vm.push(source, "/srv/interrupted"))
        yield* vm.exec("until test -e /srv/interrupted/file; do sleep 0.01; done", { timeout: "20 seconds" })
        assert.lengthOf(couriers(), 1)
        yield* Fiber.interrupt(fiber)
        assert.deepStrictEqual(couriers(), [])
        assert.strictEqual(yield* sh(vm, "echo fine"), "fine")
      })
    )

    it.effect("are listed, made, moved and removed", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* vm.makeDirectory("/srv/names/of/all", { mode: 0o700 })
        yield* vm.makeDirectory("/srv/names/of/all")
        yield* vm.writeFile("/srv/names/ä\nb", "12345")
        yield* sh(vm, "ln -s of /srv/names/link")
        const listed = yield* vm.list("/srv/names")
        assert.deepStrictEqual(
          listed.map(({ kind, name, size, target }) => [name, kind, kind === "file" ? size : 0, target]),
          [
            ["link", "symlink", 0, "of"],
            ["of", "directory", 0, undefined],
            ["ä\nb", "file", 5, undefined]
          ]
        )
        assert.strictEqual((yield* vm.stat("/srv/names/of/all")).mode, 0o700)
        yield* vm.rename("/srv/names/ä\nb", "/srv/names/of/moved")
        yield* vm.remove("/srv/names/link")
        assert.deepStrictEqual(
          (yield* vm.list("/srv/names")).map(({ name }) => name),
          ["of"]
        )

        const failures: ReadonlyArray<readonly [failing: Effect.Effect<unknown, FilesError>, code: string]> = [
          [vm.list("/srv/none"), "FILES_NOT_FOUND"],
          [vm.list("/etc/passwd"), "FILES_GUEST_IO"],
          [vm.list("relative"), "FILES_PATH_INVALID"],
          [vm.remove("/srv/none"), "FILES_NOT_FOUND"],
          [vm.remove("/srv/names"), "FILES_GUEST_IO"],
          [vm.remove("/", { recursive: true }), "FILES_PATH_INVALID"],
          [vm.remove("/srv/..", { recursive: true }), "FILES_PATH_INVALID"],
          [vm.rename("/srv/none", "/srv/other"), "FILES_NOT_FOUND"],
          [vm.makeDirectory("/srv/names", { recursive: false }), "FILES_GUEST_IO"],
          [vm.makeDirectory("/srv/a\0b"), "FILES_PATH_INVALID"]
        ]
        for (const [failing, code] of failures)
          assert.strictEqual((yield* Effect.flip(Effect.asVoid(failing))).code, code)

        yield* sh(vm, "mkdir /srv/kept; touch /srv/kept/file; ln -s /srv/kept /srv/names/of/way")
        yield* vm.remove("/srv/names", { recursive: true })
        assert.strictEqual(
          yield* sh(vm, "ls /srv/kept; ls -d /srv/names 2>&1 || true"),
          "file\nls: cannot access '/srv/names': No such file or directory"
        )
        yield* sh(vm, "mkdir /srv/crowd; cd /srv/crowd; seq -f %010g 20000 | xargs touch")
        assert.lengthOf(yield* vm.list("/srv/crowd"), 20_000)
      })
    )

    it.effect("are read in parts, no more of them than is wanted", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* vm.writeFile("/srv/digits", "0123456789")
        const part = (range: { offset?: number; length?: number }) =>
          Effect.map(Stream.runCollect(vm.readFile("/srv/digits", range)), (all) =>
            text(Buffer.concat(Chunk.toReadonlyArray(all)))
          )
        assert.strictEqual(yield* part({ offset: 3, length: 4 }), "3456")
        assert.strictEqual(yield* part({ offset: 8 }), "89")
        assert.strictEqual(yield* part({ length: 2 }), "01")
        assert.strictEqual(yield* part({ offset: 50 }), "")
        for (const range of [{ offset: -1 }, { length: 0.5 }, { offset: Number.NaN }]) {
          assert.strictEqual((yield* Effect.flip(part(range))).code, "FILES_RANGE_INVALID")
        }
        yield* sh(vm, "truncate -s 20G /srv/endless")
        const some = yield* Stream.runFold(
          Stream.take(vm.readFile("/srv/endless"), 3),
          0,
          (sum, { length }) => sum + length
        )
        assert.isAbove(some, 0)
        assert.strictEqual(yield* sh(vm, "rm /srv/endless; echo fine"), "fine")
      })
    )
  }
)
